"""The slope behind the last step, from the gradient and Adam's moments, and the rate it steers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from effopd.extrapolate.learning_rate import MARGIN_ABOVE, LearningRateMultiplier
from effopd.extrapolate.slope_steering import LARGEST, MARGIN, MARGIN_IF_AVERAGED, slope_cosine, steering_factor


def quadratic(dimension: int = 20, seed: int = 0):
    """A parameter, and the loss ½ Σ λ x² with λ in [0.5, 2]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.Parameter(torch.randn(dimension, generator=g))
    curvature = 0.5 + 1.5 * torch.rand(dimension, generator=g)
    return x, lambda: 0.5 * (curvature * x.square()).sum()


def gradient(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_the_cosine_is_that_of_the_new_gradient_and_the_actual_step(make):
    x, loss = quadratic()
    optimizer = make([x], lr=0.01, weight_decay=0.0)
    assert slope_cosine(optimizer) is None
    for _ in range(4):
        gradient(optimizer, loss)
        before = x.detach().clone()
        optimizer.step()
        moved = x.detach() - before
        gradient(optimizer, loss)
        expected = torch.nn.functional.cosine_similarity(x.grad, moved, dim=0)
        assert slope_cosine(optimizer) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("rates", [(0.1, 0.0), (0.1, 0.003), (1e-5, 1e-4)])
def test_groups_count_by_the_length_of_their_steps(rates):
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(20, dtype=torch.float64)) for _ in rates]
    optimizer = torch.optim.AdamW(
        [{"params": [part], "lr": rate} for part, rate in zip(parts, rates, strict=True)], weight_decay=0.0
    )
    for _ in range(4):
        before = torch.cat(parts).detach()
        for part in parts:
            part.grad = torch.randn(20, dtype=torch.float64)
        optimizer.step()
        moved = torch.cat(parts).detach() - before
        for part in parts:
            part.grad = torch.randn(20, dtype=torch.float64)
        gradients = torch.cat([part.grad for part in parts])
        expected = torch.nn.functional.cosine_similarity(gradients, moved, dim=0)
        assert slope_cosine(optimizer) == pytest.approx(float(expected), abs=1e-5)


def test_moments_of_a_projection_are_left_out():
    weight, bias = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([weight, bias], lr=0.1)
    for parameter in (weight, bias):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    alone = torch.optim.AdamW([bias], lr=0.1)
    alone.state[bias] = optimizer.state[bias]
    for key in ("exp_avg", "exp_avg_sq"):  # as GaLore keeps them
        optimizer.state[weight][key] = optimizer.state[weight][key][:2]
    assert slope_cosine(optimizer) == slope_cosine(alone) is not None


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_under_a_schedule_free_optimizer_the_direction_is_that_from_the_weights_to_the_base_sequence(name):
    schedulefree = pytest.importorskip("schedulefree")
    x, loss = quadratic()
    optimizer = getattr(schedulefree, name)([x], lr=0.01)
    optimizer.train()
    gradient(optimizer, loss)
    assert slope_cosine(optimizer) is None
    optimizer.step()
    assert slope_cosine(optimizer) is None  # the average of one point is that point
    for _ in range(4):
        gradient(optimizer, loss)
        optimizer.step()
        gradient(optimizer, loss)
        direction = optimizer.state[x]["z"] - x.detach()
        expected = torch.nn.functional.cosine_similarity(x.grad, direction, dim=0)
        assert slope_cosine(optimizer) == pytest.approx(float(expected), abs=1e-6)
        assert expected < 0  # the loss still falls towards it


def test_a_schedule_free_rate_far_too_low_rises_and_one_far_too_high_falls():
    schedulefree = pytest.importorskip("schedulefree")
    for start, low, high in ((1e-4, 30.0, math.inf), (30.0, 0.0, 0.5)):
        x, loss = quadratic()
        optimizer = schedulefree.AdamWScheduleFree([x], lr=start, betas=(0.9, 0.99))
        optimizer.train()
        multiplier = LearningRateMultiplier(optimizer, by_slope=True)
        for _ in range(30):
            gradient(optimizer, loss)
            optimizer.step()
        assert low <= multiplier.factor <= high, (start, multiplier.factor)


