"""One matrix that every strategy must pass, on a plain loop and through the trainer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny_models import small_scores
from helpers.tiny_run import make_trainer
from torch import nn

from effopd import EffOPD, EffOPDConfig, Score
from effopd.common.files import read_rows
from effopd.errors import ConfigError, NonFiniteWeightsError
from effopd.extrapolate.scorers.base import SCORERS
from effopd.extrapolate.strategy import STRATEGIES

ALL = list(STRATEGIES)
FITS = [name for name, strategy in STRATEGIES.items() if strategy.fit]
SCORED = [name for name in ALL if EffOPDConfig(name).scorer]
GENERATING = [name for name in ALL if EffOPDConfig(name).scorer == "accuracy"]
MOVING = [name for name in ALL if name != "noop"]


def config(strategy: str, args=(), **overrides) -> EffOPDConfig:
    short = {"every": 1, "until": 5} if strategy in FITS else {}
    target = {"target": 0.9} if strategy == "alpha_opd" else {}
    return EffOPDConfig(strategy, args=short | target | dict(args), **({"parameters": "all"} | overrides))


class Drift(nn.Module):
    """Moves in a straight line, with a little noise from the loop's own random state: W_t = t·D
    + noise.
    """

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
    """Accuracy that grows with the distance traveled; counts its calls and costs 7 tokens each."""

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
    moved = any(search.accepted_scale for search in look_ahead.history)
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
            [{k: v for k, v in row.to_row().items() if k not in times and k != "trials"} for row in run.history]
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
    assert sum(search.generated_tokens for search in look_ahead.history) == 7 * scorer.calls


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
    assert any(trial.verdict == "non-finite" for search in look_ahead.history for trial in search.trials)


def test_fixed_goes_exactly_2k_displacements_further():
    model = Drift()
    look_ahead = look(model, None, config("fixed", {"k": 3}))
    model.train_step()
    w, row = weights(model), look_ahead.step(1)
    assert row.accepted_scale == 6.0
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, w[name] + 6 * (w[name] - Drift().state_dict()[name]))


def test_random_direction_goes_as_far_as_the_displacement_but_elsewhere():
    model = Drift()
    look_ahead = look(model, Scorer(), config("random_direction", {"scales": [2.0]}, parameters="matrix"))
    model.train_step()
    before = model.matrix.detach().clone()
    row = look_ahead.step(1)
    step = model.matrix.detach() - before
    assert row.accepted_scale == 2.0
    torch.testing.assert_close(step.norm(), 2 * before.norm())
    assert abs(float((step * before).sum() / step.norm() / before.norm())) < 0.9


def test_relex_lands_where_a_straight_line_leads():
    torch.manual_seed(0)
    model, far = Drift(), Drift()
    look_ahead = look(model, None, config("relex", {"factor": 10}))
    loop(model, 5, look_ahead)
    loop(far, 50)
    assert torch.dist(model.matrix, far.matrix) < 0.03 * far.matrix.norm()
    torch.testing.assert_close(model.frozen, far.frozen)
    assert look_ahead.history[-1].fit["r2"] > 0.99


def test_what_was_due_while_it_was_not_possible_is_done_at_the_next_call():
    model = Drift()
    look_ahead = look(model, Scorer(), config("effopd"))  # due at 1, 2, 4, 8
    steps = range(1, 11, 3)
    assert [step for step in steps if look_ahead.due(step, since=step - 3)] == [1, 4, 10]
    for step in steps:
        model.train_step()
        look_ahead.step(step, since=step - 3)
    assert [search.step for search in look_ahead.history] == [1, 4, 10]

    model = Drift()
    look_ahead = look(model, None, config("relex", {"every": 2, "until": 8}))
    for step in steps:  # observations are due at 2, 4, 6 and 8
        model.train_step()
        look_ahead.step(step, since=step - 3)
    assert [search.observation for search in look_ahead.history] == [1, 2, None]
    assert [search.step for search in look_ahead.history] == [4, 7, 10]


def test_alpha_opd_reports_what_its_fit_is_worth():
    torch.manual_seed(0)
    model = Drift()
    look_ahead = look(model, Scorer(), config("alpha_opd", {"until": 8}))
    loop(model, 8, look_ahead)
    fit = look_ahead.history[-1].fit
    assert fit["q2"] > 0.9 > fit["q2_null"]
    assert Scorer()(model).mean > 0.5 > 8 * 0.01 * 3.5  # the prediction went further than training did


def test_alpha_opd_needs_something_to_aim_at():
    with pytest.raises(ConfigError, match="target"):
        EffOPD(Drift(), Scorer(), EffOPDConfig("alpha_opd", parameters="all"))


def test_a_new_anchor_forgets_the_old_displacement():
    model = Drift()
    look_ahead = look(model, None, config("fixed"))
    loop(model, 3)
    look_ahead.reanchor(3)
    before = weights(model)
    row = look_ahead.step(4)
    assert row.delta_norm == 0.0 and row.anchor_step == 3
    assert same(before, weights(model))


def test_none_is_no_strategy():
    assert not EffOPDConfig("none").enabled and not EffOPDConfig("none").scored
    with pytest.raises(ConfigError, match="plain training"):
        EffOPD(Drift(), Scorer(), EffOPDConfig("none", parameters="all"))


@pytest.mark.parametrize("strategy", ALL)
def test_arguments_of_other_strategies_are_refused_and_the_known_ones_named(strategy):
    known = list(EffOPDConfig(strategy).args)
    others = {name for other in ALL for name in EffOPDConfig(other).args} - set(known)
    assert others
    for name in others:
        with pytest.raises(
            ConfigError, match=rf"EffOPDConfig\.args: .* would ignore {name}; expected {', '.join(known) or 'none'}"
        ):
            EffOPDConfig(strategy, args={name: 0.125})


@pytest.mark.parametrize(
    ("strategy", "args"),
    [
        ("fixed", {"k": -1.0}),
        ("fixed", {"k": "two"}),
        ("fixed", '{"k": '),
        ("fixed", [2]),
        ("fixed", "2"),
        ("relex", {"every": 0}),
        ("relex", {"every": 1.5}),
        ("relex", {"until": 15}),
        ("relex", {"until": 6}),
        ("relex", {"factor": 1.0}),
        ("alpha_opd", {"target": 0.0}),
        ("alpha_opd", {"temperature": -1}),
        ("effopd", {"scales": []}),
        ("effopd", {"scales": [2.0, -1.0]}),
        ("effopd", {"scales": "2"}),
        ("effopd", {"scales": [float("nan")]}),
        ("effopd", {"batch_size": 0}),
        ("effopd", {"temperature": float("nan")}),
        ("effopd", {"max_completion_length": 0}),
        ("effopd", {"batch_size": True}),
    ],
)
def test_bad_arguments_are_refused_when_the_config_is_built(strategy, args):
    with pytest.raises(ConfigError, match=r"EffOPDConfig\.args"):
        EffOPDConfig(strategy, args=args)


def test_names_of_arguments_are_unambiguous():
    scorers = {f.name for cls, _ in SCORERS.values() for f in dataclasses.fields(cls)}
    for name, rules in STRATEGIES.items():
        own = {f.name for f in dataclasses.fields(rules.args)}
        assert not own & scorers and not (own | scorers) & {f.name for f in dataclasses.fields(EffOPDConfig)}, name


TINY = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no", "save_total_limit": 2}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ALL)
def test_through_the_trainer_resumed_and_charged(strategy, tmp_path):
    """The whole path, with D_v and the teacher as the target; a resumed run ends with the same
    weights.
    """
    effopd = EffOPDConfig(
        strategy,
        parameters="all",
        **small_scores(strategy, 12),
        args={"every": 1, "until": 4} if strategy in FITS else {},
    )
    trainer = make_trainer(tmp_path, effopd=effopd, **TINY)
    trainer.train()
    end = weights(trainer.model)
    rows = list(read_rows(tmp_path / "searches.jsonl"))
    if effopd.scorer == "teacher_kl":
        assert rows[0]["step"] == 2 and all(row["forward_tokens"] > 0 for row in rows)
    else:
        assert [row["step"] for row in rows] == ([1, 2, 3, 4] if strategy in FITS else [1, 2, 4])
    metrics = list(read_rows(tmp_path / "metrics.jsonl"))
    factors = {row["step"]: row["learning_rate_factor_total"] for row in rows if "learning_rate_factor_total" in row}
    for row in metrics if not effopd.rules.steers_by_slope else []:  # the rate that the step was taken with
        factor = next((factors[s] for s in range(row["step"], 0, -1) if s in factors), 1.0)
        assert row["learning_rate"] == pytest.approx(trainer.args.learning_rate * factor)
    last = metrics[-1]
    assert last["cost/search_generated_tokens"] == sum(row["generated_tokens"] for row in rows)
    assert (last["cost/search_generated_tokens"] > 0) == (strategy in GENERATING)
    assert last["cost/search_forward_tokens"] == sum(row["forward_tokens"] for row in rows)
    again = make_trainer(tmp_path, effopd=effopd, **TINY)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000003"))
    assert same(end, weights(again.model))
