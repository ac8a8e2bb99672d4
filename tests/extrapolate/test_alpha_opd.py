"""AlphaOPD's fit: against scikit-learn, on planted paths and on noise; the leading components it
reads.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import LinearRegression

from effopd.errors import ConfigError
from effopd.extrapolate.rank_one import RankOne, align_forward, leading
from effopd.extrapolate.strategies.alpha_opd import fit_pls, leave_one_out, predict, summary

ACCURACY = np.array([0.31, 0.35, 0.36, 0.44, 0.52, 0.51, 0.60, 0.66])


def points_of(x_TM, flips=()):
    """Leading components whose norm · u is the given path, in fp32 as in training; some with both
    signs flipped.
    """
    found = []
    for t, row in enumerate(torch.as_tensor(np.asarray(x_TM))):
        sign, norm = (-1.0 if t in flips else 1.0), float(row.norm())
        found.append(RankOne((sign * row / norm).float(), norm, torch.full((3,), sign * (t + 1)), norm))
    return found


def noise(m=300, seed=0):
    return np.random.default_rng(seed).normal(size=(len(ACCURACY), m))


def planted(m=40, seed=0):
    """x_0 + y_t·d, and the point at y = 1."""
    rng = np.random.default_rng(seed)
    start, direction = 5 + rng.random(m), rng.normal(size=m)
    return start + np.outer(ACCURACY, direction), start + direction


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [1, 5, 60])
def test_it_is_the_regression_of_the_authors_code(seed, m):
    rng = np.random.default_rng(seed)
    x_TM, y_T, goal = rng.normal(size=(7, m)) * rng.uniform(0.1, 10, m), rng.uniform(size=7), 1.3
    pls = PLSRegression(n_components=1).fit(x_TM, y_T)
    score_T1 = pls.transform(x_TM)
    line = LinearRegression().fit(score_T1, y_T)
    expected_M = pls.inverse_transform(np.array([[(goal - line.intercept_) / line.coef_[0]]]))[0]
    fit = fit_pls(x_TM, y_T)
    np.testing.assert_allclose(fit.invert(goal), expected_M, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose([fit.predict(x) for x in x_TM], pls.predict(x_TM).ravel(), rtol=1e-9, atol=1e-12)
    q2 = 1 - sum(
        (y_T[i] - PLSRegression(1).fit(np.delete(x_TM, i, 0), np.delete(y_T, i)).predict(x_TM[[i]]).item()) ** 2
        for i in range(7)
    ) / sum((y_T[i] - np.delete(y_T, i).mean()) ** 2 for i in range(7))
    assert leave_one_out(x_TM, y_T) == pytest.approx(q2, rel=1e-9, abs=1e-9)


def test_a_planted_path_is_followed_to_its_goal():
    x_TM, end_M = planted()
    fit = predict(points_of(x_TM), ACCURACY.tolist())
    np.testing.assert_allclose(fit.u_M.numpy(), end_M, rtol=1e-5)
    assert fit.u_M.dtype == torch.float32
    assert fit.q2 > 0.999 and fit.r2 > 0.999
    assert fit.q2_null < 0.2
    np.testing.assert_array_equal(fit.v_N, [8.0, 8.0, 8.0])


def test_noise_fits_in_sample_only():
    fits = [predict(points_of(noise(seed=seed)), ACCURACY.tolist()) for seed in range(10)]
    figures = summary({str(i): fit for i, fit in enumerate(fits)})
    assert figures["r2"] > 0.9
    assert figures["q2"] < 0.4 and abs(figures["q2"] - figures["q2_null"]) < 0.4


def test_stored_signs_do_not_matter():
    x_TM, _ = planted()
    plain = predict(points_of(x_TM), ACCURACY.tolist())
    flipped = predict(points_of(x_TM, flips=(1, 4, 5)), ACCURACY.tolist())
    torch.testing.assert_close(flipped.u_M, plain.u_M)
    np.testing.assert_array_equal(flipped.v_N, plain.v_N)
    assert (flipped.r2, flipped.q2, flipped.q2_null) == pytest.approx((plain.r2, plain.q2, plain.q2_null))
    mirrored = predict(points_of(x_TM, flips=range(8)), ACCURACY.tolist())  # u and v both turn: the same update
    torch.testing.assert_close(torch.outer(mirrored.u_M, mirrored.v_N), torch.outer(plain.u_M, plain.v_N))


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.3, 0.74 / 0.86])
def test_equal_accuracies_predict_nothing(accuracy, steps):
    """Their mean differs from them by rounding, which must not pass for a trend."""
    assert predict(points_of(noise(20)[:steps]), [accuracy] * steps) is None


def test_nothing_to_fit():
    still = [RankOne(torch.zeros(5), 0.0, torch.zeros(3), 0.0)] * 4
    assert predict(still, [0.1, 0.2, 0.3, 0.4]) is None
    assert predict(points_of(noise(5)[:4]), [0.1, math.nan, 0.3, 0.4]) is None
    same = np.tile(noise(5)[:1] * 0.1, (7, 1))
    assert fit_pls(same, ACCURACY[:7]) is None
    x_TM, end_M = planted()
    fit = fit_pls(np.hstack([x_TM, np.full((8, 1), 0.1)]), ACCURACY)  # a row of the matrix that never changes
    np.testing.assert_allclose(fit.invert(1.0), [*end_M, 0.1], rtol=1e-9)


def test_one_accuracy_unlike_the_others_keeps_q2_sane():
    x_TM = noise(50)
    assert leave_one_out(x_TM, np.array([0.3] * 7 + [0.5])) > -1  # leaving the odd one out leaves equal values


@pytest.mark.parametrize("points, accuracies", [(3, 3), (5, 4)])
def test_too_few_observations(points, accuracies):
    with pytest.raises(ConfigError, match="at least 4"):
        predict(points_of(noise(5)[:points]), [0.1 * i for i in range(accuracies)])


def test_the_shuffled_null_is_seeded():
    path = points_of(noise(20))
    first, again, other = (predict(path, ACCURACY.tolist(), permutations=3, seed=seed) for seed in (0, 0, 1))
    assert first.q2_null == again.q2_null != other.q2_null
    assert math.isnan(predict(path, ACCURACY.tolist(), permutations=0).q2_null)


def test_summary_counts_what_was_fitted():
    fit = predict(points_of(noise()), ACCURACY.tolist())
    assert summary({"a": fit, "b": None}) == {
        "fitted_share": 0.5, "r2": fit.r2, "q2": fit.q2, "q2_null": fit.q2_null
    }  # fmt: skip
    assert math.isnan(summary({"a": None})["q2"]) and summary({})["fitted_share"] == 0.0


@pytest.mark.parametrize("shape", [(30, 20), (20, 300), (17,), (6, 4, 5), ()])
def test_leading_component_of_any_parameter(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = delta.reshape(-1, 1) if delta.ndim < 2 else delta.flatten(1)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = leading(delta)
    torch.testing.assert_close(
        found.s1 * torch.outer(found.u_M, found.v_N).double(), s[0] * torch.outer(u[:, 0], vt[0]), rtol=1e-5, atol=1e-5
    )
    assert (found.s1, found.norm) == pytest.approx((float(s[0]), float(matrix.norm())), rel=1e-6)
    assert found.u_M.dtype == found.v_N.dtype == torch.float32


def test_leading_component_of_no_movement():
    found = leading(torch.zeros(4, 3, dtype=torch.bfloat16))
    assert (found.s1, found.norm) == (0.0, 0.0)
    assert torch.equal(found.u_M, torch.zeros(4)) and torch.equal(found.v_N, torch.zeros(3))


def test_signs_follow_the_past():
    """A direction that turns by 100° in 50° steps: aligning to the end would flip the beginning."""
    angles = [0.0, 50.0, 100.0]
    turning = [
        RankOne(torch.tensor([math.cos(math.radians(a)), math.sin(math.radians(a))]), 1.0, torch.ones(2), 1.0)
        for a in angles
    ]
    flipped = [RankOne(sign * p.u_M, p.s1, sign * p.v_N, p.norm) for p, sign in zip(turning, (1, -1, 1), strict=True)]
    for before, after in zip(turning, align_forward(flipped), strict=True):
        assert torch.equal(before.u_M, after.u_M) and torch.equal(before.v_N, after.v_N)
    first_down = [RankOne(-p.u_M, p.s1, -p.v_N, p.norm) for p in turning[:1]] + turning[1:]
    aligned = align_forward(first_down)
    assert torch.equal(aligned[0].u_M, -turning[0].u_M)  # the first is left as it is, the others follow
    assert torch.equal(aligned[2].u_M, -turning[2].u_M)
