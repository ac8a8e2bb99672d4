"""Predicting strategies: observe the first steps, fit, and jump once to the predicted weights.

The predicted update $\\hat\\Delta$ is measured from the start $W_0$, so the jump's direction is
$D = W_0 + \\hat\\Delta - W$. Parameters without a prediction stay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effopd.extrapolate.movable import Direction, MovableWeights
from effopd.extrapolate.observations import Observations
from effopd.extrapolate.search import Score, Trial
from effopd.runs.records import SearchRecord

#: Fewest observations that a prediction is made from.
FEWEST_OBSERVATIONS = 4


@dataclass(frozen=True)
class FitArgs:
    """Steps at which a strategy observes and predicts."""

    every: int = field(default=2, metadata={"help": "observe the weights every N steps"})
    until: int = field(default=16, metadata={"help": "predict and jump after this step"})

    def __post_init__(self) -> None:
        if self.every < 1 or self.until < FEWEST_OBSERVATIONS * self.every or self.until % self.every:
            raise ValueError(
                f"until must be a multiple of every and at least {FEWEST_OBSERVATIONS} times as large, because a fit "
                f"needs {FEWEST_OBSERVATIONS} observations; got every={self.every}, until={self.until}"
            )


@dataclass(frozen=True)
class Prediction:
    """Result of a fit.

    Attributes:
        delta: predicted update from the start, by parameter name; other parameters stay.
        quality: measures of the quality of the fit, by name; written to `searches.jsonl`.
    """

    delta: Mapping[str, Tensor]
    quality: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """Functions that predict an update from the first steps.

    Attributes:
        keep: update W_t − W_0 of one parameter → named tensors to store.
        predict: (observations, args, seed) → prediction.
        target: args → target accuracy; if it returns `None`, the teacher's accuracy is measured
            once. `None`: the fit needs no accuracies.
    """

    keep: Callable[[Tensor], dict[str, Tensor]]
    predict: Callable[[Observations, Any, int], Prediction]
    target: Callable[[Any], float | None] | None = None


class Predictor:
    """Observes and predicts for one run.

    Args:
        fit: the strategy's fit.
        args: the strategy's arguments.
        seed: seed of the look-ahead.
        device: device of stored tensors; `None`: the device on which they were computed.

    Attributes:
        observations: observations so far; saved with checkpoints.
        start: optimizer step from which all steps are counted.
    """

    def __init__(self, fit: Fit, args: FitArgs, seed: int, device: str | None):
        self.fit, self.args, self.seed, self._device = fit, args, seed, device
        self.observations = Observations()
        self.start = 0

    def observes(self, step: int) -> bool:
        """Whether to observe the weights after optimizer step `step`."""
        counted = step - self.start
        return 0 < counted <= self.args.until and counted % self.args.every == 0

    def predicts(self, step: int) -> bool:
        """Whether to predict and jump after optimizer step `step`."""
        return step - self.start == self.args.until

    def observe(
        self,
        step: int,
        anchor_step: int,
        weights: MovableWeights,
        *,
        score: Callable[[], Score],
        target: Callable[[], Score],
    ) -> SearchRecord:
        """Store the update from the start, and its accuracy if the fit needs one.

        Args:
            score: measures the current weights.
            target: measures the target accuracy; called at the first observation, unless the
                arguments set the target.
        """
        start, observations = time.perf_counter(), self.observations
        if self.fit.target is not None and not observations.steps:
            given = self.fit.target(self.args)
            observations.target = target() if given is None else Score(given)
        measured = score() if self.fit.target is not None else None
        tensors = {name: self.fit.keep(delta) for name, delta in weights.displacements()}
        observations.add(step - self.start, tensors, measured.mean if measured else None, self._device)
        return SearchRecord(
            step=step,
            anchor_step=anchor_step,
            delta_norm=finite_or_none(weights.displacement_norm()),
            best_scale=0.0,
            seconds=time.perf_counter() - start,
            generated_tokens=observations.take_target_tokens() + (measured.generated_tokens if measured else 0),
            forward_tokens=measured.forward_tokens if measured else 0,
            teacher_tokens=measured.teacher_tokens if measured else 0,
            trials=(Trial(0.0, measured, "start").to_record(),),
            observation=len(observations.steps),
        )

    def direction(self) -> tuple[Direction, Mapping[str, float]]:
        """D = W_0 + predicted update − W, and the quality of the fit."""
        observations = self.observations
        if len(observations.steps) < FEWEST_OBSERVATIONS:  # `reanchor` dropped earlier ones
            prediction = Prediction({}, {"observations": len(observations.steps)})
        else:
            prediction = self.fit.predict(observations, self.args, self.seed)

        def direction(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
            delta = prediction.delta.get(name)
            return torch.zeros_like(origin) if delta is None else anchor + delta.to(anchor.device) - origin

        return direction, prediction.quality

    def forget(self) -> None:
        """Drop all observations."""
        self.observations = Observations()


def finite_or_none(value: float) -> float | None:
    """The value; `None` if it is not finite, because JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None
