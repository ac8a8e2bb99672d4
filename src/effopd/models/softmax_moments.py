"""Moments of a softmax over a vocabulary that is seen tile by tile.

Central moments of two tiles are merged about their common means, so nothing cancels.

Shapes: n positions, v vocabulary rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over part of a vocabulary, [n] each; means are weighted by p ∝ e^z.

    With the gap r = z − z* to a target, δ = z' and its deviation δ̃ from its mean:

    Attributes:
        peak, mass: Σ e^z = mass · e^peak.
        gap: mean of r.
        first, second: means of δ and z''.
        slope: cov(δ, r).
        variance: var(δ).
        skew: cov(δ̃², r).
        bend: cov(z'', r).
    """

    peak: Tensor
    mass: Tensor
    gap: Tensor
    first: Tensor
    second: Tensor
    slope: Tensor
    variance: Tensor
    skew: Tensor
    bend: Tensor

    @property
    def log_z(self) -> Tensor:
        """log Σ e^z."""
        return self.peak + self.mass.log()


def tile_moments(z: Tensor, gap: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Moments:
    """Moments of one tile [n, v]; without the derivatives z' and z'', their moments are 0."""
    peak = z.amax(-1)
    p = torch.exp(z - peak[:, None])
    mass = p.sum(-1)
    p /= mass[:, None]
    mean_gap, zero = (p * gap).sum(-1), torch.zeros_like(mass)
    if first is None or second is None:
        return Moments(peak, mass, mean_gap, *[zero] * 6)
    mean, r = (p * first).sum(-1), gap - mean_gap[:, None]
    d = first - mean[:, None]
    pd, pr = p * d, p * r
    return Moments(
        peak, mass, mean_gap, mean, (p * second).sum(-1),
        slope=(pd * r).sum(-1), variance=(pd * d).sum(-1), skew=(pd * d * r).sum(-1), bend=(pr * second).sum(-1),
    )  # fmt: skip


def merged(a: Moments | None, b: Moments) -> Moments:
    """Moments of two disjoint parts of the vocabulary together."""
    if a is None:
        return b
    peak = torch.maximum(a.peak, b.peak)
    masses = [part.mass * torch.exp(part.peak - peak) for part in (a, b)]
    mass = masses[0] + masses[1]
    shares = [each / mass for each in masses]

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return shares[0] * x + shares[1] * y

    gap, first, second = mean(a.gap, b.gap), mean(a.first, b.first), mean(a.second, b.second)

    def about_the_common_mean(part: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d, r, e = part.first - first, part.gap - gap, part.second - second
        return (
            part.slope + d * r,
            part.variance + d * d,
            part.skew + 2 * d * part.slope + r * part.variance + d * d * r,
            part.bend + e * r,
        )

    central = [mean(x, y) for x, y in zip(about_the_common_mean(a), about_the_common_mean(b), strict=True)]
    return Moments(peak, mass, gap, first, second, *central)
