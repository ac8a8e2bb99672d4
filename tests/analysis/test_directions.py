"""Trajectories of one direction: signs forward in time, planarity against an exact null, pictures
that keep still.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA

from effopd.analysis.directions import align_signs, explained_variance, plane, random_walk_null, tsne
from effopd.errors import WeightsError


def unit_points(t: int, m: int, seed: int = 0, step: float = 0.3) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.standard_normal((t, m)) * step / math.sqrt(m), axis=0) + np.eye(m)[0]
    return torch.from_numpy(walk / np.linalg.norm(walk, axis=1, keepdims=True))


def test_aligned_signs_follow_the_path_and_never_change_the_past():
    path = unit_points(12, 30)
    signs = torch.tensor([1, -1, -1, 1, 1, -1, 1, -1, -1, -1, 1, -1]).double()
    aligned = align_signs(path * signs[:, None])
    torch.testing.assert_close(aligned, path)
    assert bool(((aligned[1:] * aligned[:-1]).sum(1) >= 0).all())
    torch.testing.assert_close(align_signs((path * signs[:, None])[:5]), aligned[:5])
    torch.testing.assert_close(align_signs(-path), -path)
    assert align_signs(path[:1]).shape == (1, 30) and align_signs(path[:0]).shape == (0, 30)
    orthogonal = torch.eye(3)
    torch.testing.assert_close(align_signs(orthogonal), orthogonal.double())


@pytest.mark.parametrize(("t", "m"), [(10, 40), (40, 10), (3, 5)])
def test_explained_variance_equals_scikit_learn(t, m):
    points = unit_points(t, m)
    reference = PCA(min(t, m)).fit(points.numpy()).explained_variance_ratio_[:2].sum()
    assert explained_variance(points) == pytest.approx(reference, rel=1e-10)


def test_explained_variance_at_its_ends():
    angle = torch.linspace(0, 2, 9).double()
    circle = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], dim=1)
    assert explained_variance(circle) == pytest.approx(1.0)
    assert explained_variance(torch.eye(8)) == pytest.approx(2 / 7)
    two_places = torch.eye(4)[[0, 1, 0, 1, 1]]
    for points in (torch.eye(4)[:2], two_places, torch.ones(5, 4), torch.ones(0, 4)):
        assert math.isnan(explained_variance(points))
        assert bool(random_walk_null(points, draws=3).isnan().all())


def test_plane_is_pca_and_the_same_for_both_signs():
    points = unit_points(15, 60)
    found = plane(points)
    reference = PCA(2).fit_transform(points.numpy())
    np.testing.assert_allclose(found.abs(), np.abs(reference), atol=1e-10)
    torch.testing.assert_close(plane(-points), found)
    assert found[-1, 0] >= found[0, 0] and found[-1, 1] + found[0, 1] <= 0
    assert torch.equal(plane(points), found)
    # wide and tall inputs take different routes
    padded = torch.cat([points[:, :10], torch.zeros(15, 10).double()], dim=1)
    torch.testing.assert_close(plane(padded), plane(points[:, :10]), atol=1e-10, rtol=0)


def test_plane_of_next_to_nothing():
    assert plane(torch.ones(1, 4)).tolist() == [[0.0, 0.0]]
    assert plane(torch.ones(3, 4)).tolist() == [[0.0, 0.0]] * 3
    two = plane(torch.eye(4)[:2])
    assert float((two[0] - two[1]).norm()) == pytest.approx(math.sqrt(2))
    found = plane(torch.tensor([[0.0], [2.0], [1.0]]))
    np.testing.assert_allclose(found, [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], atol=1e-12)


def simulated_null(points: torch.Tensor, draws: int, seed: int) -> np.ndarray:
    """The definition, step by step in R^M."""
    rng = np.random.default_rng(seed)
    lengths = np.linalg.norm(np.diff(points.numpy(), axis=0), axis=1)
    out = []
    for _ in range(draws):
        steps = rng.standard_normal((len(lengths), points.shape[1]))
        steps *= lengths[:, None] / np.linalg.norm(steps, axis=1, keepdims=True)
        out.append(explained_variance(torch.from_numpy(np.vstack([0 * steps[:1], steps.cumsum(0)]))))
    return np.array(out)


@pytest.mark.parametrize(("t", "m"), [(8, 40), (8, 7), (8, 3), (20, 6), (5, 2), (4, 500)])
def test_null_has_the_distribution_of_simulated_walks(t, m):
    points = unit_points(t, m, seed=m)
    points[2] = points[1]  # a step of length 0
    drawn, simulated = random_walk_null(points, draws=1500).numpy(), simulated_null(points, 1500, seed=1)
    drawn, simulated = drawn.round(9), simulated.round(9)  # (4, 500): two steps, always 1 up to rounding
    assert stats.ks_2samp(drawn, simulated).pvalue > 0.01
    assert drawn.mean() == pytest.approx(simulated.mean(), abs=0.01)


@pytest.mark.slow
def test_null_is_high_by_construction_and_deterministic():
    steps = torch.ones(100, 1).double() * 0.01
    path = torch.cat([steps.cumsum(0), torch.zeros(100, 4000)], dim=1)  # only step lengths and M matter
    null = random_walk_null(path)
    assert null.shape == (200,)
    assert float(null.mean()) == pytest.approx(1.25 * 6 / math.pi**2, abs=0.01)
    assert torch.equal(null, random_walk_null(path))
    assert not torch.equal(null, random_walk_null(path, seed=1))
    assert float(random_walk_null(unit_points(9, 2)).min()) == pytest.approx(1.0)


def test_tsne_keeps_groups_apart_and_is_deterministic():
    rng = np.random.default_rng(0)
    centers = np.repeat(np.eye(50)[:2], 10, axis=0)
    points = torch.from_numpy(centers + 0.01 * rng.standard_normal((20, 50)))
    picture = tsne(points)
    assert picture.shape == (20, 2) and picture.dtype == torch.float64
    assert torch.equal(picture, tsne(points))
    distances = torch.cdist(picture, picture)
    assert float(distances[:10, :10].max()) < float(distances[:10, 10:].min())
    assert tsne(unit_points(4, 9)).isfinite().all()
    assert tsne(torch.ones(5, 3)).tolist() == [[0.0, 0.0]] * 5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 4 points, got 3"):
        tsne(unit_points(3, 9))
    for measure in (align_signs, explained_variance, plane, random_walk_null, tsne):
        with pytest.raises(WeightsError, match=r"\[T, M\]"):
            measure(torch.ones(5))
