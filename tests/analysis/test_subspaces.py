"""Subspace similarities: equal to scipy and to their definitions, blind to signs, right by
chance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from effopd.analysis.subspaces import (
    chance_overlap,
    counterpart_cosines,
    principal_angles,
    projector_overlaps,
    spectral_shift,
)
from effopd.errors import WeightsError


def orthonormal(m: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q


def rotated(u_MK: torch.Tensor, angles: list[float], seed: int = 9) -> torch.Tensor:
    """A subspace at known principal angles (radians) to span(u), in a random basis of its own."""
    m, k = u_MK.shape
    other = orthonormal(m, k, seed)
    other = torch.linalg.qr(other - u_MK @ (u_MK.T @ other)).Q
    theta = torch.tensor(angles, dtype=torch.float64)
    return (u_MK * theta.cos() + other * theta.sin()) @ orthonormal(k, k, seed + 1)


def scipy_degrees(u: torch.Tensor, w: torch.Tensor) -> np.ndarray:
    return np.degrees(scipy.linalg.subspace_angles(u.numpy(), w.numpy()))[::-1]


@pytest.mark.parametrize(("m", "k", "other"), [(50, 5, 5), (50, 3, 7), (50, 7, 3), (6, 4, 5), (8, 8, 8), (300, 1, 1)])
def test_angles_equal_scipy(m, k, other):
    u, w = orthonormal(m, k, 0), orthonormal(m, other, 1)
    np.testing.assert_allclose(principal_angles(u, w), scipy_degrees(u, w), atol=1e-8)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-5, 0.01, math.pi / 4, 1.5, math.pi / 2 - 1e-9])
def test_small_and_large_angles_are_accurate_alike(angle):
    u = orthonormal(200, 4, 0)
    w = rotated(u, [angle] * 4)
    found = principal_angles(u, w)
    np.testing.assert_allclose(found, scipy_degrees(u, w), atol=1e-8)
    np.testing.assert_allclose(found, [math.degrees(angle)] * 4, rtol=1e-6, atol=1e-12)


def test_mixed_angles_come_ascending():
    angles = [1e-10, 1e-4, 0.5, 1.0, 1.57]
    found = principal_angles(orthonormal(100, 5, 3), rotated(orthonormal(100, 5, 3), angles))
    np.testing.assert_allclose(found, np.degrees(angles), rtol=1e-6, atol=1e-12)
    assert bool((found.diff() >= 0).all())


def test_a_subspace_is_at_no_angle_to_itself_or_to_one_that_contains_it():
    u = orthonormal(60, 8, 0)
    for other in (u, u[:, :3], u @ orthonormal(8, 8, 1)):
        assert float(principal_angles(u, other).max()) < 1e-12
    assert torch.equal(counterpart_cosines(u, -u), torch.ones(8).double().minimum(counterpart_cosines(u, u)))


def test_overlaps_equal_the_definition():
    u, w = orthonormal(40, 6, 0), orthonormal(40, 6, 1)
    naive = [float((u[:, :k].T @ w[:, :k]).square().sum()) / k for k in range(1, 7)]
    np.testing.assert_allclose(projector_overlaps(u, w), naive, rtol=1e-12)
    np.testing.assert_allclose(counterpart_cosines(u, w), np.abs(np.diag(u.numpy().T @ w.numpy())), rtol=1e-12)
    cosines = np.cos(np.radians(principal_angles(u, w).numpy()))
    np.testing.assert_allclose(float(projector_overlaps(u, w)[-1]), np.mean(cosines**2), rtol=1e-10)


def test_signs_never_matter_and_rotations_inside_only_to_counterparts():
    u, w = orthonormal(40, 6, 0), orthonormal(40, 6, 1)
    signs = torch.tensor([1, -1, -1, 1, -1, 1]).double()
    for measure in (counterpart_cosines, projector_overlaps, principal_angles):
        torch.testing.assert_close(measure(u * signs, w), measure(u, w), rtol=1e-12, atol=1e-10)
    turned = u @ orthonormal(6, 6, 2)
    assert float(projector_overlaps(u, turned)[-1]) == pytest.approx(1.0, abs=1e-12)
    assert float(counterpart_cosines(u, turned).min()) < 0.9


def test_different_k_uses_the_common_leading_directions():
    u, w = orthonormal(40, 6, 0), orthonormal(40, 4, 1)
    torch.testing.assert_close(projector_overlaps(u, w), projector_overlaps(u[:, :4], w))
    torch.testing.assert_close(counterpart_cosines(w, u), counterpart_cosines(w, u[:, :4]))


def test_random_subspaces_overlap_by_chance():
    pairs = [(orthonormal(30, 5, 2 * i), orthonormal(30, 5, 2 * i + 1)) for i in range(300)]
    mean = torch.stack([projector_overlaps(u, w) for u, w in pairs]).mean(0)
    np.testing.assert_allclose(mean, [chance_overlap(k, 30) for k in range(1, 6)], rtol=0.12)


def test_spectral_shift_is_blind_to_rotations_and_bounded_by_the_update():
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).double()
    svd = torch.linalg.svdvals
    turned = orthonormal(20, 20, 1) @ base
    assert spectral_shift(svd(base), svd(base)) == 0.0
    assert spectral_shift(svd(turned), svd(base)) < 1e-14
    left, left_turned = torch.linalg.svd(base).U[:, :3], torch.linalg.svd(turned).U[:, :3]
    assert float(principal_angles(left, left_turned).max()) > 10
    moved = base + 0.1 * torch.randn(20, 30, generator=torch.Generator().manual_seed(2)).double()
    assert 0 < spectral_shift(svd(moved), svd(base)) <= float((moved - base).norm() / base.norm())
    assert spectral_shift(2 * svd(base), svd(base)) == pytest.approx(1.0)
    assert math.isnan(spectral_shift(svd(base), torch.zeros(20)))


def test_bad_input_is_refused():
    u = orthonormal(10, 2, 0)
    for measure in (counterpart_cosines, projector_overlaps, principal_angles):
        with pytest.raises(WeightsError, match=r"\(10, 2\) and \(11, 2\)"):
            measure(u, orthonormal(11, 2, 0))
    with pytest.raises(WeightsError, match="same length"):
        spectral_shift(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="k=5, m=4"):
        chance_overlap(5, 4)
