"""Logits and KL on a few vocabulary rows per position, and tiles of positions for dense logits.

Shapes: N positions, K rows per position, H hidden width, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effopd.models.head import Head

#: Numbers per tile: 64 MiB of float32.
_TILE = 2**24


def tiles(positions: int, width: int) -> Iterator[slice]:
    """Slices of positions, each small enough for a tensor of `width` numbers per position."""
    size = max(1, _TILE // max(1, width))
    yield from (slice(start, min(start + size, positions)) for start in range(0, positions, size))


def row_logits(hidden_NH: Tensor, head: Head, ids_NK: Tensor, temperature: float) -> Tensor:
    """Logits [N, K] of K vocabulary rows per position, at `temperature`; differentiable.

    Cost: K · H per position, forward and backward. The normalizer over V is not computed.

    Args:
        ids_NK: vocabulary rows, not differentiated.
    """
    head = head.whole()
    z_NK = _RowLogits.apply(hidden_NH, head.weight, head.bias, ids_NK) * head.scale
    if head.softcap is not None:
        z_NK = head.softcap * torch.tanh(z_NK / head.softcap)
    return z_NK / temperature


def support_kl(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """KL(p̂ ‖ q̂) [N], in nats, from both models' logits on the same K tokens per position."""
    own_NK, other_NK = student_NK.log_softmax(-1), teacher_NK.log_softmax(-1)
    return (own_NK.exp() * (own_NK - other_NK)).sum(-1)


class _RowLogits(torch.autograd.Function):
    """h · W[ids] + b[ids] in tiles; inputs are rounded as in the kernels, sums are in float32."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, ids_NK: Tensor) -> Tensor:
        kind = hidden_NH.device.type
        ctx.rounded = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
        ctx.exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        ctx.save_for_backward(hidden_NH, weight, bias, ids_NK)
        out_NK = torch.empty(ids_NK.shape, dtype=ctx.exact, device=hidden_NH.device)
        with torch.autocast(kind, enabled=False):
            for rows in tiles(len(ids_NK), ids_NK.shape[1] * weight.shape[1]):
                w_NKH = weight[ids_NK[rows]].to(ctx.rounded).to(ctx.exact)
                h_NH1 = hidden_NH[rows].to(ctx.rounded).to(ctx.exact)[..., None]
                out_NK[rows] = torch.bmm(w_NKH, h_NH1)[..., 0]
        return out_NK if bias is None else out_NK + bias[ids_NK].to(ctx.exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g_NK,) = gradients
        hidden_NH, weight, bias, ids_NK = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        g_hidden = torch.empty(hidden_NH.shape, dtype=ctx.exact, device=g_NK.device) if needs_hidden else None
        g_weight = torch.zeros(weight.shape, dtype=ctx.exact, device=g_NK.device) if needs_weight else None
        with torch.autocast(g_NK.device.type, enabled=False):
            for rows in tiles(len(ids_NK), ids_NK.shape[1] * weight.shape[1]):
                ids, g = ids_NK[rows], g_NK[rows].to(ctx.exact)
                if g_hidden is not None:
                    w_NKH = weight[ids].to(ctx.rounded).to(ctx.exact)
                    g_hidden[rows] = torch.bmm(g[:, None], w_NKH)[:, 0]
                if g_weight is not None:
                    h_NH = hidden_NH[rows].to(ctx.rounded).to(ctx.exact)
                    g_weight.index_add_(0, ids.flatten(), (g[..., None] * h_NH[:, None]).flatten(0, 1))
        g_bias = None
        if bias is not None and needs_bias:
            g_bias = torch.zeros(bias.shape, dtype=ctx.exact, device=g_NK.device)
            g_bias = g_bias.index_add_(0, ids_NK.flatten(), g_NK.to(ctx.exact).flatten()).to(bias.dtype)
        return (
            None if g_hidden is None else g_hidden.to(hidden_NH.dtype),
            None if g_weight is None else g_weight.to(weight.dtype),
            g_bias,
            None,
        )
