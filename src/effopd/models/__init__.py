"""Causal language models: files, logits from hidden states, and checks of the sampler."""
