"""Strategies that predict: observe the weights of the first steps, fit, and jump once to where
training leads.

The predicted displacement $\\hat\\Delta$ is measured from the start $W_0$, so the direction of the
jump is $D = W_0 + \\hat\\Delta - W$. Parameters without a prediction stay.
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

#: A line needs points: fewer observations predict nothing.
FEWEST_OBSERVATIONS = 4


@dataclass(frozen=True)
class FitArgs:
    """When a strategy observes and when it predicts."""

    every: int = field(default=2, metadata={"help": "observe the weights every N steps"})
    until: int = field(default=16, metadata={"help": "predict and jump after this step"})

    def __post_init__(self) -> None:
        if self.every < 1 or self.until < FEWEST_OBSERVATIONS * self.every or self.until % self.every:
            raise ValueError(
                f"until must be a multiple of every and at least {FEWEST_OBSERVATIONS} times "
                "as large (a line needs points), "
                f"got every={self.every}, until={self.until}"
            )


@dataclass(frozen=True)
class Prediction:
    """Where a fit says training leads.

    Attributes:
        delta: predicted displacement from the start, by parameter name; parameters left out stay
            where they are.
        quality: figures that say how far to trust it, for the log.
    """

    delta: Mapping[str, Tensor]
    quality: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """A prediction from the first steps.

    Attributes:
        keep: what to remember of one parameter's displacement W_t − W_0, as named tensors.
        predict: (observations, args, seed) → prediction.
        target: args → the accuracy to aim at, `None`: the teacher's, measured once. A fit without
            `target` needs no accuracies.
    """

    keep: Callable[[Tensor], dict[str, Tensor]]
    predict: Callable[[Observations, Any, int], Prediction]
    target: Callable[[Any], float | None] | None = None


class Predictor:
    """Observes and predicts for one run.

    Args:
        fit: of the strategy.
        args: of the strategy; a `FitArgs`.
        seed: of the look-ahead.
        device: where observed tensors are kept; `None`: where they are made.

    Attributes:
        observations: what has been observed; saved with checkpoints.
    """

    def __init__(self, fit: Fit, args: FitArgs, seed: int, device: str | None):
        self.fit, self.args, self.seed, self._device = fit, args, seed, device
        self.observations = Observations()

    def observes(self, step: int) -> bool:
        """Whether to observe the weights after optimizer step `step`."""
        return 0 < step <= self.args.until and step % self.args.every == 0

    def predicts(self, step: int) -> bool:
        """Whether to predict and jump after optimizer step `step`."""
        return step == self.args.until

    def observe(
        self,
        step: int,
        anchor_step: int,
        weights: MovableWeights,
        *,
        score: Callable[[], Score],
        target: Callable[[], Score],
    ) -> SearchRecord:
        """Remember the displacement from the start, and its accuracy if the fit needs one.

        Args:
            score: measures the present weights.
            target: measures the accuracy to aim at; asked once, unless the arguments give it.
        """
        start, seen = time.perf_counter(), self.observations
        if self.fit.target is not None and not seen.steps:
            given = self.fit.target(self.args)
            seen.target = target() if given is None else Score(given)
        measured = score() if self.fit.target is not None else None
        kept = {name: self.fit.keep(delta) for name, delta in weights.displacements()}
        seen.add(step, kept, measured.mean if measured else None, self._device)
        return SearchRecord(
            step=step,
            anchor_step=anchor_step,
            delta_norm=finite_or_none(weights.displacement_norm()),
            best_scale=0.0,
            seconds=time.perf_counter() - start,
            generated_tokens=seen.take_target_tokens() + (measured.generated_tokens if measured else 0),
            forward_tokens=measured.forward_tokens if measured else 0,
            trials=(Trial(0.0, measured, "start").to_record(),),
            observation=len(seen.steps),
        )

    def direction(self) -> tuple[Direction, Mapping[str, float]]:
        """D = W_0 + predicted displacement − W, and how far to trust it."""
        seen = self.observations
        if len(seen.steps) < FEWEST_OBSERVATIONS:  # `reanchor` dropped the others
            prediction = Prediction({}, {"observations": len(seen.steps)})
        else:
            prediction = self.fit.predict(seen, self.args, self.seed)

        def direction(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
            delta = prediction.delta.get(name)
            return torch.zeros_like(origin) if delta is None else anchor + delta.to(anchor.device) - origin

        return direction, prediction.quality

    def forget(self) -> None:
        """Start anew from the present weights."""
        self.observations = Observations()


def finite_or_none(value: float) -> float | None:
    """The value as JSON can hold it."""
    return value if math.isfinite(value) else None
