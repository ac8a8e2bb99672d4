"""`random_direction`, a control: the paper's search along random noise with the norm of Δ.

If it helps as much as `effopd`, the gain does not come from the direction of Δ.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from effopd.common.float64 import for_float64
from effopd.extrapolate.movable import Direction
from effopd.extrapolate.scales import ScalesArgs, until_one_fails
from effopd.extrapolate.strategy import STRATEGIES, Strategy


def random_like(displacement: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise R with ‖R‖ = ‖displacement‖ (Frobenius), same shape, dtype and device.

    Its direction is uniform on the sphere, so for a large tensor R is nearly orthogonal to the
    displacement.
    """
    noise = torch.randn(displacement.shape, generator=generator, device=displacement.device, dtype=torch.float32).to(
        displacement.dtype
    )
    length, drawn = (float(for_float64(tensor).double().norm()) for tensor in (displacement, noise))
    return noise * (length / max(drawn, torch.finfo(torch.float64).tiny))


def seed_of(seed: int, step: int, name: str) -> int:
    """Seed per run, step and parameter, identical in all processes and Python versions."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_direction(seed: int, step: int) -> Direction:
    """Noise with the norm of Δ, per tensor; identical for all candidates of a search."""

    def direction(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
        delta = origin - anchor
        generator = torch.Generator(delta.device).manual_seed(seed_of(seed, step, name))
        return random_like(delta, generator)

    return direction


STRATEGIES["random_direction"] = Strategy(
    "control: the paper's search along random noise with the norm of Δ",
    until_one_fails,
    args=ScalesArgs,
    direction=random_direction,
    needs_full_matrices=True,
)
