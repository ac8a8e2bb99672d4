"""RELEX's fit: exact on straight lines, equal to a dense SVD, and it filters noise."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

from effopd.errors import ConfigError
from effopd.extrapolate.strategies.relex import predict, summary

STEPS = [2, 4, 6, 8, 12, 16]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (11,), (3, 4, 5)])
@pytest.mark.parametrize("slope, intercept", [(0.3, 0.0), (-0.02, 1.5)])
def test_a_straight_line_is_continued(shape, slope, intercept):
    direction = randn(*shape)
    fit = predict([(slope * t + intercept) * direction for t in STEPS], STEPS, 96)
    torch.testing.assert_close(fit.delta, (slope * 96 + intercept) * direction, rtol=1e-4, atol=1e-5)
    length = float(direction.norm())
    assert (abs(fit.slope), abs(fit.intercept)) == pytest.approx((abs(slope) * length, intercept * length), abs=1e-5)
    assert (fit.explained, fit.r2, fit.q2) == pytest.approx((1, 1, 1), abs=1e-6)
    assert fit.delta.shape == shape and fit.delta.dtype == torch.float32


def test_it_equals_a_dense_decomposition():
    moves, t = [randn(9, 8, seed=i) * (1 + i) for i in range(6)], np.array(STEPS, dtype=float)
    stacked = np.stack([move.double().numpy().ravel() for move in moves])
    _, values, vt = np.linalg.svd(stacked, full_matrices=False)
    c = stacked @ vt[0]
    line = np.polyfit(t, c, 1)
    fit = predict(moves, STEPS, 40)
    expected = (line[0] * 40 + line[1]) * vt[0].reshape(9, 8)
    np.testing.assert_allclose(fit.delta.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert fit.explained == pytest.approx(values[0] ** 2 / (values**2).sum())
    assert fit.r2 == pytest.approx(np.corrcoef(t, c)[0, 1] ** 2)
    missed, spread = 0.0, 0.0
    for i in range(6):
        rest = np.delete(np.arange(6), i)
        missed += (c[i] - np.polyval(np.polyfit(t[rest], c[rest], 1), t[i])) ** 2
        spread += (c[i] - c[rest].mean()) ** 2
    assert fit.q2 == pytest.approx(1 - missed / spread)


def test_a_mirrored_path_is_mirrored():
    moves = [randn(6, 4, seed=i) + t * randn(6, 4, seed=99) for i, t in enumerate(STEPS)]
    plain, mirrored = predict(moves, STEPS, 30), predict([-move for move in moves], STEPS, 30)
    torch.testing.assert_close(mirrored.delta, -plain.delta)
    assert astuple(mirrored)[3:] == pytest.approx(astuple(plain)[3:])


def test_noise_is_filtered():
    """Linear growth plus noise of every step's own: closer to the truth than going on along the
    last displacement.
    """
    direction = randn(40, 30)
    moves = [0.1 * t * direction + 0.8 * randn(40, 30, seed=t) for t in STEPS]
    truth = 0.1 * 96 * direction
    error = torch.dist(predict(moves, STEPS, 96).delta, truth)
    assert error < 0.8 * torch.dist(moves[-1] * 96 / STEPS[-1], truth)


def test_displacements_longer_than_a_strip(monkeypatch):
    from effopd.extrapolate.strategies import relex

    moves = [randn(50, seed=i) for i in range(4)]
    whole = predict(moves, STEPS[:4], 20)
    dot = relex._dot
    monkeypatch.setattr(relex, "_dot", lambda a, b: dot(a, b, chunk=7))
    torch.testing.assert_close(predict(moves, STEPS[:4], 20).delta, whole.delta)


def test_nothing_moved():
    assert predict([torch.zeros(3, 2)] * 3, [1, 2, 3], 10) is None


@pytest.mark.parametrize("displacements, steps", [(2, 2), (4, 3)])
def test_too_few_steps(displacements, steps):
    with pytest.raises(ConfigError, match="at least 3"):
        predict([torch.ones(2)] * displacements, list(range(steps)), 10)


def test_summary_counts_what_was_fitted_and_leaves_out_what_is_undefined():
    moving = predict([randn(8, seed=i) for i in range(4)], STEPS[:4], 20)
    jumped_once = predict([torch.tensor([0.1, 0.3])] * 7, range(2, 9), 20)  # nothing for a line to explain
    assert math.isnan(jumped_once.r2) and math.isnan(jumped_once.q2)
    torch.testing.assert_close(jumped_once.delta, torch.tensor([0.1, 0.3]))
    for fits in ([moving, None, jumped_once, moving], [jumped_once, moving, moving, None]):
        figures = summary(dict(zip("abcd", fits, strict=True)))
        assert figures["fitted_share"] == 0.75 and (figures["r2"], figures["q2"]) == (moving.r2, moving.q2)
    assert math.isnan(summary({"b": None})["q2"])
