"""A factor on the learning rate, on top of whatever schedule it follows."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from effopd.errors import ConfigError


class SteeredRate:
    """Multiplies the learning rates of an optimizer for the length of each of its steps.

    Right before a step the rate of every parameter group is multiplied by `factor`, right after it it is what it was. So no
    scheduler ever sees the factor, neither one that works from the first rates nor one that works from the last, and a
    resumed run needs nothing but the factor.

    Args:
        optimizer: a `torch.optim.Optimizer`, as it is or wrapped by accelerate.

    Attributes:
        factor: starts at 1.

    Raises:
        ConfigError: not an optimizer with step hooks.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rate = SteeredRate(optimizer)
        >>> rate.factor, weight.grad = 0.5, torch.ones(1)
        >>> _ = optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (-0.5, 1.0)
    """

    def __init__(self, optimizer: Any):
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not isinstance(inner, torch.optim.Optimizer):
            raise ConfigError(
                f"steering the learning rate needs a torch.optim.Optimizer, got {type(inner).__name__}. Pass the "
                "optimizer that takes the steps, or set steer=False."
            )
        self.factor = 1.0
        self._optimizer, self._schedule = inner, None
        me = weakref.ref(self)  # an optimizer outlives the look-ahead of one training run

        def before(*_: Any) -> None:
            if (rate := me()) is not None:
                rate._steer()

        def after(*_: Any) -> None:
            if (rate := me()) is not None:
                rate.release()

        self._hooks = inner.register_step_pre_hook(before), inner.register_step_post_hook(after)

    _schedule: list[Any] | None

    def _steer(self) -> None:
        self.release()  # a step that raised did not get to this
        groups = self._optimizer.param_groups
        self._schedule = [_copy(group["lr"]) for group in groups]
        for group in groups:
            _set(group, group["lr"] * self.factor)

    def release(self) -> None:
        """Put the scheduled rates back, if a step was interrupted."""
        if self._schedule is not None:
            for group, rate in zip(self._optimizer.param_groups, self._schedule, strict=False):
                _set(group, rate)
        self._schedule = None

    def close(self) -> None:
        """Leave the optimizer alone from now on."""
        self.release()
        for hook in self._hooks:
            hook.remove()


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):  # captured graphs hold on to the tensor
        group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
