r"""The K leading singular directions of an update, with a bound on how far they may be off.

Block Lanczos with full reorthogonalisation on ΔW ΔWᵀ of the shorter side: the products with ΔW run
in float32 (they are nearly all of the cost), everything else in float64, and two float64 steps at
the end clean the result. It stops when the residuals prove the accuracy, not after a fixed number
of steps as randomised SVD does (`torch.svd_lowrank`), whose vectors are wrong without notice when
the spectrum decays slowly. Where two singular values nearly coincide no method can tell their
vectors apart; the bound says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effopd.weights.blocks import Blocks
from effopd.weights.spectrum import DIRECT

#: Angle (radians) every leading subspace should be good to before the float64 steps.
_TARGET = 2e-5
#: Largest Krylov basis, in vectors per direction asked for.
_LIMIT = 40
#: Vectors in a block beyond K.
_OVERSAMPLE = 6
#: Share of a block's norm below which what it adds to the basis is float64 rounding.
_EXHAUSTED = 1e-10


@dataclass(frozen=True)
class Leading:
    """ΔW ≈ Σ_k s_k u_k v_kᵀ.

    Attributes:
        u_MK, s_K, v_NK: float64, on the CPU; columns orthonormal, values descending. u_k and v_k
            have an arbitrary joint sign; directions of zero singular values are arbitrary.
        next_value: s_{K+1}, 0 when there is none.
        angle_bound_K: for each k, a bound in radians on the largest principal angle between the
            leading-k subspaces found and the true ones, left and right (Wedin); π/2 where it proves
            nothing.
    """

    u_MK: Tensor
    s_K: Tensor
    v_NK: Tensor
    next_value: float
    angle_bound_K: Tensor


def leading_directions(trained: Tensor, base: Tensor | None = None, k: int = 20, seed: int = 0) -> Leading:
    """The K = min(k, M, N) leading singular triplets of `trained − base` (of `trained` alone
    without a base).

    Args:
        trained, base: [M, N], any floating dtype, on one device.
        seed: of the random start; it changes the result within the bound only. The global generator
            is not touched.

    Raises:
        ValueError: not matrices, of different shapes, or k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    delta = Blocks.of(trained, base)
    k = min(k, delta.shape[0])
    if delta.shape[0] <= max(DIRECT, 4 * (k + _OVERSAMPLE)):
        u, s, vt = torch.linalg.svd(delta.dense(), full_matrices=False)
        leading = _leading(u[:, :k], s[:k], vt[:k].T, float(s[k]) if k < len(s) else 0.0, s.new_zeros(k))
    else:
        leading = _polish(delta, _krylov(delta.scaled(torch.float32), k, seed), k)
    return _swap(leading) if delta.swapped else leading


def leading_of_factors(b_MR: Tensor, a_RN: Tensor, k: int = 20) -> Leading:
    """The same for B A given by its factors (a LoRA adapter), exact and without forming the
    product.

    With fewer than k nonzero values there are only as many directions as the rank R of the factors.
    """
    q_b, triangle_b = torch.linalg.qr(b_MR.to(torch.float64))
    q_a, triangle_a = torch.linalg.qr(a_RN.to(torch.float64).T)
    u, s, vt = torch.linalg.svd(triangle_b @ triangle_a.T, full_matrices=False)
    k = min(k, len(s))
    following = float(s[k]) if k < len(s) else 0.0
    return _leading(q_b @ u[:, :k], s[:k], q_a @ vt[:k].T, following, s.new_zeros(k))


