"""An adapted learning rate is the schedule's times a factor, whatever the scheduler does."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from transformers import Adafactor

from effopd import EffOPD, EffOPDConfig
from effopd.errors import ConfigError
from effopd.extrapolate.after_search import OptimizerUpdate
from effopd.extrapolate.learning_rate import LearningRateMultiplier
from effopd.extrapolate.search import Score, SearchResult, Trial
from effopd.extrapolate.weight_copies import clear_state
from effopd.runs.records import SearchRecord, TrialRecord

SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 12),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.CosineAnnealingLR(o, 10)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)]
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, 3, cycle_momentum=False),
}


def rates_used(schedule, factors, tensor_rate=False, resume_at=None):
    """The rate of every step, read off the weight that it moves (gradient 1)."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.5, dtype=torch.float64) if tensor_rate else 0.5)
    scheduler, rate, used = SCHEDULES[schedule](optimizer), LearningRateMultiplier(optimizer), []
    for step, factor in enumerate(factors):
        if step == resume_at:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            rate.close()
            optimizer = torch.optim.SGD([weight], lr=0.5)
            scheduler, rate = SCHEDULES[schedule](optimizer), LearningRateMultiplier(optimizer)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        rate.factor, before = factor, weight.item()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step()
        used.append(before - weight.item())
    return used


@pytest.mark.parametrize("resume_at", [None, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_goes_on_below_the_factor(schedule, resume_at):
    factors = [1.0] * 3 + [2.0] * 4 + [0.25] * 8
    plain = rates_used(schedule, [1.0] * 15)
    adapted = rates_used(schedule, factors, resume_at=resume_at)
    assert len(set(plain)) > 3
    assert adapted == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)], rel=1e-9)


def test_rates_that_are_tensors_stay_the_same_tensors():
    factors = [1.0, 2.0, 0.5, 0.5]
    plain = rates_used("LambdaLR", [1.0] * 4, tensor_rate=True)
    adapted = rates_used("LambdaLR", factors, tensor_rate=True)
    assert adapted == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)], rel=1e-9)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.5))
    held, rate = optimizer.param_groups[0]["lr"], LearningRateMultiplier(optimizer)
    rate.factor, weight.grad = 3.0, torch.ones(())
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is held and held.item() == 0.5 and weight.item() == -0.5


def test_a_step_that_fails_is_not_counted_twice():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = LearningRateMultiplier(optimizer)
    rate.factor = 2.0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    weight.grad = torch.ones(())
    optimizer.step()
    assert weight.item() == -2.0 and optimizer.param_groups[0]["lr"] == 1.0
    rate.close()
    optimizer.step()
    assert weight.item() == -3.0


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match="adapt_learning_rate=False"):
        LearningRateMultiplier(object())


def test_a_resume_without_the_optimizers_state_keeps_the_rate():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return EffOPD(
            model,
            lambda model: -model.weight.square().sum().item(),
            EffOPDConfig("line_search", parameters="all"),
            optimizer=optimizer,
        ), optimizer

    first, _ = make()
    with torch.no_grad():
        first.model.weight.mul_(-0.5)  # beyond the optimum, so going back halfway is better
    search = first.search(1)
    assert search.best_scale < 0 and search.learning_rate_factor_total == pytest.approx(0.5**0.5)
    second, optimizer = make()
    second.load_state_dict(first.state_dict())
    assert second.learning_rate_factor == first.learning_rate_factor
    second.model.weight.grad = torch.ones_like(second.model.weight)
    before = second.model.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - second.model.weight, torch.full_like(before, 0.1 * 0.5**0.5))


def one_search(rate: float, history=(), warmup: int = 0) -> tuple[float, float, float]:
    """(factor of a search along the first step, learning rate after warm-up, best length)."""
    torch.manual_seed(0)
    x, curvature = torch.nn.Parameter(torch.randn(20, dtype=torch.float64)), torch.linspace(0.5, 2, 20)
    optimizer = torch.optim.AdamW([x], lr=rate, weight_decay=0.0)
    if warmup:
        schedulers.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    update = OptimizerUpdate(EffOPDConfig(strategy="newton_search"), optimizer, lambda: True)
    update.resume({"learning_rate_factor": 1.0}, history)
    start = x.detach().clone()
    x.grad = (curvature * x).detach()
    optimizer.step()
    moved = x.detach() - start
    scale = float(-(curvature * moved * x.detach()).sum() / (curvature * moved**2).sum())  # of the quadratic loss
    trials = (Trial(0.0, Score(0.0), "start"), Trial(scale, Score(1.0), "accepted"))
    factor = update.after(SearchResult(scale, trials), history)
    assert factor is not None
    return factor, rate * update.factor, (1 + scale) * rate / (warmup or 1)


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 0.1, 3.0])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_first_search_sets_the_rate_wherever_it_started(rate, warmup):
    _, after, best_length = one_search(rate, warmup=warmup)
    assert after == pytest.approx(one_search(0.01)[1], rel=1e-3)
    assert after == pytest.approx(best_length / 4, rel=1e-6)


