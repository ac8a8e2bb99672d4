"""Newton's step along Δ: exact where theory says so, few scores, never worse than the start."""

from __future__ import annotations

import math

import pytest
import torch

from effopd.errors import NonFiniteWeightsError
from effopd.extrapolate.after_search import OptimizerUpdate
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.newton import newton_search
from effopd.extrapolate.search import Score, SearchResult, Trial, line_search
from effopd.runs.records import SearchRecord


def softmax_line(best: float, noise: float = 0.0, positions: int = 64, vocabulary: int = 50, size: float = 2.0):
    """KL(s) of logits z + s·δ to a teacher at s = `best` plus noise, where `best`·δ has the given
    size; its slope and Gauss–Newton curvature at 0.
    """
    g = torch.Generator().manual_seed(0)
    z, delta, other = (torch.randn(positions, vocabulary, generator=g, dtype=torch.float64) for _ in range(3))
    delta = delta * size / abs(best)
    target = (z + best * delta + noise * other).log_softmax(-1)

    def kl(s: float) -> torch.Tensor:
        logp = (z + s * delta).log_softmax(-1)
        return (logp.exp() * (logp - target)).sum(-1)

    p, r = z.softmax(-1), z.log_softmax(-1) - target
    centered = delta - (p * delta).sum(-1, keepdim=True)
    slope, curvature = (p * centered * r).sum(-1).mean(), (p * centered.square()).sum(-1).mean()
    return kl, (float(slope), float(curvature))


def scores_of(result):
    return [trial for trial in result.trials if trial.score is not None]


def scored(kl):
    return lambda s: Score(-float(kl(s).mean()), tuple((-kl(s)).tolist()))


@pytest.mark.parametrize("best", [3.0, 40.0, 5000.0])
def test_a_teacher_on_the_line_is_reached_to_1e6_in_three_scores(best):
    kl, slope = softmax_line(best)
    result = newton_search(scored(kl), lambda: slope)
    assert result.best_scale == pytest.approx(best, rel=1e-6) and len(scores_of(result)) == 3


@pytest.mark.parametrize("best, noise", [(3.0, 0.5), (40.0, 1.0), (500.0, 1.0), (40.0, 3.0)])
def test_off_the_line_it_ends_as_low_as_doubling_in_fewer_scores(best, noise):
    kl, slope = softmax_line(best, noise)
    ours, doubling = newton_search(scored(kl), lambda: slope), line_search(scored(kl), "significant")
    fall = [float((kl(0.0) - kl(result.best_scale)).mean()) for result in (ours, doubling)]
    assert fall[0] >= 0.97 * fall[1]
    assert len(scores_of(ours)) <= 5 and len(scores_of(ours)) < len(doubling.trials)


def test_a_wrong_curvature_is_corrected_by_scores():
    kl, (first, second) = softmax_line(40.0, 1.0)
    fine = newton_search(scored(kl), lambda: (first, second)).best_scale
    for factor in (0.2, 5.0):
        off = newton_search(scored(kl), lambda factor=factor: (first, factor * second))
        falls = [float((kl(0.0) - kl(s)).mean()) for s in (off.best_scale, fine)]
        assert falls[0] >= 0.9 * falls[1] and len(scores_of(off)) <= 5


@pytest.mark.parametrize("best", [-0.4, -0.7, -0.9, -0.97])
def test_an_update_that_went_too_far_is_shortened_however_far_it_went(best):
    kl, slope = softmax_line(best)
    result = newton_search(scored(kl), lambda: slope)
    assert 1 + result.accepted_scale == pytest.approx(1 + best, rel=0.35)
    tried = [trial.scale for trial in result.trials]
    assert tried[:3] == [0.0, 1.0, -0.5] and len(tried) <= 9


@pytest.mark.parametrize("best", [-0.2, -0.5, -0.9, -3.0, 0.15, 0.3, 0.45])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_step_slightly_too_long_is_mended_in_at_most_four_scores(best, noise):
    kl, slope = softmax_line(best, noise, size=min(0.3, 0.3 * abs(best)))
    result = newton_search(scored(kl), lambda: slope, "better", None)
    grid = [s / 100 for s in range(-99, 100)]
    lowest = min(float(kl(s).mean()) for s in grid)
    start, found = float(kl(0.0).mean()), float(kl(result.best_scale).mean())
    assert start - found >= 0.95 * (start - lowest) and len(scores_of(result)) <= 4
    assert result.accepted_scale == (result.best_scale if best < 0 else result.best_scale / 2)


