"""Reverse KL of a search's candidates with one head product each: the teacher's logits are kept.

On a CPU in float32 only, and while the logits stay below `MOST_BYTES`. On SmolLM2-135M this takes
a third of the time of TRL's kernel, which makes both products for every candidate and has larger
temporaries. Both are within rounding of the exact value.

Shapes: N positions, H hidden width, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effopd.models.head import Head
from effopd.models.ray import TILE
from effopd.models.softmax_moments import Moments, joined, merged, tile_moments

#: Largest size of the teacher's logits of a batch, in bytes.
MOST_BYTES = 2**28


class Target:
    """The teacher at the N scored positions of a batch.

    Attributes:
        hidden_NH: its hidden states.
        logits: its logits [N, V] and their log normalizers [N]; `None`: not kept.
    """

    def __init__(self, hidden_NH: Tensor):
        self.hidden_NH = hidden_NH
        self.logits: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.hidden_NH)

    @torch.no_grad()
    def keep_logits(self, head: Head, temperature: float) -> None:
        """Set `logits` unless they are too large."""
        if len(self.hidden_NH) * len(head.weight) * torch.float32.itemsize <= MOST_BYTES:
            z_NV = head.logits(self.hidden_NH, temperature)
            self.logits = z_NV, z_NV.logsumexp(-1)


def in_float32_on_cpu(hidden: Tensor) -> bool:
    """Whether the loss projects these hidden states in float32 on a CPU."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def reverse_kl(hidden_NH: Tensor, head: Head, target: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """KL(π ‖ π*) [N] in nats, exact over the vocabulary, in tiles that fit into a CPU's cache.

    Args:
        hidden_NH: the student's hidden states.
        head: its output layer.
        target: the teacher's logits [N, V], and their log normalizers [N].
    """
    z_teacher_NV, log_z_N = target
    height, width = TILE
    sums: list[Moments] = []
    for top in range(0, max(1, len(hidden_NH)), height):
        rows, part = slice(top, top + height), None
        for left in range(0, len(head.weight), width):
            columns = slice(left, left + width)
            bias = None if head.bias is None else head.bias[columns]
            tile = replace(head, weight=head.weight[columns], bias=bias)
            part = merged(part, tile_moments(tile.logits(hidden_NH[rows], temperature), z_teacher_NV[rows, columns]))
        assert part is not None, "a vocabulary has rows"
        sums.append(part)
    whole = joined(sums)
    return whole.gap - whole.log_z + log_z_N