@pytest.mark.parametrize("calibrated", [None, 0.1])
def test_the_slope_alone_lowers_the_rate_to_a_64th_at_most(calibrated):
    x = torch.nn.Parameter(torch.ones(20))
    optimizer = torch.optim.AdamW([x], lr=1e-6, weight_decay=0.0)
    rate = LearningRateMultiplier(optimizer, by_slope=True)
    rate.calibrated = calibrated
    rate.factor = calibrated or 1.0
    x.grad = torch.ones_like(x)
    optimizer.step()
    for _ in range(40):
        x.grad = -optimizer.state[x]["exp_avg"].clone()  # uphill along the last step
        optimizer.step()
        optimizer.state[x]["exp_avg"].fill_(1.0)
    assert rate.factor == pytest.approx((calibrated or 1.0) / 64)


def test_the_margin_of_a_schedule_free_optimizer_is_its_own():
    def factor(calibrated, settled=None):
        torch.manual_seed(0)
        x = torch.nn.Parameter(torch.zeros(50_000))
        optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree([x], lr=1e-3)
        optimizer.train()
        multiplier = LearningRateMultiplier(optimizer, by_slope=True)
        for _ in range(2):
            x.grad = torch.randn_like(x)
            optimizer.step()
        multiplier.factor, multiplier.calibrated, multiplier.settled = 1.0, calibrated, settled
        x.grad = torch.randn_like(x)
        optimizer.step()
        return multiplier.factor, multiplier.cosine

    for calibrated, settled, margin in (
        (None, None, 0.0), (1.0, None, MARGIN_IF_AVERAGED), (4.0, None, 0.0),
        (1.7, 0.9, MARGIN), (1.7, 1.1, MARGIN_IF_AVERAGED),
    ):  # fmt: skip
        changed, cosine = factor(calibrated, settled)
        assert changed == pytest.approx(steering_factor(cosine, margin))


def test_gradients_on_examples_that_were_trained_on_do_not_steer():
    x, loss = quadratic()
    optimizer = torch.optim.AdamW([x], lr=1e-4)
    shared = iter([False, True, True, False, True, True])
    multiplier = LearningRateMultiplier(optimizer, by_slope=True, seen=lambda: next(shared))
    factors, cosines = [], []
    for _ in range(6):
        gradient(optimizer, loss)
        optimizer.step()
        factors.append(multiplier.factor)
        cosines.append(multiplier.cosine)
    assert [cosine is None for cosine in cosines] == [True, True, True, False, True, True]
    assert factors[:3] == [1.0] * 3 and factors[3] == factors[4] == factors[5] == steering_factor(cosines[3])


def test_clipping_does_not_change_it_and_cleared_or_foreign_states_give_none():
    x, loss = quadratic()
    optimizer = torch.optim.AdamW([x], lr=0.01)
    gradient(optimizer, loss)
    optimizer.step()
    gradient(optimizer, loss)
    whole = slope_cosine(optimizer)
    torch.nn.utils.clip_grad_norm_([x], 1e-3)
    assert slope_cosine(optimizer) == pytest.approx(whole, abs=1e-6)
    x.grad.fill_(math.nan)
    assert slope_cosine(optimizer) is None
    optimizer.state.clear()
    assert slope_cosine(optimizer) is None
    for make in (partial(torch.optim.SGD, momentum=0.9), torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad):
        other = make([x], lr=0.1)
        gradient(other, loss)
        other.step()
        assert slope_cosine(other) is None, make


def test_the_factor_is_bounded_falls_with_the_cosine_and_is_one_at_zero():
    values = [steering_factor(c / 10) for c in range(-10, 11)]
    assert values == sorted(values, reverse=True) and max(values) == LARGEST and min(values) == 1 / LARGEST
    assert steering_factor(0.0) == 1.0
    assert steering_factor(-0.2) * steering_factor(0.2) == pytest.approx(1.0)