def test_a_slope_that_the_score_of_the_step_contradicts_is_not_used():
    kl, slope = softmax_line(-0.7, size=0.2)
    far = {1.0: 50.0}  # an update that broke the model

    def score(s):
        return Score(-far.get(s, float(kl(s).mean())))

    tried = [trial.scale for trial in newton_search(score, lambda: slope).trials]
    assert tried[:4] == [0.0, 1.0, -0.5, -0.75]
    trusted = [trial.scale for trial in newton_search(scored(kl), lambda: slope).trials]
    assert trusted[2] == pytest.approx(-0.7, rel=0.1)


def test_a_correction_that_does_not_improve_is_the_last_one():
    kl, (first, second) = softmax_line(40.0, 3.0)
    scores = {}

    def score(s):
        scores[s] = scored(kl)(s)
        return scores[s]

    newton_search(score, lambda: (first, second))
    means = [value.mean for value in scores.values()]
    improving = [later > max(means[: 2 + n]) for n, later in enumerate(means[2:])]
    assert False not in improving[:-1]


def test_a_rise_in_every_direction_leaves_the_weights_alone():
    result = newton_search(lambda s: Score(-abs(s), (-abs(s), -abs(s))), lambda: (1.0, 1.0))
    assert result.accepted_scale == 0.0


def test_without_a_slope_it_is_line_search_and_scores_no_point_twice():
    calls = []

    def score(s):
        calls.append(s)
        return Score(-((s - 5.5) ** 2))

    result = newton_search(score, lambda: None, "better", None)
    doubling = line_search(lambda s: Score(-((s - 5.5) ** 2)), "better", None)
    assert result.best_scale == doubling.best_scale == 5.5 and result.trials[:-1] == doubling.trials
    assert len(calls) == len(set(calls))


def test_a_forward_jump_goes_half_of_the_way_and_a_backward_jump_all_of_it():
    kl, slope = softmax_line(40.0)
    forward = newton_search(scored(kl), lambda: slope)
    assert forward.accepted_scale == pytest.approx(20.0, rel=1e-6) and forward.best_scale == pytest.approx(40.0)
    assert forward.trials[-1] == Trial(forward.accepted_scale, None, "accepted")
    fall = float((kl(0.0) - kl(forward.accepted_scale)).mean()) / float((kl(0.0) - kl(40.0)).mean())
    assert fall > 0.7
    backward = newton_search(scored(softmax_line(-0.5)[0]), lambda: slope)
    assert backward.accepted_scale == backward.best_scale < 0


def test_points_that_are_not_finite_are_passed_over():
    kl, slope = softmax_line(40.0)

    def score(s):
        if s > 30:
            raise NonFiniteWeightsError("too far")
        return scored(kl)(s)

    result = newton_search(score, lambda: slope)
    assert 0 < result.accepted_scale <= 30 and "non-finite" in [trial.verdict for trial in result.trials]
    bad = newton_search(lambda s: Score(math.nan), lambda: slope)
    assert bad.accepted_scale == 0.0 and len(bad.trials) == 1


@pytest.mark.parametrize(("seen", "updates"), [(False, 1), (False, 4), (True, 4)])
def test_with_several_steps_on_a_rollout_the_rate_starts_above_what_it_settles_at(seen, updates):
    """The full share first; 1/√k of it where the large margin ends. Later rises move both.

    The first search is on rollouts that were trained on, or on other parts of their batch.
    """
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    config = EffOPDConfig("newton_search")
    update = OptimizerUpdate(config, optimizer, lambda: True, updates=updates, seen=lambda: seen)
    assert update.after_one_of_several is seen
    settles = updates > 1

    def after(best):
        update.after(SearchResult(best, (Trial(0.0, Score(0.0), "start"), Trial(best, Score(1.0), "accepted"))), [])
        return update.factor, update.rate.settled

    assert after(39.0) == (10.0, 5.0 if settles else None)
    assert update.after_one_of_several is False
    assert after(15.0) == (20.0, 10.0 if settles else None)
    resumed = OptimizerUpdate(config, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]), lambda: True)
    resumed.resume(update.state_dict(), [])
    assert (resumed.factor, resumed.rate.settled) == (20.0, update.rate.settled)
    assert resumed.rate.bounds_repeats is update.rate.bounds_repeats is (settles and not seen)


