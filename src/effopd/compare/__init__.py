"""Comparison of strategies by time to target, with all costs charged."""
