"""Prove: time-to-target with everything charged."""