def _krylov(a_MN: Tensor, k: int, seed: int) -> Tensor:
    """An orthonormal float64 basis [M, k + oversample] of approximate leading left directions.

    It stops early where the Krylov space is exhausted: then the space holds every direction with a
    nonzero singular value, and the basis is filled up with random directions.
    """
    rows, width = a_MN.shape[0], k + _OVERSAMPLE
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(a_MN.shape[1], width, generator=generator).to(a_MN.device)
    images = start.new_empty(rows, 0, dtype=torch.float64)
    basis = block = _orthonormal((a_MN @ start).double(), images)
    limit = min(rows, _LIMIT * k)
    while block.shape[1]:
        image = (a_MN @ (a_MN.T @ block.float())).double()
        images = torch.cat([images, image], dim=1)
        projected = basis.T @ images
        theta, ritz = torch.linalg.eigh((projected + projected.T) / 2)
        theta, ritz = theta.flip(0), ritz.flip(1)[:, :width]
        full = basis.shape[1] + width > limit
        if full or _converged(basis, images, theta, ritz, k):
            return basis @ ritz
        block = _orthonormal(image, basis)
        basis = torch.cat([basis, block], dim=1)
    leading = basis if not images.shape[1] else basis @ ritz
    filling = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(basis.device)
    return torch.cat([leading, _orthonormal(filling, leading)], dim=1)[:, :width]


def _orthonormal(image_MW: Tensor, basis_MB: Tensor) -> Tensor:
    """An orthonormal basis, at most W columns, of what `image` adds to `basis`; none where that is
    only rounding.

    A plain QR has no notion of rank: of columns that are zero it makes unit vectors inside `basis`.
    """
    rest = image_MW
    for _ in range(2):
        rest = rest - basis_MB @ (basis_MB.T @ rest)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    block = u[:, s > _EXHAUSTED * torch.linalg.vector_norm(image_MW)]
    return torch.linalg.qr(block - basis_MB @ (basis_MB.T @ block)).Q


def _converged(basis: Tensor, images: Tensor, theta: Tensor, ritz: Tensor, k: int) -> bool:
    """Whether residual / gap, both of ΔW ΔWᵀ, is below the target for each of the k leading
    subspaces.

    A gap too small for float32 products to resolve is not waited for.
    """
    if basis.shape[1] < 3 * ritz.shape[1]:
        return False
    residual = images @ ritz[:, :k] - (basis @ ritz[:, :k]) * theta[:k]
    error = residual.square().sum(0).cumsum(0).sqrt()
    gaps = theta[:k] - theta[1 : k + 1]
    floor = 4 * torch.finfo(torch.float32).eps * theta[0]
    return bool(((error <= _TARGET * gaps) | (error <= floor)).all())


def _polish(delta: Blocks, start_MW: Tensor, k: int) -> Leading:
    """Two float64 steps: Rayleigh–Ritz on [X, ΔW ΔWᵀ X], then the residual that proves the
    accuracy.
    """
    again = delta.times(delta.transposed_times(start_MW))
    scale = again.norm(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    basis = torch.linalg.qr(torch.cat([start_MW, again / scale], dim=1)).Q
    u, s, vt = torch.linalg.svd(delta.transposed_times(basis).T, full_matrices=False)
    u = basis @ u
    residual = delta.times(vt[:k].T) - u[:, :k] * s[:k]
    return _leading(u[:, :k], s[:k], vt[:k].T, float(s[k]), residual.square().sum(0).cumsum(0).sqrt())


def _leading(u: Tensor, s: Tensor, v: Tensor, following: float, residual_K: Tensor) -> Leading:
    """On the CPU, with the bound sin θ_k ≤ (‖residuals 1…k‖ + rounding) / (s_k − s_{k+1})."""
    s = s.cpu()
    gaps = s - torch.cat([s[1:], s.new_tensor([following])])
    rounding = 8 * torch.finfo(torch.float64).eps * (s[0] if len(s) else 0.0)
    sine = (residual_K.cpu() + rounding) / gaps.clamp(min=0.0)
    angle = torch.where(sine < 1.0, torch.asin(sine.clamp(max=1.0)), torch.full_like(sine, math.pi / 2))
    return Leading(u.cpu().contiguous(), s, v.cpu().contiguous(), following, angle)


def _swap(leading: Leading) -> Leading:
    return Leading(leading.v_NK, leading.s_K, leading.u_MK, leading.next_value, leading.angle_bound_K)
