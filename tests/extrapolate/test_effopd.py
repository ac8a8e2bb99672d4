"""The look-ahead object on a plain PyTorch loop."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from effopd import EffOPD, EffOPDConfig, Score
from effopd.errors import CheckpointError, ConfigError, ScorerError

CONFIG = {"parameters": "all"}


class Quadratic(nn.Module):
    """Loss ‖w − 1‖²/2 with slow gradient descent: extrapolation must help, up to the optimum."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))
        self.drop = nn.Dropout(0.5)

    def loss(self):
        return 0.5 * (self.w - 1).square().sum()


def descend(model, steps, look_ahead=None, lr=0.01, start=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rows = []
    for step in range(start, steps + 1):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        if look_ahead is not None and (row := look_ahead.step(step)):
            rows.append(row)
    return rows


def negative_loss(model):
    return -float(model.loss())


def test_it_searches_at_powers_of_two_and_gets_ahead():
    plain, ahead = Quadratic(), Quadratic()
    look_ahead = EffOPD(ahead, negative_loss, EffOPDConfig(**CONFIG))
    descend(plain, 16)
    rows = descend(ahead, 16, look_ahead)
    assert [row.step for row in rows] == [1, 2, 4, 8, 16]
    assert [row.anchor_step for row in rows] == [0, 1, 2, 4, 8]
    assert rows == look_ahead.history
    assert ahead.loss() < 0.5 * plain.loss()


def test_a_score_of_tensors_is_kept_as_numbers(tmp_path):
    model = Quadratic()
    look_ahead = EffOPD(
        model,
        lambda m: Score(-m.loss(), per_example=-(m.w - 1).square()),
        EffOPDConfig(strategy="line_search", reset_moments=False, adapt_learning_rate=False, **CONFIG),
    )
    descend(model, 1, look_ahead)
    look_ahead.save(tmp_path)
    trials = [trial for record in look_ahead.history for trial in record.trials]
    assert all(type(trial.score) is float and len(trial.per_example) == 4 for trial in trials)
    assert {type(value) for trial in trials for value in trial.per_example} == {float}
    assert {type(record.accepted_scale) for record in look_ahead.history} == {float}


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (Score(None), "whose mean is NoneType: expected a number"),
        (Score(torch.zeros(2)), r"whose mean is Tensor of shape \(2,\): expected a number"),
        (Score(0.5, (0.5, "x")), "whose per_example is tuple: expected one number per example"),
        (Score(0.5, 0.5), "whose per_example is float: expected one number per example"),
        (torch.zeros(2), r"returned Tensor of shape \(2,\): expected a number or an effopd Score"),
    ],
)
def test_a_score_without_numbers_is_refused(score, message):
    model = Quadratic()
    look_ahead = EffOPD(model, lambda m: score, EffOPDConfig(**CONFIG))
    with pytest.raises(ScorerError, match=message):
        descend(model, 1, look_ahead)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_start_without_a_finite_score_is_warned_about_once(value, caplog):
    model = Quadratic()
    look_ahead = EffOPD(model, lambda m: value, EffOPDConfig(**CONFIG))
    rows = descend(model, 4, look_ahead)
    assert len(rows) > 1 and not any(row.accepted_scale for row in rows)
    assert caplog.text.count(f"The scorer gave {value} for the current weights: expected a finite number") == 1


def test_only_the_start_is_warned_about(caplog):
    model = Quadratic()
    at_start = iter([0.0] + [float("nan")] * 9)
    descend(model, 1, EffOPD(model, lambda m: next(at_start), EffOPDConfig(**CONFIG)))
    assert not caplog.text


def test_exact_scores_never_make_it_worse():
    for lr in (0.001, 0.1, 1.0, 1.9):
        model = Quadratic()
        look_ahead = EffOPD(model, negative_loss, EffOPDConfig(**CONFIG))
        for row in descend(model, 32, look_ahead, lr):
            if row.delta_norm == 0:  # at the optimum: nothing was scored
                assert row.accepted_scale == 0
                continue
            scores = {trial.scale: trial.score for trial in row.trials}
            assert scores[row.accepted_scale] >= scores[0.0]


def test_candidates_share_the_noise_and_the_loop_keeps_its_own():
    draws = []

    def noisy(model):
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return 0.0

    model = Quadratic()
    look_ahead = EffOPD(model, noisy, EffOPDConfig(**CONFIG))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for step in (1, 2):
        with torch.no_grad():
            model.w.add_(1)
        look_ahead.search(step)
    assert len(draws) == 12 and len(set(draws[:6])) == 1 and len(set(draws[6:])) == 1  # paired within a search …
    assert draws[0] != draws[6]  # … and fresh for the next one
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])


