"""Move one model along its update, evaluate it there, put it back."""
