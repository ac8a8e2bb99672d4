"""Search along the last weight update: schedules, searches, scorers, strategies, live weights."""
