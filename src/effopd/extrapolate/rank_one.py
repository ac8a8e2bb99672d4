"""Leading rank-1 components of updates, with signs aligned over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effopd.common.float64 import for_float64
from effopd.weights.leading import leading_directions


@dataclass(frozen=True)
class RankOne:
    """Leading component s1·u1·v1ᵀ of one update ΔW = W_t − W_0.

    Attributes:
        u_M, s1, v_N: leading singular triplet; vectors in fp32, on the CPU.
        norm: ‖ΔW‖ (Frobenius).
    """

    u_M: Tensor
    s1: float
    v_N: Tensor
    norm: float


def as_matrix(tensor: Tensor) -> Tensor:
    """A parameter as a matrix [M, N]: vectors become columns, further axes are flattened into N."""
    return tensor.reshape(-1, 1) if tensor.ndim < 2 else tensor.flatten(1)


def leading(delta: Tensor) -> RankOne:
    """Leading component of an update; zeros for a parameter that has not moved."""
    delta_MN = for_float64(as_matrix(delta))
    norm = float(delta_MN.double().norm())
    if norm == 0.0:
        return RankOne(torch.zeros(delta_MN.shape[0]), 0.0, torch.zeros(delta_MN.shape[1]), 0.0)
    directions = leading_directions(delta_MN, k=1)
    return RankOne(directions.u_MK[:, 0].float(), float(directions.s_K[0]), directions.v_NK[:, 0].float(), norm)


def _dot(a_M: Tensor, b_M: Tensor) -> float:
    return float(torch.dot(for_float64(a_M).double(), for_float64(b_M).double()))


def align_forward(points: Sequence[RankOne]) -> list[RankOne]:
    """Flip signs forward in time so that u_t · u_{t−1} ≥ 0; u and v flip together.

    Aligning to the last point instead lets later steps decide the signs of earlier ones.
    """
    aligned: list[RankOne] = []
    for point in points:
        flip = bool(aligned) and _dot(point.u_M, aligned[-1].u_M) < 0
        aligned.append(RankOne(-point.u_M, point.s1, -point.v_N, point.norm) if flip else point)
    return aligned