@pytest.mark.parametrize("start, low, high", [(1e-4, 100.0, math.inf), (30.0, 0.0, 0.25)])
def test_a_rate_far_off_moves_towards_the_loss_s_own_within_a_few_steps(start, low, high):
    x, loss = quadratic()
    optimizer = torch.optim.AdamW([x], lr=start, betas=(0.5, 0.9), weight_decay=0.0)
    multiplier = LearningRateMultiplier(optimizer, by_slope=True)
    for _ in range(20):
        gradient(optimizer, loss)
        optimizer.step()
    assert low <= multiplier.factor <= high


def test_gradients_that_are_noise_lower_the_rate_to_half_of_what_the_first_search_set():
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(5000))
    optimizer = torch.optim.AdamW([x], lr=1e-3)
    multiplier = LearningRateMultiplier(optimizer, by_slope=True)

    def steps(count):
        for _ in range(count):
            x.grad = torch.randn_like(x)
            optimizer.step()
        return multiplier.factor

    assert steps(20) == pytest.approx(1.0, rel=0.3)  # before the first search
    multiplier.factor = multiplier.calibrated = 4.0
    assert 1.2 < steps(20) <= 4.0 * MARGIN_ABOVE * 1.2
    assert steps(20) == pytest.approx(4.0 * MARGIN_ABOVE, rel=0.3)


def test_with_the_margin_steps_end_before_the_minimum_along_them():
    def mean_cosine(calibrated):
        torch.manual_seed(0)
        curvature = torch.linspace(0.2, 5, 300)
        x = torch.nn.Parameter(torch.randn(300))
        optimizer = torch.optim.AdamW([x], lr=0.03, weight_decay=0.0)
        multiplier = LearningRateMultiplier(optimizer, by_slope=True)
        multiplier.calibrated, cosines = calibrated, []
        for _ in range(300):
            x.grad = curvature * x.detach() + torch.randn(300)
            optimizer.step()
            cosines.append(multiplier.cosine or 0.0)
        return sum(cosines[100:]) / 200

    assert mean_cosine(1e-6) == pytest.approx(-1 / 15, abs=0.02)
    assert mean_cosine(None) == pytest.approx(0.0, abs=0.02)
    assert steering_factor(-0.2, MARGIN) == steering_factor(-0.2)


def test_while_it_is_not_wanted_the_rate_is_left_alone():
    x, loss = quadratic()
    optimizer = torch.optim.AdamW([x], lr=1e-4)
    multiplier = LearningRateMultiplier(optimizer, lambda: False, by_slope=True)
    for _ in range(3):
        gradient(optimizer, loss)
        optimizer.step()
    assert multiplier.factor == 1.0 and multiplier.cosine is None


def test_the_cosine_of_an_ascent_is_that_of_the_descent():
    found = []
    for sign in (1, -1):
        x, loss = quadratic()
        optimizer = torch.optim.Adam([x], lr=0.01, maximize=sign < 0)
        for _ in range(3):
            gradient(optimizer, lambda: sign * loss())  # noqa: B023
            found.append(slope_cosine(optimizer))
            optimizer.step()
    assert found[:3] == found[3:] and found[1] < 0


@pytest.mark.parametrize("counted", ["per group", "not at all"])
def test_an_adam_need_not_count_its_steps_per_parameter(counted):
    x, loss = quadratic()
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(3):
        gradient(optimizer, loss)
        optimizer.step()
    gradient(optimizer, loss)
    expected, step = slope_cosine(optimizer), optimizer.state[x].pop("step")
    if counted == "per group":
        optimizer.param_groups[0]["step"] = int(step)
    moments = {name: value.clone() for name, value in optimizer.state[x].items()}
    assert slope_cosine(optimizer) == pytest.approx(expected, abs=1e-5)  # a common factor, but for eps
    assert all(torch.equal(optimizer.state[x][name], value) for name, value in moments.items())
