r"""Similarity of two sets of leading singular directions, and shift of a spectrum.

The paper does not define its similarity between the subspace at step t and the final one, so there
are three: cosines per direction, projector overlaps of nested subspaces, and principal angles. All
ignore the arbitrary signs of singular vectors. Only overlaps and angles also ignore rotations
inside the subspace, which are arbitrary for nearly equal singular values. Legend: M dimension of
the vectors, K directions; columns are orthonormal and ordered by singular value.

The singular vectors themselves are computed in `weights.leading`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effopd.errors import WeightsError


def counterpart_cosines(u_MK: Tensor, w_MK: Tensor) -> Tensor:
    r"""|u_k · w_k|, absolute cosine between the k-th directions of the two sets.

    For independent random directions the mean is about $\sqrt{2 / (π M)}$.

    Args:
        u_MK, w_MK: orthonormal columns; surplus columns of the larger set are ignored.

    Returns:
        float64 [min K], each in 0–1.

    Raises:
        WeightsError: not matrices, or of different M.

    Source: arXiv 2605.11739, figure 4b (first reading).
    """
    u, w = _pair(u_MK, w_MK)
    k = min(u.shape[1], w.shape[1])
    return (u[:, :k] * w[:, :k]).sum(0).abs().clamp(max=1.0)


def projector_overlaps(u_MK: Tensor, w_MK: Tensor) -> Tensor:
    r"""$‖U_k^⊤ W_k‖_F^2 / k$ for k = 1, 2, …: mean squared cosine of the principal angles.

    1 for equal subspaces, 0 for orthogonal ones, k/M on average for independent random ones
    (`chance_overlap`). Entry 16 of right singular vectors is the "right-subspace lock"
    ‖V_tᵀ V_T‖²/16.

    Args:
        u_MK, w_MK: orthonormal columns; surplus columns of the larger set are ignored.

    Returns:
        float64 [min K], each in 0–1; entry k − 1 belongs to the k leading directions.

    Raises:
        WeightsError: not matrices, or of different M.

    Source: arXiv 2605.11739, figure 4b (second reading); arXiv 2606.13657.
    """
    u, w = _pair(u_MK, w_MK)
    k = min(u.shape[1], w.shape[1])
    squares_KK = (u[:, :k].T @ w[:, :k]).square()
    sizes = torch.arange(1, k + 1, dtype=torch.float64, device=u.device)
    return (squares_KK.cumsum(0).cumsum(1).diagonal() / sizes).clamp(max=1.0)


def chance_overlap(k: int, m: int) -> float:
    """k/m, the expected projector overlap of two independent random k-dimensional subspaces of R^m.

    Raises:
        ValueError: not 1 ≤ k ≤ m.
    """
    if not 1 <= k <= m:
        raise ValueError(f"chance_overlap needs 1 <= k <= m, got k={k}, m={m}.")
    return k / m


def principal_angles(u_MK: Tensor, w_MK: Tensor) -> Tensor:
    r"""Principal angles between two subspaces, in degrees, ascending.

    $\cos θ_i = σ_i(U^⊤ W)$ is used above 45° and $\sin θ_i = σ_i(W − U U^⊤ W)$ below, so that small
    angles are as accurate as large ones; arccos alone cannot resolve angles below about 1e-6
    degrees.

    Args:
        u_MK, w_MK: orthonormal columns; K may differ.

    Returns:
        float64 [min K], each in 0–90.

    Raises:
        WeightsError: not matrices, or of different M.

    Source: Björck and Golub (1973), Knyazev and Argentati (2002). `scipy.linalg.subspace_angles`
        returns the same angles in radians, descending.
    """
    u, w = _pair(u_MK, w_MK)
    if u.shape[1] < w.shape[1]:
        u, w = w, u
    product = u.T @ w
    cosines = torch.linalg.svdvals(product)  # descending: smallest angle first
    sines = torch.linalg.svdvals(torch.linalg.qr(w - u @ product, mode="r").R).flip(0)
    angles = torch.where(cosines.square() >= 0.5, sines.clamp(max=1.0).asin(), cosines.clamp(max=1.0).acos())
    return angles.rad2deg().sort().values


def spectral_shift(s_R: Tensor, s0_R: Tensor) -> float:
    """‖σ(W₊) − σ(W0)‖ / ‖σ(W0)‖, the shift of the sorted singular values relative to W0's norm.

    0 for any orthogonal rotation of W0; at most ‖ΔW‖/‖W0‖ (Mirsky). NaN for W0 = 0.

    Args:
        s_R, s0_R: all singular values of the trained and of the base matrix, descending.

    Raises:
        WeightsError: the spectra differ in length.
    """
    if s_R.shape != s0_R.shape or s_R.ndim != 1:
        raise WeightsError(
            f"expected two spectra of the same length, got shapes {tuple(s_R.shape)} and {tuple(s0_R.shape)}. "
            "Pass all singular values of both matrices."
        )
    s, s0 = s_R.to(torch.float64), s0_R.to(torch.float64)
    size = float(s0.norm())
    return float((s - s0).norm()) / size if size > 0 else math.nan


def _pair(u_MK: Tensor, w_MK: Tensor) -> tuple[Tensor, Tensor]:
    if u_MK.ndim != 2 or w_MK.ndim != 2 or u_MK.shape[0] != w_MK.shape[0]:
        raise WeightsError(
            f"expected two sets of directions [M, K] with the same M, got shapes {tuple(u_MK.shape)} and "
            f"{tuple(w_MK.shape)}. Compare left with left, or right with right, singular vectors of the same matrix."
        )
    return u_MK.to(torch.float64), w_MK.to(torch.float64)
