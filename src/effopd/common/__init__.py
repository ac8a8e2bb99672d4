"""Helpers for files, processes, numbers and packages, independent of language models."""