def test_the_share_is_that_of_the_peak_of_a_cycle():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    schedule, rate = schedulers.OneCycleLR(optimizer, 1.0, total_steps=10, pct_start=0.5), None
    rate = LearningRateMultiplier(optimizer)
    shares = []
    for _ in range(10):
        shares.append((optimizer.param_groups[0]["lr"], 0.0))
        weight.grad = torch.ones(())
        optimizer.step()
        shares[-1] = (shares[-1][0], rate.share)
        schedule.step()
    assert max(share for _, share in shares) == pytest.approx(1.0)
    assert [share for _, share in shares] == pytest.approx([used for used, _ in shares])  # the peak is 1


RISING = {
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 8e-3, 3, cycle_momentum=False),
    "warm-up to a factor": lambda o: schedulers.LambdaLR(o, lambda step: min(1 + step, 8)),
    "constant factor": lambda o: schedulers.LambdaLR(o, lambda step: 8.0),
    "falling factor": lambda o: schedulers.LambdaLR(o, lambda step: 8.0 / (1 + step)),
    "LinearLR": lambda o: schedulers.LinearLR(o, 1.0, 1.0, total_iters=4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CyclicLR(o, 1e-3, 8e-3, 2, cycle_momentum=False)],
        [3],
    ),
    "by hand": None,
}


def rates_after_a_search(schedule, searched=0, resume_at=None, scale=19.0):
    """Best length that a search finds; rate of the schedule, and rate used, of every step."""
    config = EffOPDConfig(strategy="newton_search")

    def built():
        weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        scheduler = RISING[schedule](optimizer) if RISING[schedule] else None
        return weight, optimizer, scheduler, OptimizerUpdate(config, optimizer, lambda: True)

    (weight, optimizer, scheduler, update), scheduled, used, history = built(), [], [], []
    for step in range(10):
        if step == resume_at:
            states = [copy.deepcopy(each.state_dict()) for each in (optimizer, scheduler, update) if each]
            weight, optimizer, scheduler, update = built()
            optimizer.load_state_dict(states[0])
            if scheduler:
                scheduler.load_state_dict(states[1])
            update.resume(states[-1], history)
        scheduled.append(optimizer.param_groups[0]["lr"])
        before, weight.grad = weight.item(), torch.ones_like(weight)
        update.rate.cosine = None
        optimizer.step()
        used.append(before - weight.item())
        if step == searched:
            trials = (Trial(0.0, Score(0.0), "start"), Trial(scale, Score(1.0), "accepted"))
            update.after(SearchResult(scale, trials), [])
            history = [
                SearchRecord(step=1, anchor_step=0, delta_norm=1.0, accepted_scale=scale, best_scale=scale,
                             trials=tuple(trial.to_record() for trial in trials),
                             learning_rate_factor=update.factor, learning_rate_factor_total=update.factor)
            ]  # fmt: skip
        if scheduler:
            scheduler.step()
        elif step < 8:
            optimizer.param_groups[0]["lr"] = 1e-3 * (2 + step)
    return (1 + scale) * used[searched], scheduled, used


@pytest.fixture
def without_steering(monkeypatch):
    monkeypatch.setattr("effopd.extrapolate.learning_rate.slope_cosine", lambda optimizer: None)


@pytest.mark.usefixtures("without_steering")
@pytest.mark.parametrize(("searched", "resume_at"), [(0, None), (1, None), (0, 2)])
@pytest.mark.parametrize("schedule", RISING)
def test_a_schedule_that_rises_keeps_the_rate_that_the_search_found(schedule, searched, resume_at):
    best_length, scheduled, used = rates_after_a_search(schedule, searched, resume_at)
    highest = max(1e-3, *scheduled[: searched + 1]) if schedule != "by hand" else max(scheduled[: searched + 1])
    for rate, step in zip(scheduled[searched + 1 :], used[searched + 1 :], strict=True):
        highest = max(highest, rate)
        assert step == pytest.approx(best_length / 4 * rate / highest)


