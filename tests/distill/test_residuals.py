"""Cross-fitted bias of stored answers: what it removes, what it leaves, and what it depends on."""

from __future__ import annotations

import numpy as np
import pytest

from effopd.distill.offline_store import StoredRollout
from effopd.distill.residuals import (
    BINS,
    FOLDS,
    SHRINKAGE,
    cross_fitted_bias,
    folds_of,
    position_bins,
    quantiles,
    residualized,
    shrunk_means,
)

KINDS, LENGTH = 7, 10  # coprime with the folds: every fold has every token at every place equally often
ANSWERS = FOLDS * KINDS


def latin(copies=1):
    """Tokens [N], lengths [R] and folds [R] of answers with all tokens alike at all places."""
    token_N = np.concatenate([(answer + np.arange(LENGTH)) % KINDS for answer in range(ANSWERS)] * copies)
    return token_N, np.full(ANSWERS * copies, LENGTH), np.tile(folds_of(ANSWERS), copies)


def noisy(answers=23, seed=0):
    """Tokens, d, surprisals and lengths of answers of different lengths."""
    g = np.random.default_rng(seed)
    length_R = g.integers(1, 30, answers)
    tokens = int(length_R.sum())
    return g.integers(0, 12, tokens), g.normal(size=tokens), g.exponential(size=tokens), length_R


# -- what is removed -------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.0, SHRINKAGE])
def test_a_bias_by_token_is_halved_around_its_mean(shrinkage):
    """The table of tokens has m + ρ (c − m), ρ = W / (W + κ); that of places has m."""
    token_N, length_R, fold_R = latin()
    bias_K = np.linspace(-2, 3, KINDS) ** 2
    d_N = bias_K[token_N]
    b_N = cross_fitted_bias(token_N, d_N, np.ones(len(d_N)), length_R, fold_R, shrinkage)
    answers = ANSWERS * (FOLDS - 1) / FOLDS
    rho = (answers / KINDS) / (answers / KINDS + shrinkage / LENGTH)
    np.testing.assert_allclose(d_N - b_N, (1 - rho / 2) * (d_N - bias_K.mean()), atol=1e-12)
    if not shrinkage:
        np.testing.assert_allclose(d_N - b_N, (d_N - bias_K.mean()) / 2, atol=1e-12)


def test_a_bias_that_both_tables_see_is_removed():
    g = np.random.default_rng(0)
    d_N = np.tile(g.normal(size=LENGTH), ANSWERS)  # of the place, which the token marks
    token_N, length_R = np.tile(np.arange(LENGTH), ANSWERS), np.full(ANSWERS, LENGTH)
    surprisal_N = np.ones(len(d_N))
    np.testing.assert_allclose(cross_fitted_bias(token_N, d_N, surprisal_N, length_R, shrinkage=0.0), d_N, atol=1e-12)
    token_N, _, surprisal_N, length_R = noisy()
    equal_N = np.full(len(token_N), -0.7)
    np.testing.assert_allclose(cross_fitted_bias(token_N, equal_N, surprisal_N, length_R), equal_N, atol=1e-12)


def test_a_bias_by_surprisal_is_halved():
    """Two levels of surprisal that tokens and places share equally."""
    token_N, length_R, fold_R = latin(copies=2)
    high_N = np.repeat(np.arange(2), ANSWERS * LENGTH)
    d_N = np.where(high_N, 1.5, -0.5)
    b_N = cross_fitted_bias(token_N, d_N, np.where(high_N, 4.0, 0.1), length_R, fold_R, 0.0)
    np.testing.assert_allclose(d_N - b_N, (d_N - 0.5) / 2, atol=1e-12)


def test_a_signal_of_the_context_survives():
    """A sign that is equally often + and − for every token and at every place."""
    token_N, length_R, fold_R = latin(copies=2)
    d_N = np.repeat([1.0, -1.0], ANSWERS * LENGTH)
    b_N = cross_fitted_bias(token_N, d_N, np.ones(len(d_N)), length_R, fold_R)
    np.testing.assert_allclose(b_N, 0, atol=1e-12)


# -- what it depends on ----------------------------------------------------------------------------


def test_an_answer_does_not_influence_its_own_bias():
    token_N, d_N, surprisal_N, length_R = noisy()
    fold_N = np.repeat(folds_of(len(length_R)), length_R)
    own_N = np.repeat(np.arange(len(length_R)), length_R) == 3
    before = cross_fitted_bias(token_N, d_N, surprisal_N, length_R)
    after = cross_fitted_bias(token_N, d_N + 100 * own_N, surprisal_N, length_R)
    assert np.array_equal(before[fold_N == 3], after[fold_N == 3])
    assert (before[fold_N != 3] != after[fold_N != 3]).all()


def test_answers_weigh_the_same():
    length_R, fold_R = np.array([1, 10, 200]), np.array([0, 1, 1])
    token_N = np.repeat([5, 1, 2], length_R)  # the first answer's token is in no table
    d_N = np.repeat([9.0, 0.0, 1.0], length_R)
    b_N = cross_fitted_bias(token_N, d_N, np.ones(len(d_N)), length_R, fold_R, 0.0)
    assert b_N[0] == pytest.approx(0.5)
    token_N, d_N, surprisal_N, length_R = noisy()
    longer = np.where(np.arange(len(length_R)) == 3, 4, 1)  # 4 copies of every token of one answer, whose
    length_R[3] = BINS  # places stay in their bins
    tokens = int(length_R.sum())
    token_N, d_N, surprisal_N = (np.resize(each, tokens) for each in (token_N, d_N, surprisal_N))
    times_N = np.repeat(longer, length_R)
    repeated = [np.repeat(each, times_N) for each in (token_N, d_N, surprisal_N)]
    b_N = cross_fitted_bias(*repeated, length_R * longer, shrinkage=0.0)
    expected_N = cross_fitted_bias(token_N, d_N, surprisal_N, length_R, shrinkage=0.0)
    np.testing.assert_allclose(b_N, np.repeat(expected_N, times_N), atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, SHRINKAGE])
