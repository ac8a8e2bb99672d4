r"""All singular values of an update, without singular vectors, and metrics of the spectrum.

The values are the square roots of the eigenvalues of the float64 Gram matrix ΔW ΔWᵀ of the shorter
side. This costs a fraction of an SVD and needs no float64 copy of ΔW. Squaring loses values below
about 1e-8 · s1. If they would affect a metric (rank-deficient or steeply graded spectra), a blocked
QR factorization and an SVD of its triangular factor are used instead: slower, backward stable, with
the same memory.

Differs from the paper's code, which computes a full SVD in the storage dtype and keeps U, S and V.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from effopd.weights.blocks import Blocks

#: Matrices whose shorter side is at most this long go directly to LAPACK's SVD.
DIRECT = 384
#: Largest relative error of the metrics' sums through squaring; above it, QR is used.
_TOLERANCE = 5e-7


def singular_values(trained: Tensor, base: Tensor | None = None) -> Tensor:
    """Singular values of `trained − base`, descending.

    Args:
        trained, base: [M, N], any floating dtype, on one device. Computation is in float64.
            `base=None`: of `trained` alone.

    Returns:
        float64 [min(M, N)] on the same device.

    Raises:
        ValueError: not matrices, or different shapes.
    """
    delta = Blocks.of(trained, base)
    if delta.shape[0] <= DIRECT:
        return torch.linalg.svdvals(_triangle(delta))
    gram_MM = torch.zeros(delta.shape[0], delta.shape[0], dtype=torch.float64, device=trained.device)
    for _, block in delta:
        gram_MM.addmm_(block, block.T)
    largest = float(gram_MM.diagonal().max())
    if largest == 0.0:
        return torch.zeros(delta.shape[0], dtype=torch.float64, device=trained.device)
    s_R = torch.linalg.eigvalsh(gram_MM).clamp_(min=0.0).sqrt_().flip(0)
    del gram_MM
    return s_R if _is_safe(s_R) else torch.linalg.svdvals(_triangle(delta))


def factor_singular_values(b_MR: Tensor, a_RN: Tensor) -> Tensor:
    """Singular values of B A from its factors, float64 [min(M, N)]; exact zeros beyond R."""
    triangle_b = torch.linalg.qr(b_MR.to(torch.float64), mode="r").R
    triangle_a = torch.linalg.qr(a_RN.to(torch.float64).T, mode="r").R
    values = torch.linalg.svdvals(triangle_b @ triangle_a.T)
    size = min(b_MR.shape[0], a_RN.shape[1])
    return torch.cat([values, values.new_zeros(max(0, size - len(values)))])[:size]


def spectrum_metrics(s_R: Tensor, shape: tuple[int, int]) -> dict[str, float]:
    r"""Metrics of a spectrum s1 ≥ s2 ≥ … ≥ s_R of ΔW.

    - `frobenius_norm` $\|ΔW\|_F = (\sum s_i^2)^{1/2}$ and `spectral_norm` s1, in the unit of the
        weights
    - `spectral_to_frobenius` ρ = s1 / ‖ΔW‖_F, and `stable_rank` 1/ρ²
    - `effective_rank` $\exp(-\sum p_i \log p_i)$, $p_i = s_i / \sum s$; between 1 and R
    - `effective_rank_noise_floor`: the effective rank of pure rounding noise of this shape, see
        `noise_effective_rank`
    - `top1pct_norm_ratio` $(\sum_{i ≤ ⌈R/100⌉} s_i^2 / \sum s_i^2)^{1/2}$

    For a zero update, the norms are 0; the ratios and ranks are undefined and NaN.

    Source: arXiv 2605.11739, table 1; effective rank: Roy and Vetterli (2007).
    """
    s = s_R.to(torch.float64)
    total, square = float(s.sum()), float(s.square().sum())
    metrics = {"frobenius_norm": math.sqrt(square), "spectral_norm": float(s[0]) if len(s) else 0.0}
    names = ("spectral_to_frobenius", "stable_rank", "effective_rank", "top1pct_norm_ratio")
    if square == 0.0:
        metrics |= dict.fromkeys(names, math.nan)
    else:
        p = s[s > 0] / total
        head = float(s[: math.ceil(len(s) / 100)].square().sum())
        values = (
            math.sqrt(float(s[0] ** 2) / square),
            square / float(s[0] ** 2),
            math.exp(-float((p * p.log()).sum())),
            math.sqrt(head / square),
        )
        metrics |= dict(zip(names, values, strict=True))
    return metrics | {"effective_rank_noise_floor": noise_effective_rank(*shape)}


@lru_cache(maxsize=256)
def noise_effective_rank(rows: int, columns: int) -> float:
    r"""Effective rank of an M × N matrix of independent noise, for large matrices.

    It is $R · E[x] · \exp(−E[x \log x] / E[x])$ with R = min(M, N). Errors of rounding to a storage
    dtype are independent between entries, so their singular values s ∝ x follow the
    Marchenko–Pastur law, with density $f(x) = \sqrt{(b^2 − x^2)(x^2 − a^2)} / (π y x)$ on [a, b] =
    [1 − √y, 1 + √y] and y = R / max(M, N). By this measure, an update whose effective rank is near
    this value is indistinguishable from rounding errors.

    Example:
        >>> round(noise_effective_rank(1000, 1000))
        805
    """
    size, ratio = min(rows, columns), min(rows, columns) / max(rows, columns)
    low, high = 1 - math.sqrt(ratio), 1 + math.sqrt(ratio)

    def expectation(weight) -> float:
        # x = middle − half·cos(t) removes the square-root singularities at both ends
        middle, half = (low + high) / 2, (high - low) / 2

        def integrand(t: float) -> float:
            x = middle - half * math.cos(t)
            inner = math.sqrt((high + x) * (x + low)) * half * math.sin(t)
            return weight(x) * inner * half * math.sin(t) / (math.pi * ratio * x) if x > 0 else 0.0

        return integrate.quad(integrand, 0.0, math.pi, epsabs=1e-12, epsrel=1e-10)[0]

    mean = expectation(lambda x: x)
    return size * mean * math.exp(-expectation(lambda x: x * math.log(x)) / mean)


def _triangle(delta: Blocks) -> Tensor:
    """R of the QR factorization of ΔWᵀ, block by block; it has the singular values of ΔW."""
    triangle: Tensor | None = None
    for _, block in delta:
        rows = block.T if triangle is None else torch.cat([triangle, block.T])
        triangle = torch.linalg.qr(rows, mode="r").R
    assert triangle is not None
    return triangle


def _is_safe(s_R: Tensor) -> bool:
    """Whether rounding in the Gram matrix is negligible in Σs and in the entropy of s/Σs.

    The error of an eigenvalue is about ε·λ1·√R. The error of a singular value is therefore δ =
    ε·s1²·√R / 2s, at most (ε·√R)^½·s1.
    """
    s = s_R.cpu().numpy()
    error = np.finfo(np.float64).eps * math.sqrt(len(s)) * s[0] ** 2
    delta = np.minimum(math.sqrt(error), error / np.maximum(2 * s, 1e-300))
    total = s.sum()
    weight = 1 + np.abs(np.log(np.maximum(s, math.sqrt(error)) / total))
    return float((delta * weight).sum() / total) < _TOLERANCE
