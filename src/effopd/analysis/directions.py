r"""Path of a leading singular vector over training: explained variance, random-walk null, pictures.

The points are u_1, …, u_T of one matrix. The explained variance of two components measures how
planar the path is. A random walk gives a high value too: 0.83 for 5 points in many dimensions,
falling to (1 + 1/4) · 6/π² = 0.76 for many points. Legend: T points in time order, M dimension.

Differs from the paper: the paper shows the explained variance alone; here the random-walk null is
reported with it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from effopd.errors import WeightsError


def align_signs(u_TM: Tensor) -> Tensor:
    """Flip signs so that u_t · u_{t−1} ≥ 0, forward in time only: the first point keeps its sign.

    Signs of singular vectors are arbitrary. A later point never changes an earlier one, so
    extending a trajectory keeps its first part. An inner product of exactly 0 keeps the sign.

    Returns:
        float64 [T, M], a new tensor.

    Raises:
        WeightsError: not a matrix.
    """
    u = _points(u_TM)
    flips = torch.where((u[1:] * u[:-1]).sum(1) < 0, -1.0, 1.0).to(u)
    signs = torch.cat([u.new_ones(min(1, len(u))), flips.cumprod(0)])
    return u * signs[:, None]


def explained_variance(u_TM: Tensor) -> float:
    r"""EVR = (λ1 + λ2) / Σλ, with λ the variances along the principal components of the points.

    Between 0 and 1. NaN with fewer than three distinct points, for which it is always 1.

    Raises:
        WeightsError: not a matrix.

    Source: arXiv 2605.11739, figure 4a.
    """
    u = _points(u_TM)
    return float(_ratio(_gram(u)[None])[0]) if _three_distinct(u) else math.nan


def plane(u_TM: Tensor) -> Tensor:
    """Coordinates of the points along their first two principal components (scikit-learn's PCA).

    The arbitrary signs of the components are fixed: the path runs from left to right (x_T ≥ x_1)
    and its ends lie low (y_1 + y_T ≤ 0). The picture is the same for u and −u.

    Returns:
        float64 [T, 2]; all zeros if the points are equal.

    Raises:
        WeightsError: not a matrix.
    """
    u = _points(u_TM)
    out = np.zeros((len(u), 2))
    if len(u) > 1 and bool((u != u[0]).any()):
        from sklearn.decomposition import PCA

        size = min(2, *u.shape)
        out[:, :size] = PCA(size, svd_solver="full").fit_transform(_coordinates(u))
        if out[-1, 0] < out[0, 0]:
            out[:, 0] *= -1
        if out[-1, 1] + out[0, 1] > 0:
            out[:, 1] *= -1
    return torch.from_numpy(out)


def random_walk_null(u_TM: Tensor, draws: int = 200, seed: int = 0) -> Tensor:
    r"""EVR of random walks with the same step lengths and independent uniformly random directions.

    $x_t = \sum_{i ≤ t} ‖u_i − u_{i−1}‖ e_i$. The data also differ from the null in their geometry:
    the u_t are unit vectors, so the path stays on the sphere, while the null walk is free in R^M.
    For a path much shorter than 1 this makes no difference. A long null walk leaves the sphere
    where the data must turn back, so vectors that are pure noise at every t lie *below* the null.

    The draws are exact for any M without M-dimensional vectors. EVR depends on the steps only
    through their inner products. Up to a common rotation, T − 1 Gaussian vectors in R^M have the
    coordinates of the Bartlett factor: a lower triangle of N(0, 1) with diagonal $χ_{M−i}$. Its
    rows are normalized to length 1.

    Args:
        u_TM: [T, M] in time order, signs aligned.

    Returns:
        float64 [draws]; all NaN if `explained_variance` is NaN.

    Raises:
        WeightsError: not a matrix.
    """
    u = _points(u_TM).cpu()
    if not _three_distinct(u):
        return torch.full((draws,), math.nan, dtype=torch.float64)
    lengths = (u[1:] - u[:-1]).norm(dim=1)
    steps, size = len(lengths), min(len(lengths), u.shape[1])
    rng = np.random.default_rng(seed)
    factor = np.tril(rng.standard_normal((draws, steps, size)), -1)
    diagonal = np.arange(size)
    factor[:, diagonal, diagonal] = np.sqrt(rng.chisquare(u.shape[1] - diagonal, (draws, size)))
    directions = torch.from_numpy(factor)
    directions = directions / directions.norm(dim=2, keepdim=True)
    walks = torch.nn.functional.pad((directions * lengths[:, None]).cumsum(1), (0, 0, 1, 0))
    return _ratio(_gram(walks))


def tsne(u_TM: Tensor, seed: int = 0) -> Tensor:
    """t-SNE coordinates of the points, perplexity min(30, (T − 1)/3), initialized from `plane`.

    Distances in the picture mean little. Each exact gradient costs O(T²), which suits trajectories
    but not clouds of thousands of points.

    Returns:
        float64 [T, 2]; all zeros if the points are equal.

    Raises:
        WeightsError: not a matrix.
        ValueError: fewer than four points.
    """
    u = _points(u_TM)
    if len(u) < 4:
        raise ValueError(f"tsne needs at least 4 points, got {len(u)}. Keep more checkpoints, or omit the picture.")
    start = plane(u).numpy()
    spread = float(start[:, 0].std())
    if spread == 0.0:
        return torch.from_numpy(start)
    from sklearn.manifold import TSNE

    model = TSNE(perplexity=min(30.0, (len(u) - 1) / 3), init=start / spread * 1e-4, method="exact", random_state=seed)
    return torch.from_numpy(model.fit_transform(_coordinates(u))).to(torch.float64)


def _points(u_TM: Tensor) -> Tensor:
    if u_TM.ndim != 2:
        raise WeightsError(f"expected points [T, M] in time order, got shape {tuple(u_TM.shape)}.")
    return u_TM.detach().to(torch.float64)


def _coordinates(u_TM: Tensor) -> np.ndarray:
    """The points rotated into at most T dimensions: same distances, faster PCA and t-SNE."""
    return (torch.linalg.qr(u_TM.T, mode="r").R.T if len(u_TM) < u_TM.shape[1] else u_TM).cpu().numpy()


def _three_distinct(u_TM: Tensor) -> bool:
    others = u_TM[(u_TM != u_TM[:1]).any(1)]
    return bool((others != others[:1]).any())


def _gram(u_TM: Tensor) -> Tensor:
    """Inner products of the centered points; any leading dimensions."""
    centered = u_TM - u_TM.mean(-2, keepdim=True)
    return centered @ centered.mT


def _ratio(gram_DTT: Tensor) -> Tensor:
    values = _eigenvalues(gram_DTT).clamp(min=0.0)
    return values[..., -2:].sum(-1) / values.sum(-1)


def _eigenvalues(gram_DTT: Tensor) -> Tensor:
    """Eigenvalues on one thread: LAPACK's threading slows down batches of small matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigvalsh(gram_DTT)
    finally:
        torch.set_num_threads(threads)
