"""The line search, its schedule and its learning rate, as pure functions and on a problem with a
known optimum.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from effopd import EffOPD, EffOPDConfig, Score
from effopd.errors import ConfigError, NonFiniteWeightsError
from effopd.extrapolate.learning_rate import learning_rate_factor
from effopd.extrapolate.schedule import adaptive
from effopd.extrapolate.search import SearchResult, Trial, line_search
from effopd.runs.records import SearchRecord, TrialRecord


def search(function, **settings):
    calls = []

    def score(scale):
        calls.append(scale)
        return Score(function(scale), forward_tokens=1)

    result = line_search(score, **settings)
    assert calls == [trial.scale for trial in result.trials]  # every score is in the history, none is made twice
    assert len(set(calls)) == len(calls)
    return result


@pytest.mark.parametrize("peak", [0.01, 0.3, 1.0, 1.7, 3.0, 5.5, 13.0, 40.0, 63.0, 900.0, 40000.0, -0.2, -0.5, -0.9])
def test_a_parabola_is_maximized_exactly(peak):
    result = search(lambda s: -((s - peak) ** 2))
    assert result.accepted_scale == pytest.approx(peak, abs=1e-9)
    assert len(result.trials) <= math.log2(max(1.0, peak)) + 5


def test_it_never_ends_below_the_start():
    for seed in range(300):
        rng = random.Random(seed)
        values: dict[float, float] = {}
        result = search(lambda s, values=values, rng=rng: values.setdefault(s, rng.random()))
        assert values[result.accepted_scale] >= values[0.0]
        assert values[result.accepted_scale] == max(values[t.scale] for t in result.trials if t.verdict != "rejected")


def test_more_refinements_get_closer_on_a_skewed_curve():
    curve = lambda s: s * math.exp(-s / 5)  # noqa: E731  # best at 5
    errors = [abs(search(curve, refinements=n).accepted_scale - 5) for n in (0, 1, 3, 8)]
    assert errors == sorted(errors, reverse=True) and errors[0] == 1.0 and errors[-1] < 1e-3


def test_a_flat_score_stays_where_it_is():
    result = search(lambda s: 0.5)
    assert result.accepted_scale == 0.0 and len(result.trials) == 3
    assert search(lambda s: 0.5, gate="not_worse").accepted_scale != 0.0


def test_points_that_are_not_finite_bound_the_search():
    def cliff(s):
        if s > 4:
            raise NonFiniteWeightsError("planted")
        return float(s)

    result = search(cliff)
    assert result.accepted_scale == 4.0 and result.trials[-1].verdict == "non-finite"
    assert search(lambda s: math.nan).accepted_scale == 0.0
    assert search(lambda s: math.nan if s == 8 else float(s)).accepted_scale == 4.0


def test_it_stops_at_the_longest_scale():
    result = search(lambda s: float(s), longest=16.0)
    assert result.accepted_scale == 16.0


def test_adaptive_searches_while_it_pays():
    def steps(scales, last=40, trials=2):
        history, trial = [], TrialRecord(0.0, "start")
        for step in range(1, last):
            if adaptive(step, history):
                history.append(SearchRecord(step, accepted_scale=scales(len(history)), trials=(trial,) * trials))
        return [search.step for search in history]

    assert steps(lambda i: 2.0, 8) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(lambda i: 0.0) == [1, 3, 7, 15, 23, 31, 39]
    assert steps(lambda i: 0.9) == steps(lambda i: 0.0)
    assert steps(lambda i: -0.5, 20) == [1, 3, 7, 11, 15, 19]  # sooner again where training overshoots
    assert steps(lambda i: -0.5 if i == 4 else 0.0) == [1, 3, 7, 15, 23, 27, 35]
    assert steps(lambda i: 0.0 if i < 3 else 4.0, 20) == [1, 3, 7, 15, 16, 17, 18, 19]
    assert steps(lambda i: 0.0, 5, trials=1) == [1, 2, 3, 4]  # nothing has moved: a warm-up from rate 0


def test_the_learning_rate_follows_the_best_scale():
    assert [learning_rate_factor(s) for s in (0.0, 0.1, 0.7, 1.0)] == [1.0, 1.0, 1.0, 1.0]
    assert learning_rate_factor(-0.5) == learning_rate_factor(-0.1, 8.0) == pytest.approx(0.5**0.5)
    assert (
        learning_rate_factor(2.0, 1.5) == pytest.approx(3**0.5)
        and learning_rate_factor(3.0, 9.0) == learning_rate_factor(50.0, 1.1) == 2.0
    )
    assert (
        learning_rate_factor(50.0) == learning_rate_factor(50.0, 1.0) == learning_rate_factor(50.0, -0.5) == 1.0
    )  # one long jump says little
    assert (
        learning_rate_factor(16.0, 16.0)
        == learning_rate_factor(400.0, 16.0)
        == learning_rate_factor(16.0, 400.0)
        == 2.0
    )
    assert (
        learning_rate_factor(400.0, 900.0) == learning_rate_factor(900.0, 400.0) == 10.0
    )  # a rate that is far too low comes up fast


@pytest.mark.parametrize("start", [1e-6, 1e-3, 0.1])
def test_the_factor_finds_the_rate_from_far_below(start):
    """A search that always finds the right length, right / rate steps on: within 4 times of it in
    eight searches.
    """
    rate, before = start, 0.0
    for _ in range(8):
        scale = 1.0 / rate - 1.0
        rate, before = rate * learning_rate_factor(scale, before), scale
    assert 0.25 <= rate <= 1.0


def test_the_factor_goes_down_to_an_eighth_where_scores_are_noise_and_no_further():
    factor = 1.0
    for _ in range(100):
        factor *= learning_rate_factor(-0.5, total=factor)
    assert factor == pytest.approx(0.125)
    assert learning_rate_factor(-0.5, total=0.125) == 1.0 and learning_rate_factor(4.0, 4.0, 0.125) == 2.0
    rng, factors = np.random.default_rng(0), []
    for _ in range(200):  # searches along nothing: what scores best is chance
        factor, before = 1.0, 0.0
        for _ in range(60):
            noise: dict[float, float] = {0.0: 0.0}
            scale = line_search(lambda s, known=noise: Score(known.setdefault(s, float(rng.normal())))).best_scale
            factor, before = factor * learning_rate_factor(scale, before, factor), scale
        factors.append(factor)
    assert min(factors) == pytest.approx(0.125) == np.median(factors) and np.quantile(factors, 0.95) < 1.0
    for _ in range(10):  # a signal brings it back
        factor *= learning_rate_factor(8.0, 8.0, factor)
    assert factor > 8


def test_what_scores_best_is_known_even_if_nothing_passes_the_gate():
    def score(scale):  # one example of 32 gains: that is worth one standard error
        gains = [0.01 * scale if scale <= 2 else -1.0, *[0.0] * 31]
        return Score(sum(gains) / 32, per_example=tuple(gains))

    result = line_search(score, "significant", 2.0)
    assert result.accepted_scale == 0.0 and result.best_scale >= 2.0
    assert SearchResult(2.0, (Trial(0.0, None, "start"), Trial(2.0, None, "accepted"))).best_scale == 0.0


@pytest.mark.parametrize("gate", ["significant", "better", "not_worse"])
def test_a_step_back_needs_no_margin_but_a_gain(gate):
    """One example of 32 gains, and none loses: enough to go halfway back, not enough to go ahead
    (see above).
    """

    def score(scale):
        gains = [-0.01 * abs(scale + 0.5), *[0.0] * 31]
        return Score(sum(gains) / 32, per_example=tuple(gains))

    result = line_search(score, gate, 2.0, refinements=0)
    assert result.accepted_scale == -0.5 == result.best_scale
    flat = line_search(lambda s: Score(0.0, per_example=(0.0,) * 32), "significant", 2.0)
    assert flat.accepted_scale == 0.0 and [trial.scale for trial in flat.trials] == [0.0, 1.0, -0.5]


class Softmax(nn.Module):
    """Linear softmax student p = softmax(x W), teacher softmax(x W*); loss = mean KL(p ‖
    teacher).
    """

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
        self.target = torch.log_softmax(self.x @ torch.randn(6, 5, generator=generator, dtype=torch.float64), -1)
        self.w = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))

    def kl(self, w=None):
        logp = torch.log_softmax(self.x @ (self.w if w is None else w), -1)
        return (logp.exp() * (logp - self.target)).sum(-1).mean()


@pytest.mark.parametrize("lr", [0.01, 0.1, 1.0, 10.0])
def test_on_a_linear_softmax_a_jump_never_ends_higher_than_it_started(lr):
    plain, ahead = Softmax(), Softmax()
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in (plain, ahead)]
    config = EffOPDConfig("line_search", parameters="all", adapt_learning_rate=False)
    look_ahead = EffOPD(ahead, lambda model: -model.kl().item(), config, optimizer=optimizers[1])
    for step in range(1, 17):
        for model, optimizer in zip((plain, ahead), optimizers, strict=True):
            optimizer.zero_grad()
            model.kl().backward()
            optimizer.step()
        before = ahead.kl().item()
        row = look_ahead.step(step)
        assert ahead.kl().item() <= before + 1e-12
        if row and row.accepted_scale:
            assert ahead.kl().item() < before
    assert ahead.kl().item() < plain.kl().item()


def test_with_enough_refinements_it_finds_the_optimum_along_the_ray():
    """Against a dense scan and, near the start, against the closed form of the local quadratic."""
    model = Softmax()
    gradient = torch.autograd.grad(model.kl(), model.w)[0].flatten()
    hessian = torch.autograd.functional.hessian(
        lambda w: model.kl(w.reshape(6, 5)), torch.zeros(30, dtype=torch.float64)
    )
    step = (
        float(gradient @ gradient) / float(gradient @ hessian @ gradient) / 6
    )  # the quadratic's optimum is 6 of these
    d = -step * gradient

    with torch.no_grad():
        along = lambda s: float(model.kl((1 + s) * 0.02 * d.reshape(6, 5)))  # noqa: E731
        found = line_search(lambda s: Score(-along(s)), refinements=40).accepted_scale
        assert found > 1
        slope = (along(found + 1e-4) - along(found - 1e-4)) / 2e-4
        curvature = (along(found + 1e-2) - 2 * along(found) + along(found - 1e-2)) / 1e-4
        assert abs(slope / curvature) < 1e-6  # Newton's step from there

    def quadratic(s):
        return 0.5 * (1 + s) ** 2 * float(d @ hessian @ d) + (1 + s) * float(gradient @ d)

    exact = line_search(lambda s: Score(-quadratic(s))).accepted_scale
    assert exact + 1 == pytest.approx(6.0, rel=1e-6)


def test_moments_are_reset_after_a_jump_forwards_and_the_rate_is_adapted():
    model = Softmax()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    look_ahead = EffOPD(
        model,
        lambda model: -model.kl().item(),
        EffOPDConfig("line_search", parameters="all"),
        optimizer=optimizer,
    )

    def train():
        optimizer.zero_grad()
        model.kl().backward()
        optimizer.step()

    train()
    row = look_ahead.step(1)
    first = row.accepted_scale
    assert first > 16 and row.learning_rate_factor == 1.0  # the first long jump
    assert not optimizer.state and look_ahead.learning_rate_factor == 1.0
    train()
    row = look_ahead.step(2)
    factor = row.learning_rate_factor
    assert factor == learning_rate_factor(row.accepted_scale, first) > 2.0
    assert not optimizer.state and look_ahead.learning_rate_factor == factor
    before = model.w.detach().clone()
    train()
    assert (model.w - before).abs().max().item() == pytest.approx(
        factor * 1e-3, rel=0.02
    )  # Adam's first step: the rate itself
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the schedule's
    here, before = model.w.detach().clone(), look_ahead.weights.state_dict()["w"].clone()
    look_ahead.scorer = lambda model: -float((model.w - here).square().sum())
    assert look_ahead.step(3).accepted_scale == 0.0
    assert optimizer.state  # no jump, no reset
    assert look_ahead.learning_rate_factor == factor  # the step was as long as it should be
    train()
    train()
    here, before = model.w.detach().clone(), look_ahead.weights.state_dict()["w"].clone()
    look_ahead.scorer = lambda model: -float((model.w - (0.6 * here + 0.4 * before)).square().sum())
    assert look_ahead.search(4).accepted_scale == pytest.approx(-0.4, abs=1e-3)
    assert look_ahead.learning_rate_factor == pytest.approx(factor * 0.5**0.5)
    assert look_ahead.search(5).learning_rate_factor == 1.0  # nothing has moved, so nothing was learnt about the rate


def test_keeping_moments_and_rate_leaves_the_optimizer_alone():
    model = Softmax()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = EffOPDConfig("line_search", parameters="all", reset_moments=False, adapt_learning_rate=False)
    look_ahead = EffOPD(model, lambda model: -model.kl().item(), config, optimizer=optimizer)
    model.kl().backward()
    optimizer.step()
    assert look_ahead.step(1).accepted_scale > 0
    assert optimizer.state and optimizer.param_groups[0]["lr"] == 1e-3


def test_without_an_optimizer_there_is_nothing_to_reset():
    with pytest.raises(ConfigError, match="optimizer"):
        EffOPD(Softmax(), lambda model: 0.0, EffOPDConfig("line_search", parameters="all"))
