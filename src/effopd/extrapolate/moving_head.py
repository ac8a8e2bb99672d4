"""`moving_head`: the output layer of a live model along W + s·Δ, for predictions of the KL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import assemble
from effopd.extrapolate.movable import MovableWeights
from effopd.extrapolate.parameter_rules import trained_parameters
from effopd.models.head import Head
from effopd.models.logit_path import core_of, is_whole
from effopd.models.ray import MovingHead


@torch.no_grad()
def moving_head(model: Any, weights: MovableWeights, vocab_size: int) -> MovingHead:
    """The output layer at W, and its part of Δ = W − anchor. Call it while the model is at W.

    A tied output layer moves if the embeddings do. Tensors that move are copied, because the model
    overwrites them.

    Args:
        model: the live model, possibly wrapped.
        weights: its movable weights.
        vocab_size: number of rows of the vocabulary that student and teacher share.

    Raises:
        CompatibilityError: see `Head.of`.
    """
    layer, start = core_of(model).get_output_embeddings(), Head.of(model, vocab_size)
    moving = set(weights.names)
    names = {id(p): name for name, p in trained_parameters(model).items() if name in moving}
    wanted = {part: names.get(id(getattr(layer, part, None))) for part in ("weight", "bias")}
    deltas: dict[str, Tensor] = {}
    if any(wanted.values()):
        start, chosen = start.copied(), {name for name in wanted.values() if name}
        shapes = {wanted[part]: getattr(layer, part).shape for part in wanted if wanted[part]}
        for name, delta in weights.displacements(chosen):
            if name in weights.sharded:  # ZeRO 1 and 2: the model is whole, its masters are not
                delta = assemble(delta, weights.sharded[name], shapes[name])
            deltas[name] = delta[:vocab_size]
    return MovingHead(start, *(deltas.get(name or "") for name in wanted.values()))


def line_head(model: Any, weights: MovableWeights, vocab_size: int, beta: float) -> MovingHead | None:
    """`moving_head` for a run's divergence; `None` unless it is the reverse KL of a whole model."""
    return moving_head(model, weights, vocab_size) if beta == 1 and is_whole(model) else None