def test_scoring_happens_in_eval_mode_and_modes_come_back():
    model = Quadratic()
    model.train()
    model.drop.eval()
    seen = []
    EffOPD(model, lambda m: seen.append(m.training) or 0.0, EffOPDConfig(**CONFIG)).search(1)
    assert not any(seen) and model.training and not model.drop.training


@pytest.mark.parametrize("bad", [RuntimeError("boom"), "text", None])
def test_a_failing_scorer_leaves_no_trace(bad):
    model = Quadratic()
    calls = []

    def scorer(m):
        calls.append(1)
        if len(calls) < 3:
            return float(len(calls))
        if isinstance(bad, Exception):
            raise bad
        return bad

    look_ahead = EffOPD(model, scorer, EffOPDConfig(**CONFIG))
    descend(model, 3)
    before = model.w.detach().clone()
    with pytest.raises(ScorerError, match="restored"):
        look_ahead.search(3)
    assert torch.equal(model.w, before)
    assert look_ahead.history == []
    look_ahead.scorer = negative_loss  # and it can go on
    look_ahead.search(4)


def test_interrupt_restores_too():
    model = Quadratic()
    count = []

    def scorer(m):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return 0.0

    look_ahead = EffOPD(model, scorer, EffOPDConfig(**CONFIG))
    descend(model, 2)
    before = model.w.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        look_ahead.search(2)
    assert torch.equal(model.w, before)


def test_noop_changes_nothing_and_still_pays():
    plain, noop = Quadratic(), Quadratic()
    calls = []
    config = EffOPDConfig(strategy="noop", **CONFIG)
    look_ahead = EffOPD(noop, lambda m: calls.append(1) or Score(1.0, generated_tokens=5), config)
    descend(plain, 8)
    rows = descend(noop, 8, look_ahead)
    assert torch.equal(plain.w, noop.w)
    assert len(calls) == 2 * 4 and all(row.generated_tokens == 10 for row in rows)


def test_state_round_trip_and_uninterrupted_equality(tmp_path):
    whole = Quadratic()
    descend(whole, 20, EffOPD(whole, negative_loss, EffOPDConfig(**CONFIG)))

    first = Quadratic()
    look_ahead = EffOPD(first, negative_loss, EffOPDConfig(**CONFIG))
    descend(first, 6, look_ahead)
    look_ahead.save(tmp_path)

    second = Quadratic()
    second.load_state_dict(first.state_dict())
    resumed = EffOPD(second, negative_loss, EffOPDConfig(**CONFIG))
    resumed.load(tmp_path)
    assert resumed.anchor_step == 4 and len(resumed.history) == 3
    descend(second, 20, resumed, start=7)
    assert torch.equal(second.w, whole.w)


def test_state_of_other_settings_is_refused(tmp_path):
    look_ahead = EffOPD(Quadratic(), negative_loss, EffOPDConfig(**CONFIG))
    look_ahead.save(tmp_path)
    other = EffOPD(Quadratic(), negative_loss, EffOPDConfig(gate="better", args={"scales": [2.0]}, **CONFIG))
    with pytest.raises(
        CheckpointError, match=r"gate, args.scales differ \(saved → now: gate not_worse → better, args.scales \[2.0"
    ):
        other.load(tmp_path)
    with pytest.raises(CheckpointError, match="no complete look-ahead state"):
        other.load(tmp_path / "nothing")


def test_on_move_is_called_only_after_a_jump():
    moves = []
    for gate, jumps in (("better", 0), ("not_worse", 1)):
        model = Quadratic()
        look_ahead = EffOPD(model, lambda m: 0.0, EffOPDConfig(gate=gate, **CONFIG), on_move=lambda: moves.append(1))
        descend(model, 1)
        look_ahead.search(1)
        assert len(moves) == jumps


def test_a_search_holds_the_anchor_and_one_copy_of_what_moves():
    model = Quadratic()
    row = EffOPD(model, negative_loss, EffOPDConfig(**CONFIG)).search(1)
    assert row.memory_bytes == 2 * 4 * model.w.numel()


def test_without_a_displacement_nothing_is_scored():
    calls = []
    row = EffOPD(Quadratic(), lambda m: calls.append(1) or 0.0, EffOPDConfig(**CONFIG)).search(1)
    assert not calls and row.accepted_scale == 0 and row.delta_norm == 0


def test_scorer_must_be_callable():
    with pytest.raises(ConfigError, match="callable"):
        EffOPD(Quadratic(), 0.5)
