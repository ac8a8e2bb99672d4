"""Optimizers by class name, Muon with AdamW, k-step Lookahead, and averages of the weights."""
