"""One matrix that every strategy must pass, on a plain loop and through the trainer."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import small_scores
from helpers.tiny_run import make_trainer
from torch import nn

from effopd import EffOPD, EffOPDConfig, Score
from effopd.common.files import read_rows
from effopd.errors import ConfigError, NonFiniteWeightsError
from effopd.extrapolate.config import ONLY_FOR
from effopd.extrapolate.strategies import STRATEGIES

ALL = list(STRATEGIES)
FITS = [name for name, strategy in STRATEGIES.items() if strategy.fit]
SCORED = [name for name, strategy in STRATEGIES.items() if strategy.scorer]
GENERATING = [name for name, strategy in STRATEGIES.items() if strategy.scorer == "accuracy"]
MOVING = [name for name in ALL if name != "noop"]


def config(strategy: str, **overrides) -> EffOPDConfig:
    short = {"fit_every": 1, "fit_until": 5} if strategy in FITS else {}
    target = {"alpha_target": 0.9} if strategy == "alpha_opd" else {}
    return EffOPDConfig(strategy, **({"parameters": "all"} | short | target | overrides))


class Drift(nn.Module):
    """Moves in a straight line, with a little noise from the loop's own random state: W_t = t·D + noise."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(6, 4))
        self.vector = nn.Parameter(torch.zeros(5))
        self.frozen = nn.Parameter(torch.ones(3))

    @torch.no_grad()
    def train_step(self):
        self.matrix += 0.01 * torch.outer(torch.arange(1.0, 7), torch.ones(4)) + 1e-4 * torch.randn(6, 4)
        self.vector += 0.02 + 1e-4 * torch.randn(5)


def look(model, scorer, settings) -> EffOPD:
    """A look-ahead with an optimizer that has nothing to do."""
    return EffOPD(model, scorer, settings, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def loop(model, steps, look_ahead=None, start=1):
    for step in range(start, steps + 1):
        model.train_step()
        if look_ahead is not None:
            look_ahead.step(step)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


class Scorer:
    """Accuracy that grows with the distance travelled; counts its calls and costs 7 tokens each."""

    def __init__(self, rising: bool = True):
        self.rising, self.calls = rising, 0

    def __call__(self, model) -> Score:
        self.calls += 1
        value = min(float(model.matrix.detach().abs().mean()), 0.9)
        noise = 1e-3 * float(torch.rand(()))
        return Score(value + noise if self.rising else -float(self.calls), generated_tokens=7)


@pytest.mark.parametrize("strategy", ALL)
def test_it_touches_nothing_but_the_selected_weights(strategy):
    torch.manual_seed(0)
    plain, ahead = Drift(), Drift()
    loop(plain, 9)
    torch.manual_seed(0)
    look_ahead = look(ahead, Scorer(), config(strategy, parameters="matrix"))
    loop(ahead, 9, look_ahead)
    assert torch.equal(plain.vector, ahead.vector)  # so the loop's random state was left alone, too
    moved = any(row["accepted_scale"] for row in look_ahead.history)
    assert moved == (strategy in MOVING) == (not torch.equal(plain.matrix, ahead.matrix))


@pytest.mark.parametrize("strategy", ALL)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(strategy, tmp_path):
    for stop in (3, 5, 7):
        torch.manual_seed(0)
        whole, first = Drift(), Drift()
        ahead = look(whole, Scorer(), config(strategy))
        loop(whole, 9, ahead)
        torch.manual_seed(0)
        early = look(first, Scorer(), config(strategy))
        loop(first, stop, early)
        state, noise = weights(first), torch.get_rng_state()
        early.save(tmp_path)
        second = Drift()
        late = look(second, Scorer(), config(strategy))
        second.load_state_dict(state)
        late.load(tmp_path)
        torch.set_rng_state(noise)
        loop(second, 9, late, start=stop + 1)
        assert same(weights(whole), weights(second))
        times = ("seconds",)
        clean = [
            [{k: v for k, v in row.items() if k not in times and k != "trials"} for row in run.history]
            for run in (ahead, late)
        ]
        assert clean[0] == clean[1]


@pytest.mark.parametrize("strategy", [name for name in SCORED if name not in FITS])
def test_what_is_rejected_leaves_no_trace(strategy):
    torch.manual_seed(0)
    plain, ahead = Drift(), Drift()
    loop(plain, 9)
    torch.manual_seed(0)
    loop(ahead, 9, look(ahead, Scorer(rising=False), config(strategy)))
    assert same(weights(plain), weights(ahead))


@pytest.mark.parametrize("strategy", ALL)
def test_only_scored_strategies_score_and_every_score_is_charged(strategy):
    model, scorer = Drift(), Scorer()
    look_ahead = look(model, scorer if strategy in SCORED else None, config(strategy))
    loop(model, 9, look_ahead)
    assert (scorer.calls > 0) == (strategy in SCORED)
    assert sum(row["generated_tokens"] for row in look_ahead.history) == 7 * scorer.calls


@pytest.mark.parametrize("strategy", MOVING)
def test_a_point_that_is_not_finite_is_not_taken(strategy, monkeypatch):
    from effopd.extrapolate.live_weights import LiveWeights

    def refuse(self, scale):
        if scale != 0.0:
            raise NonFiniteWeightsError("planted")
        self.restore()

    torch.manual_seed(0)
    plain, ahead = Drift(), Drift()
    loop(plain, 9)
    torch.manual_seed(0)
    monkeypatch.setattr(LiveWeights, "move_to", refuse)
    look_ahead = look(ahead, Scorer(), config(strategy))
    loop(ahead, 9, look_ahead)
    assert same(weights(plain), weights(ahead))
    assert any(trial["verdict"] == "non-finite" for row in look_ahead.history for trial in row["trials"])


def test_fixed_goes_exactly_2k_displacements_further():
    model = Drift()
    look_ahead = look(model, None, config("fixed", fixed_k=3))
    model.train_step()
    w, row = weights(model), look_ahead.step(1)
    assert row["accepted_scale"] == 6.0
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, w[name] + 6 * (w[name] - Drift().state_dict()[name]))


