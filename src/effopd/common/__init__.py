"""Files, processes, numbers and packages: one idea per module, no knowledge of language models."""
