"""What a search does to the optimizer: clear its moments after a jump forwards, and adapt its
learning rate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.learning_rate import LearningRateMultiplier, learning_rate_factor
from effopd.extrapolate.search import SearchResult


class OptimizerUpdate:
    """Follows the searches of one run.

    Args:
        config: of the look-ahead.
        optimizer: the one that takes the steps; needed if the settings touch it.
        wanted: asked before every optimizer step whether its rate is still to be adapted.

    Attributes:
        rate: the multiplier; `None` if the learning rate is not adapted.

    Raises:
        ConfigError: there is no optimizer, or another look-ahead adapts its learning rate.
    """

    def __init__(self, config: EffOPDConfig, optimizer: torch.optim.Optimizer | None, wanted: Callable[[], bool]):
        if optimizer is None and (config.reset_moments or config.adapt_learning_rate):
            raise ConfigError(
                f"strategy '{config.strategy}' resets the optimizer's moments or adapts its learning rate: pass "
                "optimizer=…, or set reset_moments=False and adapt_learning_rate=False."
            )
        self._optimizer = optimizer if config.reset_moments else None
        self.rate = LearningRateMultiplier(optimizer, wanted) if config.adapt_learning_rate else None

    @property
    def factor(self) -> float:
        """The present multiplier of the schedule's learning rate."""
        return 1.0 if self.rate is None else self.rate.factor

    @factor.setter
    def factor(self, factor: float) -> None:
        if self.rate is not None:
            self.rate.factor = factor

    @property
    def applied(self) -> float:
        """The multiplier of the schedule's learning rate in the last optimizer step."""
        return 1.0 if self.rate is None else self.rate.applied

    def close(self) -> None:
        """Leave the optimizer alone from now on; safe to call twice."""
        if self.rate is not None:
            self.rate.close()

    def after(self, result: SearchResult, previous: float) -> float | None:
        """Apply a search; returns its factor on the learning rate, `None` if that is not adapted.

        Args:
            previous: the best scale of the search before; 0 if there was none.
        """
        tried = len(result.trials) > 1
        if self._optimizer is not None and tried and result.accepted_scale > 0:
            self._optimizer.state.clear()
        if self.rate is None:
            return None
        factor = learning_rate_factor(result.best_scale, previous, self.rate.factor) if tried else 1.0
        self.rate.factor *= factor
        return factor
