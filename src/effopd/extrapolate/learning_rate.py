"""A factor on the learning rate, on top of whatever schedule it follows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from effopd.errors import ConfigError

#: The `SteeredRate` at work on an optimizer; neither keeps the other alive.
_AT_WORK: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[SteeredRate]] = weakref.WeakKeyDictionary()


class SteeredRate:
    """Multiplies the learning rates of an optimizer for the length of each of its steps.

    Right before a step the rate of every parameter group is multiplied by `factor`, right after it it is what it was. So no
    scheduler ever sees the factor, neither one that works from the first rates nor one that works from the last, and a
    resumed run needs nothing but the factor.

    An optimizer has one `SteeredRate` at a time. `close`, or the end of the object's life, takes its hooks off the optimizer.

    Args:
        optimizer: a `torch.optim.Optimizer`, as it is or wrapped by accelerate.
        wanted: asked before every step; while it says no, steps are taken with the schedule's rate.

    Attributes:
        factor: starts at 1.

    Raises:
        ConfigError: not an optimizer with step hooks, or another `SteeredRate` is at work on it.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rate = SteeredRate(optimizer)
        >>> rate.factor, weight.grad = 0.5, torch.ones(1)
        >>> _ = optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"], rate.applied
        (-0.5, 1.0, 0.5)
    """

    _wanted: Callable[[], bool]

    def __init__(self, optimizer: Any, wanted: Callable[[], bool] = lambda: True):
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not isinstance(inner, torch.optim.Optimizer):
            raise ConfigError(
                f"steering the learning rate needs a torch.optim.Optimizer, got {type(inner).__name__}. Pass the "
                "optimizer that takes the steps, or set steer=False."
            )
        other = _at_work(inner)
        if other is not None and other._wanted():
            raise ConfigError(
                "another look-ahead steers the learning rate of this optimizer, so their factors would multiply. Close it first "
                "(`EffOPD.close()`), or set steer=False in one of them."
            )
        if other is not None:
            other.close()
        self.factor = 1.0
        self._optimizer, self._wanted = inner, wanted
        self._schedule: list[Any] | None = None
        self._applied: float | None = None
        me = weakref.ref(self)  # an optimizer may outlive the look-ahead

        def before(*_: Any) -> None:
            if (rate := me()) is not None:
                rate._steer()

        def after(*_: Any) -> None:
            if (rate := me()) is not None:
                rate.release()

        hooks = inner.register_step_pre_hook(before), inner.register_step_post_hook(after)
        self._remove = weakref.finalize(self, _take_off, hooks)
        _AT_WORK[inner] = me

    @property
    def applied(self) -> float:
        """The factor that the last step was taken with; before the first, the one it would be taken with."""
        return self.factor if self._applied is None else self._applied

    def _steer(self) -> None:
        self.release()  # a step that raised did not get to this
        self._applied = self.factor if self._wanted() else 1.0
        groups = self._optimizer.param_groups
        self._schedule = [_copy(group["lr"]) for group in groups]
        for group in groups:
            _set(group, group["lr"] * self._applied)

    def release(self) -> None:
        """Put the scheduled rates back, if a step was interrupted."""
        if self._schedule is not None:
            for group, rate in zip(self._optimizer.param_groups, self._schedule, strict=False):
                _set(group, rate)
        self._schedule = None

    def close(self) -> None:
        """Leave the optimizer alone from now on; safe to call twice."""
        self.release()
        self._remove()
        if _at_work(self._optimizer) is self:
            del _AT_WORK[self._optimizer]


def _take_off(hooks: Iterable[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _at_work(optimizer: torch.optim.Optimizer) -> SteeredRate | None:
    found = _AT_WORK.get(optimizer)
    return found() if found is not None else None


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):  # captured graphs hold on to the tensor
        group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
