"""Local teachers: dtype, quantization, place in memory, several per run, and their manifest."""