def test_the_gate_asks_forward_jumps_for_significance():
    gains = {0.0: (0.0, 0.0), 1.0: (1.0, -0.9), 2.0: (1.0, -0.9)}
    loud = newton_search(lambda s: Score(sum(gains[s]) / 2, gains[s]), lambda: (-2.0, 1.0), "significant", 2.0)
    assert loud.accepted_scale == 0.0
    any_gain = newton_search(lambda s: Score(sum(gains[s]) / 2, gains[s]), lambda: (-2.0, 1.0), "better", None)
    assert any_gain.accepted_scale in (0.5, 1.0)


def test_candidates_that_are_all_too_long_are_corrected_until_one_is_better_than_scale_1():
    """One of eight rollouts rises steeply beyond 10: a first search then stopped at scale 1."""

    def score(scale):
        losses = [(scale - 8) ** 2 / 100] * 7 + [0.64 + max(scale - 10, 0.0) ** 2]
        return Score(-sum(losses) / 8, tuple(-loss for loss in losses))

    result = newton_search(score, lambda: (-0.14, 0.0007), "better", None)
    scales = [trial.scale for trial in result.trials[:-1]]
    assert scales[:5] == pytest.approx([0.0, 1.0, 200.0, 50.0, 12.5])
    assert result.best_scale == scales[5] == pytest.approx(8, abs=3) and len(scales) == 6

    def steep(scale):
        return Score(-abs(scale - 1.0))

    scales = [trial.scale for trial in newton_search(steep, lambda: (-1.0, 1e-6), "better", None).trials[:-1]]
    assert len(scales) <= 2 + 1 + 6 and max(scales[2:]) == 65536.0


def test_the_way_of_a_forward_jump():
    def loss(scale):
        return (scale - 40.0) ** 2

    for way in (0.5, 0.75):
        result = newton_search(lambda s: Score(-loss(s)), lambda: (-80.0, 2.0), "better", None, way=way)
        assert (result.best_scale, result.accepted_scale) == (40.0, way * 40.0)


@pytest.mark.parametrize("start", [1e-6, 1.0])
def test_later_searches_change_the_rate_after_a_backward_jump_or_a_very_long_one(start):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=start)
    update = OptimizerUpdate(EffOPDConfig("newton_search"), optimizer, lambda: True)
    history = []
    for step, best in enumerate((39.0, 7.0, 3.0, 0.5, *[-0.5] * 8, 7.0, 31.0, -0.5)):
        result = SearchResult(best, (Trial(0.0, Score(0.0), "start"), Trial(best, Score(1.0), "accepted")))
        factor = update.after(result, history)
        history.append(
            SearchRecord(
                step=step, anchor_step=0, delta_norm=1.0, accepted_scale=best, best_scale=best, seconds=0.0,
                generated_tokens=0, forward_tokens=0, trials=tuple(t.to_record() for t in result.trials),
                learning_rate_factor=factor, learning_rate_factor_total=update.factor,
            )
        )  # fmt: skip
    totals = [record.learning_rate_factor_total for record in history]
    assert totals[:4] == [10.0] * 4 and totals[4] == pytest.approx(10 * 0.5**0.5)
    assert totals[9:13] == pytest.approx([10 / 8] * 4)  # the floor is a share of the calibrated rate
    assert totals[13:] == pytest.approx([10 / 2, 10 / 2 * 0.5**0.5])  # (1 + 31) / 8
    resumed = OptimizerUpdate(EffOPDConfig("newton_search"), torch.optim.AdamW([parameter], lr=start), lambda: True)
    for past in (history, history[:5], history[:14]):
        resumed.resume({"learning_rate_factor": past[-1].learning_rate_factor_total}, past)
        assert resumed.rate.calibrated == pytest.approx(5.0 if len(past) > 13 else 10.0)
