"""Embedding shift: rows that stay are exactly 1, padding does not break it, the picture shows a
shift.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from effopd.analysis import embeddings
from effopd.analysis.embeddings import embedding_metrics, embedding_plane, row_cosines
from effopd.errors import WeightsError


def pair(rows: int = 50, width: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator)
    return base.to(dtype), (base + 0.1 * torch.randn(rows, width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cosines_equal_numpy(dtype, monkeypatch):
    base, trained = pair(dtype=dtype)
    b, w = base.double().numpy(), trained.double().numpy()
    reference = (b * w).sum(1) / np.linalg.norm(b, axis=1) / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(row_cosines(base, trained), reference, rtol=1e-12)
    whole = embedding_metrics(base, trained)
    monkeypatch.setattr(embeddings, "_BLOCK", 30)
    np.testing.assert_allclose(row_cosines(base, trained), reference, rtol=1e-12)
    assert embedding_metrics(base, trained) == pytest.approx(whole, rel=1e-14)
    assert whole["row_cosine_mean"] == pytest.approx(reference.mean())
    assert whole["row_cosine_min"] == pytest.approx(reference.min())


def test_unmoved_rows_are_exactly_one():
    base, _ = pair(300, 33)
    assert torch.equal(row_cosines(base, base.clone()), torch.ones(300).double())
    assert embedding_metrics(base, base) == {"row_cosine_mean": 1.0, "row_cosine_min": 1.0, "rows_moved_share": 0.0}
    moved = base.clone()
    moved[7, 3] *= 1.5
    metrics = embedding_metrics(base, moved)
    assert metrics["rows_moved_share"] == 1 / 300
    assert metrics["row_cosine_min"] < 1 and metrics["row_cosine_mean"] < 1


def test_zero_rows_give_no_nan():
    base = torch.tensor([[0.0, 0.0], [0.0, -0.0], [1.0, 2.0], [1e-30, 0.0], [3.0, 4.0]])
    trained = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1e-30, 0.0], [-3.0, -4.0]])
    assert row_cosines(base, trained).tolist() == [1.0, 0.0, 0.0, 1.0, -1.0]
    assert embedding_metrics(-base.abs() * 0, base * 0)["rows_moved_share"] == 0.0
    assert all(math.isnan(value) for value in embedding_metrics(base[:0], base[:0]).values())


def test_plane_is_a_joint_pca():
    base, trained = pair(40, 12)
    picture = embedding_plane(base, trained, rows=100)
    assert picture.shape == (2, 40, 2) and picture.dtype == torch.float64
    reference = PCA(2, svd_solver="full").fit_transform(torch.cat([base, trained]).double().numpy())
    np.testing.assert_allclose(picture.reshape(-1, 2), reference, atol=1e-8)


def test_plane_draws_the_same_rows_of_both_sides_and_shows_a_shift():
    base, _ = pair(100, 12, torch.float64)
    picture = embedding_plane(base, base + 20.0, rows=30)
    assert picture.shape == (2, 30, 2)
    shift = picture[1] - picture[0]
    torch.testing.assert_close(shift, shift[:1].expand(30, 2))
    assert float(shift[0, 0].abs()) > 60
    assert torch.equal(picture, embedding_plane(base, base + 20.0, rows=30))
    torch.testing.assert_close(*embedding_plane(base, base), rtol=0, atol=1e-12)


def test_plane_of_next_to_nothing():
    assert embedding_plane(torch.ones(3, 4), torch.ones(3, 4)).tolist() == torch.zeros(2, 3, 2).tolist()
    assert embedding_plane(torch.ones(0, 4), torch.ones(0, 4)).shape == (2, 0, 2)
    found = embedding_plane(torch.zeros(1, 1), torch.ones(1, 1))
    np.testing.assert_allclose(found, [[[-0.5, 0.0]], [[0.5, 0.0]]], atol=1e-12)


def test_bad_input_is_refused():
    for measure in (row_cosines, embedding_metrics, embedding_plane):
        with pytest.raises(WeightsError, match="vocabulary"):
            measure(torch.ones(3, 4), torch.ones(4, 4))