@pytest.mark.usefixtures("without_steering")
def test_a_rise_is_reported_once(caplog):
    caplog.set_level("INFO")
    rates_after_a_search("warm-up to a factor")
    rates_after_a_search("LinearLR")
    assert caplog.text.count("rises above the peak") == 1


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_the_share_counts_the_warm_up_inside_a_schedule_free_step(name):
    schedulefree = pytest.importorskip("schedulefree")
    weight = torch.nn.Parameter(torch.ones(3))
    warmup = {} if name.startswith("RAdam") else {"warmup_steps": 4}
    optimizer = getattr(schedulefree, name)([weight], lr=0.5, **warmup)
    optimizer.train()
    rate, shares = LearningRateMultiplier(optimizer), []
    rate.factor = 3.0
    for _ in range(6):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        shares.append(rate.share)
    if warmup:
        assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert optimizer.param_groups[0]["lr"] == 0.5
    clear_state(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert rate.share == pytest.approx(1.0) or not warmup  # a warm-up that is over does not start again


def test_a_rate_that_the_optimizer_estimates_is_not_adapted(caplog):
    prodigyopt = pytest.importorskip("prodigyopt")
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(8, 1), torch.randn(64, 8)
    wanted = inputs @ torch.arange(8.0)

    def loss():
        return (model(inputs)[:, 0] - wanted).square().mean()

    optimizer = prodigyopt.Prodigy(model.parameters(), lr=1.0)
    config = EffOPDConfig("newton_search", gate="better", parameters="all")
    look = EffOPD(model, lambda _: -float(loss().detach()), config, optimizer=optimizer)
    assert "does not adapt its learning rate" in caplog.text
    losses = []
    for step in range(1, 40):
        optimizer.zero_grad()
        losses.append(float(loss().detach()))
        loss().backward()
        optimizer.step()
        look.step(step)
    assert look.learning_rate_factor == 1.0
    assert max(losses) == losses[0] > 10 * losses[-1]
    assert any(search.accepted_scale for search in look.history)


def test_later_searches_raise_the_rate_only_if_it_is_far_too_low():
    trials = (TrialRecord(0.0, "start", 0.0), TrialRecord(1.0, "rejected", -1.0))
    earlier = SearchRecord(step=1, anchor_step=0, delta_norm=1.0, accepted_scale=0.0, best_scale=0.0, trials=trials)
    best_length = one_search(1e-3)[2]
    for rate in (best_length / 4, best_length / 7.9):  # s = 3 and 6.9
        assert one_search(rate, [earlier])[0] == 1.0
    factor, after, length = one_search(1e-3, [earlier])
    assert after == pytest.approx(length / 8) and factor > 4.0
    without_candidates = dataclasses.replace(earlier, trials=trials[:1])
    assert one_search(1e-3, [without_candidates])[0] > 4.0


def test_groups_that_share_a_tensor_rate_get_the_factor_once():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.Adam([{"params": [weight]} for weight in weights], lr=torch.tensor(0.5))
    rate, used = LearningRateMultiplier(optimizer), []
    rate.factor = 2.0
    optimizer.register_step_pre_hook(lambda *_: used.append([float(group["lr"]) for group in optimizer.param_groups]))
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones(2)
        optimizer.step()
    assert used == [[1.0] * 3] * 2
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5] * 3


@pytest.mark.parametrize("first", [0, 1])
def test_the_share_is_that_of_a_group_that_moves(first):
    """A group can wait at rate 0 while the others train."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.5)
    rules = [lambda step: float(step >= 2), lambda step: 0.5]
    schedulers.LambdaLR(optimizer, rules[first:] + rules[:first])
    rate = LearningRateMultiplier(optimizer)
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    assert rate.share == 0.5


def test_an_optimizer_without_a_learning_rate_is_not_adapted(caplog):
    model = torch.nn.Linear(4, 4)
    optimizer = Adafactor(model.parameters())  # its default is lr=None
    config = EffOPDConfig("newton_search", gate="better", parameters="all")
    look = EffOPD(model, lambda m: -float(m.weight.square().sum()), config, optimizer=optimizer)
    for step in range(1, 4):
        optimizer.zero_grad()
        model.weight.square().sum().backward()
        optimizer.step()
        look.step(step)
    assert look.learning_rate_factor == 1.0 and any(search.accepted_scale for search in look.history)
    assert "does not adapt its learning rate" in caplog.text


def test_repeated_examples_take_at_most_the_rate_that_a_run_settles_at():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, seen = torch.optim.SGD([weight], lr=1.0), False
    rate = LearningRateMultiplier(optimizer, seen=lambda: seen)
    rate.factor, rate.settled = 4.0, 2.0

    def applied():
        weight.grad = torch.ones(1)
        optimizer.step()
        return rate.applied

    assert applied() == 4.0
    seen = True
    assert applied() == 4.0  # the margin of the slope lowers it instead
    rate.bounds_repeats = True
    assert applied() == 2.0 and weight.item() == -10.0 and rate.factor == 4.0
    rate.factor = 1.0
    assert applied() == 1.0
    rate.factor, seen = 4.0, False
    assert applied() == 4.0
