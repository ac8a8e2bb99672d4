"""Shift of token embeddings: row-wise cosines and a joint PCA plane.

Legend: V rows (tokens), H width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from effopd.errors import WeightsError

#: Elements of one float64 block (2 MiB, fits a core's cache).
_BLOCK = 2**18


def row_cosines(base_VH: Tensor, trained_VH: Tensor) -> Tensor:
    """cos(row of W0, row of W₊), computed in float64, one block of rows at a time.

    Unmoved rows give exactly 1. A row that is zero in both matrices (padding) counts as unmoved; a
    row that is zero in one of them gives 0.

    Args:
        base_VH, trained_VH: [V, H], any floating dtype, on one device.

    Returns:
        float64 [V] on the same device, each in −1–1.

    Raises:
        WeightsError: not matrices, or of different shapes.
    """
    _check(base_VH, trained_VH)
    cosines = torch.empty(len(base_VH), dtype=torch.float64, device=base_VH.device)
    rows = max(1, _BLOCK // max(1, base_VH.shape[1]))
    for start in range(0, len(base_VH), rows):
        b = base_VH[start : start + rows].to(torch.float64)
        w = trained_VH[start : start + rows].to(torch.float64)
        b_square, w_square = (b * b).sum(1), (w * w).sum(1)
        # one square root: sqrt(x · x) is exactly x, sqrt(x) · sqrt(x) is not
        size = (b_square * w_square).sqrt()
        cosine = ((b * w).sum(1) / size).clamp(-1.0, 1.0)
        both_zero = (b_square == 0) & (w_square == 0)
        cosines[start : start + rows] = torch.where(size == 0, both_zero.to(torch.float64), cosine)
    return cosines


def embedding_metrics(base_VH: Tensor, trained_VH: Tensor) -> dict[str, float]:
    """Summary of the embedding shift.

    - `row_cosine_mean`, `row_cosine_min`: mean and minimum of `row_cosines` over all rows
    - `rows_moved_share`: share of rows with at least one entry that differs (0–1; −0 equals 0)

    All are NaN for a matrix without rows.

    Raises:
        WeightsError: not matrices, or of different shapes.

    Source: arXiv 2605.11739, embedding analysis.
    """
    cosines = row_cosines(base_VH, trained_VH)
    names = ("row_cosine_mean", "row_cosine_min", "rows_moved_share")
    if not len(cosines):
        return dict.fromkeys(names, math.nan)
    rows = max(1, _BLOCK // max(1, base_VH.shape[1]))
    pairs = zip(base_VH.split(rows), trained_VH.split(rows), strict=True)
    moved = sum(int((b != w).any(1).sum()) for b, w in pairs)
    values = (float(cosines.mean()), float(cosines.min()), moved / len(cosines))
    return dict(zip(names, values, strict=True))


def embedding_plane(base_VH: Tensor, trained_VH: Tensor, rows: int = 2000, seed: int = 0) -> Tensor:
    """PCA coordinates of the base and trained embeddings of the same randomly drawn tokens.

    PCA is fitted on base and trained rows together, so both share their coordinates and a shift of
    the whole cloud is visible. Deterministic, signs included.

    Returns:
        float64 [2, min(rows, V), 2] on the CPU: base first, then trained; the tokens in ascending
            order.

    Raises:
        WeightsError: not matrices, or of different shapes.
    """
    from sklearn.decomposition import PCA

    _check(base_VH, trained_VH)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(base_VH), generator=generator)[:rows].sort().values
    both = [matrix[chosen.to(matrix.device)].to("cpu", torch.float64) for matrix in (base_VH, trained_VH)]
    points = torch.cat(both).numpy()
    out = np.zeros((len(points), 2))
    if len(points) and bool((points != points[0]).any()):
        size = min(2, *points.shape)
        # Lanczos: a full SVD of thousands of wide rows takes minutes
        solver = "arpack" if size < min(points.shape) else "full"
        out[:, :size] = PCA(size, svd_solver=solver, random_state=seed).fit_transform(points)
    return torch.from_numpy(out.reshape(2, len(chosen), 2))


def _check(base_VH: Tensor, trained_VH: Tensor) -> None:
    if base_VH.ndim != 2 or base_VH.shape != trained_VH.shape:
        raise WeightsError(
            "expected two embedding matrices of the same shape, got "
            f"{tuple(base_VH.shape)} and {tuple(trained_VH.shape)}. "
            "Compare checkpoints of the same architecture and vocabulary."
        )
