"""Moments of a softmax over a vocabulary that is seen tile by tile.

Central moments of two tiles are merged about their common means, so nothing cancels.

Shapes: n positions, v vocabulary rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over part of a vocabulary, [n] each; means are weighted by p ∝ e^z.

    With the gap r = z − z* to a target, δ = z' and its deviation δ̃ from its mean:

    Attributes:
        peak, mass: Σ e^z = mass · e^peak.
        gap: mean of r.
        derivatives: [6, n], means of δ and z'', then cov(δ, r), var(δ), cov(δ̃², r) and cov(z'', r);
            `None`: not measured.
    """

    peak: Tensor
    mass: Tensor
    gap: Tensor
    derivatives: Tensor | None = None

    @property
    def log_z(self) -> Tensor:
        """log Σ e^z."""
        return self.peak + self.mass.log()

    def central(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cov(δ, r), var(δ), cov(δ̃², r), cov(z'', r), [n] each."""
        assert self.derivatives is not None, "measured without derivatives"
        slope, variance, skew, bend = self.derivatives[2:]
        return slope, variance, skew, bend


def tile_moments(z: Tensor, target: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Moments:
    """Moments of one tile [n, v] of logits z and the target's logits z*, and of z' and z''."""
    peak = z.amax(-1)
    p = torch.sub(z, peak[:, None]).exp_()
    mass, gap = p.sum(-1), z - target
    if first is None or second is None:
        return Moments(peak, mass, p.mul_(gap).sum(-1) / mass)
    p /= mass[:, None]
    mean_gap, mean = (p * gap).sum(-1), (p * first).sum(-1)
    r, d = gap.sub_(mean_gap[:, None]), first - mean[:, None]
    pd, pe = p * d, p.mul_(second)
    pdd = pd * d
    parts = [mean, pe.sum(-1), (pd * r).sum(-1), pdd.sum(-1), pdd.mul_(r).sum(-1), pe.mul_(r).sum(-1)]
    return Moments(peak, mass, mean_gap, torch.stack(parts))


def joined(chunks: Sequence[Moments]) -> Moments:
    """Moments of several chunks of positions, one after the other."""
    peak, mass, gap = (torch.cat(parts) for parts in zip(*((c.peak, c.mass, c.gap) for c in chunks), strict=True))
    derivatives = [part for part in (chunk.derivatives for chunk in chunks) if part is not None]
    return Moments(peak, mass, gap, torch.cat(derivatives, dim=1) if derivatives else None)


def merged(a: Moments | None, b: Moments) -> Moments:
    """Moments of two disjoint parts of the vocabulary together."""
    if a is None:
        return b
    peak = torch.maximum(a.peak, b.peak)
    mass_a, mass_b = (part.mass * torch.exp(part.peak - peak) for part in (a, b))
    mass = mass_a + mass_b
    share = mass_b / mass
    gap = torch.lerp(a.gap, b.gap, share)
    if a.derivatives is None or b.derivatives is None:
        return Moments(peak, mass, gap)
    means = torch.lerp(a.derivatives[:2], b.derivatives[:2], share)
    parts = _about(a.gap - gap, a.derivatives, means), _about(b.gap - gap, b.derivatives, means)
    return Moments(peak, mass, gap, torch.cat([means, torch.lerp(parts[0], parts[1], share)]))


def _about(r: Tensor, derivatives: Tensor, means: Tensor) -> Tensor:
    """The four central moments about other means; `r` is the shift of the mean gap."""
    (d, e), (slope, variance, skew, bend) = derivatives[:2] - means, derivatives[2:]
    return torch.stack([
        slope + d * r,
        variance + d * d,
        skew + 2 * d * slope + r * variance + d * d * r,
        bend + e * r,
    ])  # fmt: skip
