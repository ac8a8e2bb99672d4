"""Optimizer changes of a search: move weight copies, clear moments, adapt the learning rate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from effopd.common.distributed import rank
from effopd.common.zero import base_optimizer
from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.learning_rate import (
    LearningRateMultiplier,
    calibrated_factor,
    learning_rate_factor,
    repeated_factor,
)
from effopd.extrapolate.search import SearchResult
from effopd.extrapolate.weight_copies import Movable, carried, clear_state, evaluated, has_modes, sizes_steps
from effopd.runs.records import SearchRecord

logger = logging.getLogger(__name__)


class OptimizerUpdate:
    """Moves one optimizer's copies of the weights, clears its moments, adapts its learning rate.

    Args:
        config: settings of the look-ahead.
        optimizer: the training loop's optimizer; required if `reset_moments` or
            `adapt_learning_rate` is set.
        wanted: called before every optimizer step; the rate is adapted while it returns true.
        averages: copies of the weights outside the optimizer, which follow a jump.
        updates: number of consecutive optimizer steps on the same examples.
        seen: see `LearningRateMultiplier`; also called after a search, before the next gradient.
        lora: whether the parameters are LoRA factors.

    Attributes:
        rate: the multiplier; `None` if the learning rate is not adapted. That of optimizers that
            estimate the length of their steps never is: both corrections would multiply.

    Raises:
        ConfigError: the optimizer is missing, another look-ahead adapts its learning rate, or an
            average cannot be moved.
    """

    def __init__(
        self,
        config: EffOPDConfig,
        optimizer: torch.optim.Optimizer | None,
        wanted: Callable[[], bool],
        averages: Sequence[Movable] = (),
        *,
        updates: int = 1,
        seen: Callable[[], bool] = lambda: False,
        lora: bool = False,
    ):
        if optimizer is None and (config.reset_moments or config.adapt_learning_rate):
            raise ConfigError(
                f"strategy '{config.strategy}' resets the optimizer's moments or adapts its learning rate: pass "
                "optimizer=…, or set reset_moments=False and adapt_learning_rate=False."
            )
        _check_averages(averages, optimizer)
        self._optimizer, self._averages, self._lora = optimizer, averages, lora
        self._resets = config.reset_moments
        self._calibrates = config.rules.calibrates_rate
        self._updates, self._seen = updates, seen
        adapts = config.adapt_learning_rate
        if adapts and sizes_steps(optimizer):
            adapts = False
            if rank() == 0:
                logger.warning(
                    "%s estimates the length of its steps itself, so the look-ahead does not adapt its learning rate: "
                    "the two corrections would multiply.",
                    type(base_optimizer(optimizer)).__name__,
                )
        self.rate = (
            LearningRateMultiplier(optimizer, wanted, by_slope=config.rules.steers_by_slope, seen=seen)
            if adapts
            else None
        )

    @property
    def factor(self) -> float:
        """Current multiplier of the schedule's learning rate."""
        return 1.0 if self.rate is None else self.rate.factor

    @property
    def applied(self) -> float:
        """Multiplier of the schedule's learning rate in the last optimizer step."""
        return 1.0 if self.rate is None else self.rate.applied

    @property
    def finds_rate(self) -> bool:
        """Whether the next search sets the learning rate, because none has yet."""
        return self._calibrates and self.rate is not None and self.rate.calibrated is None

    @property
    def after_one_of_several(self) -> bool:
        """Whether the next search sets the rate, after one of several steps on its examples."""
        return self.finds_rate and self._updates > 1 and self._seen()

    def state_dict(self) -> dict[str, float | None]:
        """State of the learning rate."""
        return {
            "learning_rate_factor": self.factor,
            "schedule_share": 1.0 if self.rate is None else self.rate.share,
            "highest_rate": 0.0 if self.rate is None else self.rate.highest,
            "calibrated_factor": None if self.rate is None else self.rate.calibrated,
            "settled_factor": None if self.rate is None else self.rate.settled,
            "bounds_repeats": self.rate is not None and self.rate.bounds_repeats,
        }

    def resume(self, state: Mapping[str, Any], history: Sequence[SearchRecord]) -> None:
        """Continue with a saved state and history; states of older versions lack some values."""
        if self.rate is not None:
            self.rate.factor = float(state["learning_rate_factor"])
            self.rate.share = float(state.get("schedule_share", 1.0))
            self.rate.highest = float(state.get("highest_rate", 0.0))
            self.rate.calibrated = state.get("calibrated_factor") or self._calibrated(history)
            self.rate.settled = state.get("settled_factor")
            self.rate.bounds_repeats = bool(state.get("bounds_repeats"))

    def close(self) -> None:
        """Remove all hooks from the optimizer. Safe to call twice."""
        if self.rate is not None:
            self.rate.close()

    def carried(self) -> AbstractContextManager[int]:
        """Block of a search: it starts at the weights to evaluate, and all copies follow a jump.

        Gives the memory that it holds, in bytes.

        Raises:
            ConfigError: the optimizer keeps copies that cannot follow.
        """
        return carried(self._optimizer, self._averages, lora=self._lora)

    def evaluated(self) -> AbstractContextManager[None]:
        """Block in which the parameters are the weights to evaluate."""
        return nullcontext() if self._optimizer is None else evaluated(self._optimizer)

    def after(self, result: SearchResult, history: Sequence[SearchRecord]) -> float | None:
        """Apply the result of a search to the optimizer.

        Args:
            result: the search; one without candidates changes nothing.
            history: the searches before it.

        Returns:
            The factor by which the learning rate changed; `None` if it is not adapted.
        """
        tried = len(result.trials) > 1
        if self._resets and self._optimizer is not None and tried and result.accepted_scale > 0:
            clear_state(self._optimizer)
        if self.rate is None:
            return None
        settles = self.finds_rate and self._updates > 1
        factor = self._factor(self.rate, result, history) if tried else 1.0
        self.rate.factor *= factor
        if self._calibrates and tried and (self.rate.calibrated is None or factor > 1):
            self.rate.calibrated = self.rate.factor
            if settles:
                self.rate.bounds_repeats = not self._seen()
                self.rate.settled = self.rate.factor / self._updates**0.5
            elif self.rate.settled is not None:
                self.rate.settled *= factor
        return factor

    def _factor(self, rate: LearningRateMultiplier, result: SearchResult, history: Sequence[SearchRecord]) -> float:
        best_scale = result.best_scale
        if self._calibrates:
            averaged = has_modes(self._optimizer)
            if rate.calibrated is None:
                return calibrated_factor(best_scale, rate.share, averaged=averaged) * rate.applied / rate.factor
            if result.accepted_scale > 0:
                return repeated_factor(best_scale, averaged=averaged)
            return learning_rate_factor(best_scale, total=rate.factor / rate.calibrated)
        previous = history[-1].best_scale if history else None
        return learning_rate_factor(best_scale, previous or 0.0, rate.factor)

    def _calibrated(self, history: Sequence[SearchRecord]) -> float | None:
        """The factor that the first search set, or the last one that raised it."""
        searched = [search for search in history if search.searched] if self._calibrates else []
        raised = [search for search in searched[1:] if (search.learning_rate_factor or 1.0) > 1]
        setting = [*searched[:1], *raised]
        return (setting[-1].learning_rate_factor_total or 1.0) if setting else None


def _check_averages(averages: Sequence[Movable], optimizer: Any) -> None:
    if averages and optimizer is None:
        raise ConfigError("averages=… follow the parameters of an optimizer: pass optimizer=… too.")
    for average in averages:
        if not callable(getattr(average, "translate", None)):
            raise ConfigError(
                f"averages: {type(average).__name__} has no method translate(parameter, change), which adds the "
                "change of a jump to the average of a parameter. Wrap it in a class that has one."
            )