def test_random_direction_goes_as_far_as_the_displacement_but_elsewhere():
    model = Drift()
    look_ahead = look(model, Scorer(), config("random_direction", scales=[2.0], parameters="matrix"))
    model.train_step()
    before = model.matrix.detach().clone()
    row = look_ahead.step(1)
    step = model.matrix.detach() - before
    assert row["accepted_scale"] == 2.0
    torch.testing.assert_close(step.norm(), 2 * before.norm())
    assert abs(float((step * before).sum() / step.norm() / before.norm())) < 0.9


def test_relex_lands_where_a_straight_line_leads():
    torch.manual_seed(0)
    model, far = Drift(), Drift()
    look_ahead = look(model, None, config("relex", relex_factor=10))
    loop(model, 5, look_ahead)
    loop(far, 50)
    assert torch.dist(model.matrix, far.matrix) < 0.03 * far.matrix.norm()
    torch.testing.assert_close(model.frozen, far.frozen)
    assert look_ahead.history[-1]["fit"]["r2"] > 0.99


def test_alpha_opd_reports_what_its_fit_is_worth():
    torch.manual_seed(0)
    model = Drift()
    look_ahead = look(model, Scorer(), config("alpha_opd", fit_until=8))
    loop(model, 8, look_ahead)
    fit = look_ahead.history[-1]["fit"]
    assert fit["q2"] > 0.9 > fit["q2_null"]
    assert Scorer()(model).mean > 0.5 > 8 * 0.01 * 3.5  # the prediction went further than training did


def test_alpha_opd_needs_something_to_aim_at():
    with pytest.raises(ConfigError, match="alpha_target"):
        EffOPD(Drift(), Scorer(), EffOPDConfig("alpha_opd", parameters="all"))


def test_a_new_anchor_forgets_the_old_displacement():
    model = Drift()
    look_ahead = look(model, None, config("fixed"))
    loop(model, 3)
    look_ahead.reanchor(3)
    before = weights(model)
    row = look_ahead.step(4)
    assert row["delta_norm"] == 0.0 and row["anchor_step"] == 3
    assert same(before, weights(model))


def test_none_is_no_strategy():
    assert not EffOPDConfig("none").enabled and not EffOPDConfig("none").scored
    with pytest.raises(ConfigError, match="plain training"):
        EffOPD(Drift(), Scorer(), EffOPDConfig("none", parameters="all"))


@pytest.mark.parametrize(
    "name, value",
    [("fixed_k", 2.0), ("fit_every", 4), ("fit_until", 32), ("relex_factor", 2.0), ("alpha_target", 0.5)],
)
def test_settings_of_other_strategies_are_refused(name, value):
    for strategy in ALL:
        if strategy in ONLY_FOR[name]:
            assert getattr(EffOPDConfig(strategy, **{name: value}), name) == value
        else:
            with pytest.raises(ConfigError, match=name):
                EffOPDConfig(strategy, **{name: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"strategy": "fixed", "fixed_k": -1.0},
        {"strategy": "relex", "fit_every": 0},
        {"strategy": "relex", "fit_until": 15},
        {"strategy": "relex", "fit_until": 6},
        {"strategy": "relex", "relex_factor": 1.0},
        {"strategy": "alpha_opd", "alpha_target": 0.0},
    ],
)
def test_bad_strategy_settings(bad):
    with pytest.raises(ConfigError):
        EffOPDConfig(**bad)


TINY = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no", "save_total_limit": 2}


@pytest.mark.parametrize("strategy", ALL)
def test_through_the_trainer_resumed_and_charged(strategy, tmp_path):
    """The whole path, with D_v and the teacher as the target; a resumed run ends with the same weights."""
    effopd = EffOPDConfig(
        strategy,
        parameters="all",
        **small_scores(strategy, 12),
        **({"fit_every": 1, "fit_until": 4} if strategy in FITS else {}),
    )
    trainer = make_trainer(tmp_path, effopd=effopd, **TINY)
    trainer.train()
    end = weights(trainer.model)
    rows = list(read_rows(tmp_path / "searches.jsonl"))
    if strategy == "line_search":
        assert rows[0]["step"] == 2 and all(row["forward_tokens"] > 0 for row in rows)
    else:
        assert [row["step"] for row in rows] == ([1, 2, 3, 4] if strategy in FITS else [1, 2, 4])
    metrics = list(read_rows(tmp_path / "metrics.jsonl"))
    steered = {row["step"]: row["learning_rate_factor_total"] for row in rows if "learning_rate_factor_total" in row}
    for row in metrics:  # the rate that the step was taken with
        factor = next((steered[s] for s in range(row["step"], 0, -1) if s in steered), 1.0)
        assert row["learning_rate"] == pytest.approx(trainer.args.learning_rate * factor)
    last = metrics[-1]
    assert last["cost/search_generated_tokens"] == sum(row["generated_tokens"] for row in rows)
    assert (last["cost/search_generated_tokens"] > 0) == (strategy in GENERATING)
    assert last["cost/search_forward_tokens"] == sum(row["forward_tokens"] for row in rows)
    again = make_trainer(tmp_path, effopd=effopd, **TINY)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000003"))
    assert same(end, weights(again.model))
