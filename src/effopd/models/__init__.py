"""A causal language model as a distribution: its files, its logits, its sampler."""
