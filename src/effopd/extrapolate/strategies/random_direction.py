"""Control: noise as long as the displacement. If this helps as much, the direction is not what
helps.
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

    Its direction is uniform on the sphere, so in a large tensor it is nearly orthogonal to the
    displacement.
    """
    noise = torch.randn(displacement.shape, generator=generator, device=displacement.device, dtype=torch.float32).to(
        displacement.dtype
    )
    length, drawn = (float(for_float64(tensor).double().norm()) for tensor in (displacement, noise))
    return noise * (length / max(drawn, torch.finfo(torch.float64).tiny))


def seed_of(seed: int, step: int, name: str) -> int:
    """A seed for each (run, step, parameter), the same in every process and Python version."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_direction(seed: int, step: int) -> Direction:
    """Noise with the norm of the displacement, tensor by tensor; the same for every candidate of a
    search.
    """

    def direction(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
        delta = origin - anchor
        generator = torch.Generator(delta.device).manual_seed(seed_of(seed, step, name))
        return random_like(delta, generator)

    return direction


STRATEGIES["random_direction"] = Strategy(
    "control: the paper's search along noise as long as Δ",
    until_one_fails,
    args=ScalesArgs,
    direction=random_direction,
    needs_full_matrices=True,
)
