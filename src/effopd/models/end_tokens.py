"""End tokens that are also the padding, as in SmolLM2, Llama and GPT-2."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def train_end_tokens(model: nn.Module, end_token_ids: Iterable[int]) -> None:
    """Let the embeddings of end tokens receive their gradient, also if one of them is the padding.

    torch drops the gradient of an embedding's `padding_idx`, which transformers sets to the
    configured padding. An end token in a prompt or an answer is an input like any other. Real
    padding needs no such rule: masks keep it out of the loss.
    """
    ends = set(end_token_ids)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx in ends:
            module.padding_idx = None
