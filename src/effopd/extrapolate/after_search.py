"""Optimizer changes after a search: clear the moments, adapt the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.learning_rate import (
    LearningRateMultiplier,
    calibrated_factor,
    learning_rate_factor,
    took_first_step,
)
from effopd.extrapolate.search import SearchResult


class OptimizerUpdate:
    """Clears the moments and adapts the learning rate of one optimizer, as the settings require.

    Args:
        config: settings of the look-ahead.
        optimizer: the training loop's optimizer; required if `reset_moments` or
            `adapt_learning_rate` is set.
        wanted: called before every optimizer step; the rate is adapted while it returns true.

    Attributes:
        rate: the multiplier; `None` if the learning rate is not adapted.

    Raises:
        ConfigError: the optimizer is missing, or another look-ahead adapts its learning rate.
    """

    def __init__(self, config: EffOPDConfig, optimizer: torch.optim.Optimizer | None, wanted: Callable[[], bool]):
        if optimizer is None and (config.reset_moments or config.adapt_learning_rate):
            raise ConfigError(
                f"strategy '{config.strategy}' resets the optimizer's moments or adapts its learning rate: pass "
                "optimizer=…, or set reset_moments=False and adapt_learning_rate=False."
            )
        self._optimizer = optimizer if config.reset_moments else None
        self._calibrates = config.rules.calibrates_rate
        self.rate = (
            LearningRateMultiplier(optimizer, wanted, by_slope=config.rules.steers_by_slope)
            if config.adapt_learning_rate
            else None
        )

    @property
    def factor(self) -> float:
        """Current multiplier of the schedule's learning rate."""
        return 1.0 if self.rate is None else self.rate.factor

    @factor.setter
    def factor(self, factor: float) -> None:
        if self.rate is not None:
            self.rate.factor = factor

    @property
    def applied(self) -> float:
        """Multiplier of the schedule's learning rate in the last optimizer step."""
        return 1.0 if self.rate is None else self.rate.applied

    def close(self) -> None:
        """Remove all hooks from the optimizer. Safe to call twice."""
        if self.rate is not None:
            self.rate.close()

    def after(self, result: SearchResult, previous: float) -> float | None:
        """Apply the result of a search to the optimizer.

        Args:
            result: the search; one without candidates changes nothing.
            previous: best scale of the previous search; 0 if there was none.

        Returns:
            The factor by which the learning rate changed; `None` if it is not adapted.
        """
        tried = len(result.trials) > 1
        factor = self._factor(result.best_scale, previous) if tried else 1.0
        if self._optimizer is not None and tried and result.accepted_scale > 0:
            self._optimizer.state.clear()
        if self.rate is None:
            return None
        self.rate.factor *= factor
        return factor

    def _factor(self, best_scale: float, previous: float) -> float:
        if self.rate is None:
            return 1.0
        if self._calibrates and took_first_step(self.rate.optimizer):
            return calibrated_factor(best_scale) * self.rate.applied / self.rate.factor
        return learning_rate_factor(best_scale, previous, self.rate.factor)
