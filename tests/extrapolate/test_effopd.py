"""The look-ahead object on a plain PyTorch loop."""

from __future__ import annotations

import random
import signal

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


# -- parameters that are unfrozen later ------------------------------------------------------------


class Halves(nn.Module):
    """Loss ‖a − 1‖²/2 + ‖b − 1‖²/2; b is frozen at first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4), requires_grad=False)

    def loss(self):
        return 0.5 * ((self.a - 1).square().sum() + (self.b - 1).square().sum())


def unfreeze_at(step, look_ahead, steps, *, tell=False, start=1):
    """Descend, with b from `step` on; the share of the last update by which each search moved b."""
    model, moved = look_ahead.model, {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for now in range(start, steps + 1):
        if now == step:
            model.b.requires_grad_(True)
            if tell:
                look_ahead.reanchor(now - 1)
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        before, anchor = model.b.detach().clone(), look_ahead.weights.state_dict().get("b", model.b).clone()
        if record := look_ahead.step(now):
            assert record.accepted_scale != 0.0
            torch.testing.assert_close(model.b - before, record.accepted_scale * (before - anchor))
            moved[now] = bool((model.b != before).any())
    return moved


@pytest.mark.parametrize("tell", [False, True])
def test_parameters_that_are_unfrozen_move_too(caplog, tell):
    look_ahead = EffOPD(Halves(), negative_loss, EffOPDConfig(**CONFIG))
    assert look_ahead.weights.names == ("a",) and look_ahead.weights.numel == 4
    moved = unfreeze_at(3, look_ahead, 8, tell=tell)
    assert moved == {1: False, 2: False, 4: tell, 8: True}  # the search after step 4 does not know b's start
    assert look_ahead.weights.names == ("a", "b") and look_ahead.weights.numel == 8
    assert caplog.text.count("1 parameters that the look-ahead moves were frozen when it was built (b)") == (not tell)


def test_a_run_resumes_after_parameters_were_unfrozen():
    look_ahead, again = (EffOPD(Halves(), negative_loss, EffOPDConfig(**CONFIG)) for _ in range(2))
    unfreeze_at(3, look_ahead, 6, tell=True)
    again.model.load_state_dict(look_ahead.model.state_dict())
    again.model.b.requires_grad_(True)
    again.load_state_dict(look_ahead.state_dict())
    for each in (look_ahead, again):
        assert unfreeze_at(None, each, 8, start=7) == {8: True}
    torch.testing.assert_close(again.model.b, look_ahead.model.b, rtol=0, atol=0)


def test_a_rule_still_decides_what_moves(caplog):
    look_ahead = EffOPD(Halves(), negative_loss, EffOPDConfig(parameters="a"))
    assert unfreeze_at(3, look_ahead, 8) == {1: False, 2: False, 4: False, 8: False}
    assert look_ahead.weights.names == ("a",) and "unfreez" not in caplog.text.lower()


def test_a_fit_warns_once_that_it_lacks_them(caplog):
    model = nn.Linear(8, 8)
    model.bias.requires_grad_(False)
    look_ahead = EffOPD(model, lambda _: 0.5, EffOPDConfig("alpha_opd", **CONFIG), target=lambda: 1.0)
    model.bias.requires_grad_(True)
    for _ in range(2):
        look_ahead._notice_unfrozen()
    assert caplog.text.count("A fit of 'alpha_opd' lacks them, so they stay") == 1
    assert look_ahead.weights.names == ("weight",)
    look_ahead.reanchor(3)
    assert look_ahead.weights.names == ("weight", "bias")


@pytest.mark.parametrize("copy", [lambda p: p.detach().float().clone(), lambda p: p.detach().clone()])
def test_an_optimizer_of_copies_of_the_weights_is_refused(copy):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    parameters = [*model[0].parameters(), *map(copy, model[1].parameters())]
    with pytest.raises(ConfigError, match=r"optimizer=SGD: it steps a copy of the parameter '1\.weight'"):
        EffOPD(model, lambda _: 0.0, EffOPDConfig(**CONFIG), optimizer=torch.optim.SGD(parameters, lr=0.1))


def test_an_optimizer_can_have_parameters_of_other_models_and_lack_some():
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.init.zeros_(model.bias)
    nn.init.zeros_(other.bias)
    optimizer = torch.optim.SGD([model.weight, *other.parameters()], lr=0.1)
    EffOPD(model, lambda _: 0.0, EffOPDConfig(**CONFIG), optimizer=optimizer)


def test_averages_need_an_optimizer_and_a_way_to_move_them():
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(ConfigError, match="pass optimizer=… too"):
        EffOPD(model, negative_loss, EffOPDConfig(**CONFIG), averages=[average])
    with pytest.raises(ConfigError, match=r"AveragedModel has no method translate\(parameter, change\)"):
        EffOPD(model, negative_loss, EffOPDConfig(**CONFIG), averages=[average], optimizer=optimizer)


def test_numbers_of_numpy_and_torch_are_saved(tmp_path):
    """JSON has none of them."""
    config = EffOPDConfig(
        min_z=np.float32(1.5), gate="significant", seed=np.int64(3), args={"scales": [np.float64(2)]}, **CONFIG
    )
    assert EffOPDConfig(gate="significant", min_z=1.5, seed=3, args={"scales": [2.0]}, **CONFIG) == config
    cost = {"generated_tokens": torch.tensor(3), "forward_tokens": np.int64(5), "verdicts": {"passed": np.int64(2)}}
    model = Quadratic()
    look_ahead = EffOPD(model, lambda m: Score(negative_loss(m), (-1.0, -2.0), **cost), config)
    descend(model, 1)
    look_ahead.step(np.int64(1))
    look_ahead.restart(np.int64(1))
    look_ahead.save(tmp_path / "runs" / "step-1")  # the folder is new
    again = EffOPD(model, negative_loss, config)
    again.load(tmp_path / "runs" / "step-1")
    assert again.history[0].generated_tokens == 3 * len(again.history[0].trials)


def test_costs_that_are_no_numbers_are_an_error():
    model = Quadratic()
    look_ahead = EffOPD(model, lambda _: Score(0.0, generated_tokens=None), EffOPDConfig(**CONFIG))
    with pytest.raises(ScorerError, match="a Score whose costs are not numbers"):
        descend(model, 1, look_ahead)


def test_a_time_limit_leaves_a_timer_outside_running():
    model, rung = Quadratic(), []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 60.0)
    try:
        look_ahead = EffOPD(model, negative_loss, EffOPDConfig(**CONFIG), score_timeout=5.0)
        descend(model, 1, look_ahead)
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