def test_an_unseen_cell_has_the_mean_of_all(shrinkage):
    length_R, d_N = np.array([2, 1, 1, 1]), np.array([7.0, 8.0, 1.0, 2.0, 6.0])
    token_N, fold_R = np.array([1, 9, 1, 2, 3]), np.array([0, 1, 1, 1])
    b_N = cross_fitted_bias(token_N, d_N, np.ones(5), length_R, fold_R, shrinkage)
    assert b_N[1] == 3.0  # no answer of the other fold has token 9, or a second half


def test_the_order_of_the_answers_does_not_matter():
    token_N, d_N, surprisal_N, length_R = noisy()
    fold_R = folds_of(len(length_R))
    order_R = np.random.default_rng(1).permutation(len(length_R))
    answers = np.split(np.arange(len(d_N)), np.cumsum(length_R)[:-1])
    order_N = np.concatenate([answers[each] for each in order_R])
    b_N = cross_fitted_bias(token_N, d_N, surprisal_N, length_R, fold_R)
    moved_N = cross_fitted_bias(
        token_N[order_N], d_N[order_N], surprisal_N[order_N], length_R[order_R], fold_R[order_R]
    )
    np.testing.assert_allclose(moved_N, b_N[order_N], atol=1e-12)
    shuffled_N = cross_fitted_bias(token_N[order_N], d_N[order_N], surprisal_N[order_N], length_R[order_R])
    assert np.abs(shuffled_N - b_N[order_N]).max() > 1e-3  # other folds


# -- the parts -------------------------------------------------------------------------------------


def test_bins_and_edges():
    assert position_bins(np.array([20, 1, 3])).tolist() == [*np.repeat(range(10), 2), 0, 0, 3, 6]
    g = np.random.default_rng(0)
    value_N, weight_N = g.exponential(size=5000), g.uniform(0.1, 2, 5000)
    edges = quantiles(value_N, weight_N)
    weight_K = np.bincount(np.searchsorted(edges, value_N), weight_N, BINS) / weight_N.sum()
    np.testing.assert_allclose(weight_K, 1 / BINS, atol=2 * weight_N.max() / weight_N.sum())
    order_N = g.permutation(5000)
    assert np.array_equal(edges, quantiles(value_N[order_N], weight_N[order_N]))
    assert quantiles(np.array([0.0, 0.0, 0.0, 5.0]), np.ones(4), 4).tolist() == [0.0, 0.0, 0.0]


def test_a_cell_with_the_pseudo_weight_is_halfway():
    means = shrunk_means(np.array([0, 1, 1]), np.array([4.0, 0.0, 0.0]), np.ones(3), 2, 1.0)
    mean = 4 / 3
    assert means == pytest.approx([(4 + mean) / 2, mean / 3])


# -- stored rows -----------------------------------------------------------------------------------


def test_rows_change_in_the_teachers_log_probabilities_only():
    token_N, length_R, _ = latin()
    bias_K = np.linspace(-3, 3, KINDS)
    answers = token_N.reshape(-1, LENGTH)
    rows = [
        StoredRollout(
            id=str(i), prompt_ids=[1], completion_ids=ids.tolist(), finish_reason="stop",
            teacher_logprobs=(bias_K[ids] - 5).tolist(), student_logprobs=[-5.0] * LENGTH,
            teacher_topk_ids=[1, 2] * LENGTH, teacher_topk_logprobs=[-1.0, -2.0] * LENGTH,
        )
        for i, ids in enumerate(answers)
    ]  # fmt: skip
    changed, bias = residualized(rows)
    b_N = cross_fitted_bias(token_N, bias_K[token_N], np.full(len(token_N), 5.0), length_R)
    for row, new, b in zip(rows, changed, b_N.reshape(-1, LENGTH), strict=True):
        assert new.teacher_logprobs == pytest.approx(np.array(row.teacher_logprobs) - b)
        assert vars(new) | {"teacher_logprobs": 0} == vars(row) | {"teacher_logprobs": 0}
    assert (bias.mean, bias.large) == pytest.approx((np.abs(b_N).mean(), (np.abs(b_N) > 1).mean()))
    assert bias.large == pytest.approx(2 / KINDS)  # of ±3, ±2, ±1 and 0, ±3 stay above 1 when halved and shrunk
    answers, tokens = ANSWERS * (FOLDS - 1) / FOLDS / KINDS, SHRINKAGE / LENGTH
    rho = answers / (answers + tokens)
    assert bias.mean_left == pytest.approx(rho / 2 * (1 - rho / 2) * np.abs(bias_K[token_N]).mean())
    assert bias.large_left == 0
    assert residualized(rows) == (changed, bias)
    assert f"mean |b| {bias.mean:.3f} nats" in bias.text() and "28.6 % of the tokens, 0.0 % after" in bias.text()
