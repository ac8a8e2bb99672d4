r"""Formulas of the interventions on one matrix or vector: W0 and an update ΔW to a new tensor.

Computed in float64, one part at a time, so memory is a few times the largest matrix. The caller
rounds the result once, to the dtype of the weights. `kinds.py` assigns formulas to parts.

Differs from the paper: R = min(M, N) for adapters too, so that p % is the same number of components
for full and low-rank training. Norms and biases follow the formulas of the matrices where these are
defined.

Shapes: M rows (out), N columns (in), R = min(M, N), K components kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from effopd.weights.difference import Update
from effopd.weights.leading import leading_of_factors


def interpolated(update: Update, alpha: float) -> Tensor | None:
    """W0 + α ΔW; bit for bit the trained tensor for α = 1, and `None` (the base) for α = 0."""
    if alpha in (0.0, 1.0):
        return update.trained if alpha else None
    return on_base(update, update.delta().mul_(alpha))


def on_base(update: Update, delta: Tensor) -> Tensor:
    """W0 + `delta`, in the memory of `delta` (float64)."""
    return delta.add_(update.base)


def rescaled(delta: Tensor, norm: float) -> Tensor:
    """`norm` · ΔW/‖ΔW‖; a zero ΔW has no direction and stays zero."""
    delta_norm = float(torch.linalg.vector_norm(delta))
    return delta * (norm / delta_norm) if delta_norm > 0 else delta


def norm_scaled(delta: Tensor, final_norm: float, beta: float) -> Tensor:
    r"""$ΔW_t · (1 + β (‖ΔW_T‖ − ‖ΔW_t‖)/‖ΔW_t‖)$: β = 0 gives ΔW_t, β = 1 the final norm.

    A zero ΔW_t stays zero.

    Args:
        delta: ΔW_t, float64.
        final_norm: ‖ΔW_T‖ of the same matrix at the end of training.

    Source: arXiv 2605.11739, section 5 (norm scaling), fig. 4c.
    """
    norm = float(torch.linalg.vector_norm(delta))
    return delta * (1 + beta * (final_norm - norm) / norm) if norm > 0 else delta


def component_count(percent: float, size: int) -> int:
    """k = ⌈p·R/100⌉, exact for the decimal `percent` (0.07 % of 10000 is 7, not 8)."""
    return math.ceil(Fraction(str(percent)) * size / 100)


def components(update: Update, k: int, end: str) -> Tensor:
    """ΔW_k = Σ s_i u_i v_iᵀ over the `k` leading (`top`) or trailing (`bottom`) of R components.

    R = min(M, N). An adapter's components beyond its rank are zero.

    Returns:
        float64 [M, N], from a float64 SVD of ΔW, or of the small core R_B R_Aᵀ of an adapter.
    """
    size = min(update.part.shape)
    if k >= size:
        return update.delta()
    if update.factors is None:
        u, s, vt = torch.linalg.svd(update.delta(), full_matrices=False)
    else:
        svd = leading_of_factors(*update.factors, k=size)
        u, s, vt = (x.to(update.base.device) for x in (svd.u_MK, svd.s_K, svd.v_NK.T))
    chosen = slice(0, k) if end == "top" else slice(min(size - k, len(s)), len(s))
    return (u[:, chosen] * s[chosen]) @ vt[chosen]


def random_direction(shape: Sequence[int], norm: float, seed: int, name: str) -> Tensor:
    """Uniformly random direction of the given Frobenius norm, float64 on the CPU.

    It depends only on shape, `seed` and `name`, so all runs get the same random directions.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return rescaled(torch.randn(tuple(shape), generator=generator, dtype=torch.float64), norm)
