r"""The K leading singular directions of an update, with an error bound on their angles.

Block Lanczos with full reorthogonalization on ΔW ΔWᵀ of the shorter side. The products with ΔW,
nearly all of the cost, run in float32, the rest in float64. Two float64 steps at the end refine the
result.

It stops when the residuals prove the accuracy. Randomized SVD (`torch.svd_lowrank`) takes a fixed
number of steps instead, and its vectors are wrong without notice if the spectrum decays slowly. If
two singular values nearly coincide, no method can separate their vectors, and the bound is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effopd.weights.blocks import Blocks
from effopd.weights.spectrum import DIRECT

#: Target angle of every leading subspace before the float64 steps, in radians.
_TARGET = 2e-5
#: Maximum size of the Krylov basis, in vectors per requested direction.
_LIMIT = 40
#: Vectors per block in addition to K.
_OVERSAMPLE = 6
#: A block's new directions below this share of its norm are float64 rounding errors.
_EXHAUSTED = 1e-10


@dataclass(frozen=True)
class Leading:
    """ΔW ≈ Σ_k s_k u_k v_kᵀ.

    Attributes:
        u_MK, s_K, v_NK: float64, on the CPU; columns orthonormal, values descending. u_k and v_k
            have an arbitrary joint sign; directions of zero singular values are arbitrary.
        next_value: s_{K+1}; 0 if there is none.
        angle_bound_K: for each k, Wedin's bound in radians on the largest principal angle between
            computed and true leading-k subspaces, left and right; π/2: no bound.
    """

    u_MK: Tensor
    s_K: Tensor
    v_NK: Tensor
    next_value: float
    angle_bound_K: Tensor


def leading_directions(trained: Tensor, base: Tensor | None = None, k: int = 20, seed: int = 0) -> Leading:
    """The K = min(k, M, N) leading singular triplets of `trained − base`.

    Args:
        trained, base: [M, N], any floating dtype, on one device. `base=None`: of `trained` alone.
        k: number of triplets.
        seed: seed of the random start; it changes the result only within the bound. The global
            generator is not used.

    Raises:
        ValueError: not matrices, different shapes, or k < 1.
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
    """Leading singular triplets of B A from its factors, without forming the product.

    There are at most R triplets. The angle bound contains only rounding errors.
    """
    q_b, triangle_b = torch.linalg.qr(b_MR.to(torch.float64))
    q_a, triangle_a = torch.linalg.qr(a_RN.to(torch.float64).T)
    u, s, vt = torch.linalg.svd(triangle_b @ triangle_a.T, full_matrices=False)
    k = min(k, len(s))
    following = float(s[k]) if k < len(s) else 0.0
    return _leading(q_b @ u[:, :k], s[:k], q_a @ vt[:k].T, following, s.new_zeros(k))


def _krylov(a_MN: Tensor, k: int, seed: int) -> Tensor:
    """Orthonormal float64 basis [M, k + oversample] of approximate leading left directions.

    If the Krylov space is exhausted early, it contains every direction with a nonzero singular
    value, and random directions fill up the basis.
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
    """Orthonormal basis (≤ W columns) of the part of `image` outside `basis`, without rounding.

    A plain QR does not detect rank: it turns zero columns into unit vectors inside `basis`.
    """
    rest = image_MW
    for _ in range(2):
        rest = rest - basis_MB @ (basis_MB.T @ rest)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    block = u[:, s > _EXHAUSTED * torch.linalg.vector_norm(image_MW)]
    return torch.linalg.qr(block - basis_MB @ (basis_MB.T @ block)).Q


def _converged(basis: Tensor, images: Tensor, theta: Tensor, ritz: Tensor, k: int) -> bool:
    """Whether residual / gap of ΔW ΔWᵀ is below the target for each of the k leading subspaces.

    Subspaces whose residual has reached float32 precision also count as converged.
    """
    if basis.shape[1] < 3 * ritz.shape[1]:
        return False
    residual = images @ ritz[:, :k] - (basis @ ritz[:, :k]) * theta[:k]
    error = residual.square().sum(0).cumsum(0).sqrt()
    gaps = theta[:k] - theta[1 : k + 1]
    floor = 4 * torch.finfo(torch.float32).eps * theta[0]
    return bool(((error <= _TARGET * gaps) | (error <= floor)).all())


def _polish(delta: Blocks, start_MW: Tensor, k: int) -> Leading:
    """Two float64 steps: Rayleigh–Ritz on [X, ΔW ΔWᵀ X], then the residuals for the bound."""
    again = delta.times(delta.transposed_times(start_MW))
    scale = again.norm(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    basis = torch.linalg.qr(torch.cat([start_MW, again / scale], dim=1)).Q
    u, s, vt = torch.linalg.svd(delta.transposed_times(basis).T, full_matrices=False)
    u = basis @ u
    residual = delta.times(vt[:k].T) - u[:, :k] * s[:k]
    return _leading(u[:, :k], s[:k], vt[:k].T, float(s[k]), residual.square().sum(0).cumsum(0).sqrt())


def _leading(u: Tensor, s: Tensor, v: Tensor, following: float, residual_K: Tensor) -> Leading:
    """`Leading` with the bound sin θ_k ≤ (‖residuals 1…k‖ + rounding) / (s_k − s_{k+1})."""
    s = s.cpu()
    gaps = s - torch.cat([s[1:], s.new_tensor([following])])
    rounding = 8 * torch.finfo(torch.float64).eps * (s[0] if len(s) else 0.0)
    sine = (residual_K.cpu() + rounding) / gaps.clamp(min=0.0)
    angle = torch.where(sine < 1.0, torch.asin(sine.clamp(max=1.0)), torch.full_like(sine, math.pi / 2))
    return Leading(u.cpu().contiguous(), s, v.cpu().contiguous(), following, angle)


def _swap(leading: Leading) -> Leading:
    return Leading(leading.v_NK, leading.s_K, leading.u_MK, leading.next_value, leading.angle_bound_K)
