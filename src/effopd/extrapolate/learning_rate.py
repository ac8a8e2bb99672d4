"""Learning-rate adaptation: the factor from the best scales, and its application in each step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from effopd.common.zero import BeforeStep, base_optimizer, zero_optimizer
from effopd.errors import ConfigError
from effopd.extrapolate.slope_steering import MARGIN, MARGIN_IF_AVERAGED, slope_cosine, steering_factor
from effopd.extrapolate.weight_copies import has_modes

logger = logging.getLogger(__name__)

#: Optimizer → its active `LearningRateMultiplier`; weak references on both sides.
_ACTIVE: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[LearningRateMultiplier]] = (
    weakref.WeakKeyDictionary()
)


#: Lower bound of the learning rate, as a share of its schedule or of what the first search set.
LOWEST_FACTOR = 0.125


def learning_rate_factor(best_scale: float, previous: float = 0.0, total: float = 1.0) -> float:
    """Learning-rate multiplier from the best scale s of this search and s′ of the previous one:
    √min(1+s, 4) if both exceed 1 (or ½√min(s, s′) if larger); 1/√2 if s < 0, floored at 1/8 of the
    schedule; otherwise 1.

    Two searches must agree before the rate rises, because the first jump often reflects the
    starting point. The gate is ignored on purpose: below the noise level, `significant` rejects
    every forward jump, and the rate could only fall. If scores are pure noise, the rate falls to
    the floor in about 30 searches and stays there, because a fall takes one best scale and a rise
    takes two.

    Args:
        best_scale: s.
        previous: s′; 0 before the first search.
        total: product of the factors so far.

    Example:
        >>> learning_rate_factor(3.0), learning_rate_factor(3.0, previous=2.0)
        (1.0, 2.0)
        >>> learning_rate_factor(100.0, previous=64.0)
        4.0
    """
    if best_scale > 1:
        if previous <= 1:
            return 1.0
        return max(min(1 + best_scale, 4.0) ** 0.5, 0.5 * min(best_scale, previous) ** 0.5)
    return 1.0 if best_scale >= 0 else max(0.5**0.5, min(1.0, LOWEST_FACTOR / total))


#: Learning rate as a share of the best length of the first step.
SHARE_OF_FIRST_STEP = 0.25
#: The same under a schedule-free optimizer, whose average of the weights tolerates a higher rate.
SHARE_IF_AVERAGED = 0.5
#: Share of the rate that the first search set, above which the slope steers with a margin.
MARGIN_ABOVE = 0.5
#: Lower bound of the rate, as a share of what a search set, when the slope lowers it.
LOWEST_BY_SLOPE = 1 / 64
#: Bounds of one `calibrated_factor`.
_LOWEST_CALIBRATION, _HIGHEST_CALIBRATION = 2.0**-8, 2.0**14
#: Rates that differ by less than this share are equal: closed forms of schedules round.
_ROUNDING = 1e-6


def calibrated_factor(best_scale: float, share: float = 1.0, *, averaged: bool = False) -> float:
    """(1 + s)·share / 4, the learning-rate multiplier from the best scale s of the first step.

    Adam's first step is −η·sign(gradient). Its best length (1 + s)·η therefore does not depend on
    the rate η, and one search measures it. The next steps take a quarter of it each, because their
    gradients are noisy and their number is large. Under a schedule-free optimizer they take half.

    Args:
        best_scale: s.
        share: rate of the first step as a share of the schedule's peak, for example 0.1 in the
            first of ten warm-up steps. The quarter is that of the peak.
        averaged: whether the optimizer is schedule-free.

    Example:
        >>> calibrated_factor(39.0), calibrated_factor(3.0), calibrated_factor(-0.75)
        (10.0, 1.0, 0.0625)
    """
    factor = (SHARE_IF_AVERAGED if averaged else SHARE_OF_FIRST_STEP) * (1 + best_scale) * share
    return min(max(factor, _LOWEST_CALIBRATION), _HIGHEST_CALIBRATION)


def repeated_factor(best_scale: float, *, averaged: bool = False) -> float:
    """max(1, (1 + s) / 8), the learning-rate multiplier from the best scale s of a later jump.

    A forward jump goes half of the way and clears the moments. At the rate that `calibrated_factor`
    sets, the other half is two steps long, so the next search finds about s = 1. An s above 7 means
    that the first search found a rate that is far too low. An eighth of the best length is half of
    the share that the first search takes. Under a schedule-free optimizer both shares are double.

    Args:
        best_scale: s of a search that jumps forward.
        averaged: whether the optimizer is schedule-free.

    Example:
        >>> repeated_factor(3.0), repeated_factor(15.0), repeated_factor(15.0, averaged=True)
        (1.0, 2.0, 4.0)
    """
    return max(1.0, calibrated_factor(best_scale, 0.5, averaged=averaged))


class LearningRateMultiplier:
    """Multiplies an optimizer's learning rates by `factor` during each step, by step hooks.

    The rates of all parameter groups are multiplied right before a step and restored right after
    it. Schedulers therefore never see the factor.

    A rate that `calibrated_factor` found is that of the schedule's peak. The peak is the group's
    `max_lr` or `initial_lr`, or the highest rate of any step so far if that is higher or there is
    no scheduler. If the schedule rises above it after the first search, `factor` and `calibrated`
    fall in proportion, which keeps the rate that the search found.

    An optimizer has at most one `LearningRateMultiplier`. Closing or deleting it removes its hooks.

    Args:
        optimizer: a `torch.optim.Optimizer`, bare or wrapped by accelerate or DeepSpeed.
        wanted: called before every step; if it returns false, the step uses the schedule's rate.
        by_slope: multiply `factor` by `steering_factor` of `slope_cosine(optimizer)` before every
            step for which `seen` is false. It lowers `factor` to 1/64 of `calibrated` at most, or
            to 1/64 before the first search.
        seen: called before every step; whether an earlier step trained on the examples of its
            gradient. They say nothing about the slope behind that step.

    Attributes:
        factor: the multiplier; initially 1.
        share: the rate in the last step without `factor`, divided by the peak of the schedule or of
            the optimizer's own warm-up. Read in the first group whose rate is not 0.
        highest: the highest rate so far without `factor`, if no group names a higher one; else 0.
        calibrated: `factor` as the first search set it, or the last later one that raised it;
            `None` before the first. Below half of it, and before, `by_slope` has no margin.
        settled: `factor` above which `by_slope` has the full margin under a schedule-free
            optimizer; `None`: not set.
        bounds_repeats: whether steps for which `seen` is true take at most `settled`.
        cosine: `slope_cosine` before the last step; `None`: not known, `by_slope` is
            off, or the examples were seen before.

    Raises:
        ConfigError: the object is not a `torch.optim.Optimizer`, or another
            `LearningRateMultiplier` is active on it.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rate = LearningRateMultiplier(optimizer)
        >>> rate.factor, weight.grad = 0.5, torch.ones(1)
        >>> _ = optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"], rate.applied
        (-0.5, 1.0, 0.5)
    """

    _wanted: Callable[[], bool]

    def __init__(
        self,
        optimizer: Any,
        wanted: Callable[[], bool] = lambda: True,
        *,
        by_slope: bool = False,
        seen: Callable[[], bool] = lambda: False,
    ):
        inner, zero = base_optimizer(optimizer), zero_optimizer(optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise ConfigError(
                f"adapting the learning rate needs a torch.optim.Optimizer, got {type(inner).__name__}. Pass the "
                "optimizer that takes the steps, or set adapt_learning_rate=False."
            )
        other = _active(inner)
        if other is not None and other._wanted():
            raise ConfigError(
                "another look-ahead already adapts the learning rate of this optimizer, and their factors would "
                "multiply. Close it first (`EffOPD.close()`), or set adapt_learning_rate=False in one of them."
            )
        if other is not None:
            other.close()
        self.factor = self.share = 1.0
        self.highest = 0.0
        self.calibrated: float | None = None
        self.settled: float | None = None
        self.bounds_repeats = False
        self.cosine: float | None = None
        self._by_slope = by_slope and zero is None
        self._seen = seen
        self._optimizer, self._wanted = inner, wanted
        self._schedule: list[Any] | None = None
        self._applied: float | None = None
        self._told = False
        me = weakref.ref(self)  # the optimizer can outlive the look-ahead

        def before(*_: Any) -> None:
            if (rate := me()) is not None:
                rate._multiply()

        def after(*_: Any) -> None:
            if (rate := me()) is not None:
                rate._read_warmup()
                rate.release()

        def before_zero() -> None:
            if (rate := me()) is not None and rate._wanted():
                rate._steer(zero)

        hooks: list[Any] = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]
        if by_slope and zero is not None:
            hooks.append(BeforeStep(zero, before_zero))
        self._remove = weakref.finalize(self, _take_off, hooks)
        _ACTIVE[inner] = me

    @property
    def applied(self) -> float:
        """Factor of the last step; before the first step, the current factor."""
        return self.factor if self._applied is None else self._applied

    def _multiply(self) -> None:
        self.release()  # after a step that raised
        self._read_schedule()
        if self._by_slope and self._wanted():
            self._steer(self._optimizer)
        self._applied = self._factor_of_step() if self._wanted() else 1.0
        groups = self._optimizer.param_groups
        self._schedule = [_copy(group["lr"]) for group in groups]
        for group, rate in zip(groups, self._schedule, strict=True):
            _set(group, rate * self._applied)  # not `group["lr"]`: groups can share a tensor

    def _factor_of_step(self) -> float:
        if self.settled is not None and self.bounds_repeats and self._seen():
            return min(self.factor, self.settled)
        return self.factor

    def _read_schedule(self) -> None:
        """Set `share`; lower `factor` if the schedule exceeds the peak that it was found for."""
        groups = self._optimizer.param_groups
        scheduled = [group for group in groups if _peak(group) > 0]
        moving = (group for group in scheduled or groups if float(group["lr"]) > 0)
        group = next(moving, None)
        if group is None:
            self.share = 0.0 if scheduled else 1.0
            return
        rate, peak = float(group["lr"]), max(_peak(group), self.highest)
        if rate > peak * (1 + _ROUNDING):
            if peak > 0 and self.calibrated is not None:
                self.calibrated *= peak / rate
                self.factor *= peak / rate
                if self.settled is not None:
                    self.settled *= peak / rate
                self._tell()
            self.highest = peak = rate
        self.share = rate / peak

    def _tell(self) -> None:
        if not self._told:
            logger.info(
                "The schedule's learning rate rises above the peak that the first search assumed. The factor falls in "
                "proportion, so that the rate stays at the one that the search found."
            )
        self._told = True

    def _read_warmup(self) -> None:
        """Count the warm-up inside a schedule-free optimizer's step, which `lr` does not show."""
        for group in self._optimizer.param_groups:
            if (rate := float(group["lr"])) > 0 and "scheduled_lr" in group:
                self.share *= float(group["scheduled_lr"]) / rate
                return

    def _steer(self, optimizer: Any) -> None:
        self.cosine = None if self._seen() else slope_cosine(optimizer)
        if self.cosine is not None:
            known = self.calibrated is not None and self.factor > MARGIN_ABOVE * self.calibrated
            high = self.settled is not None and self.factor > self.settled
            margin = MARGIN_IF_AVERAGED if has_modes(self._optimizer) and not high else MARGIN
            lowest = LOWEST_BY_SLOPE * (1.0 if self.calibrated is None else self.calibrated)
            change = steering_factor(self.cosine, margin if known else 0.0)
            self.factor = max(self.factor * change, min(self.factor, lowest))

    def release(self) -> None:
        """Restore the schedule's rates if a step was interrupted."""
        if self._schedule is not None:
            for group, rate in zip(self._optimizer.param_groups, self._schedule, strict=False):
                _set(group, rate)
        self._schedule = None

    def close(self) -> None:
        """Restore the rates and remove the hooks. Safe to call twice."""
        self.release()
        self._remove()
        if _active(self._optimizer) is self:
            del _ACTIVE[self._optimizer]


def _take_off(hooks: Iterable[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _active(optimizer: torch.optim.Optimizer) -> LearningRateMultiplier | None:
    reference = _ACTIVE.get(optimizer)
    return reference() if reference is not None else None


def _peak(group: Mapping[str, Any]) -> float:
    """Rate that the schedule names as its highest, 0 if none: `OneCycleLR` starts far below it."""
    return float(group.get("max_lr", group.get("initial_lr", 0.0)))


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):  # captured graphs refer to this tensor
        group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
