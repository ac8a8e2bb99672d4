"""Drift of the student from stored rollouts: the mean ratio π_θ(y) / π_ref(y), watched and guarded.

The monitor reads the tokens of every training step. The guard measures a fixed sample of the stored
rollouts at every candidate of a look-ahead, because a jump multiplies the update and with it the
drift.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from effopd.common.distributed import all_gather_object, rank
from effopd.distill.offline_loss import DriftSums
from effopd.extrapolate.search import Score

logger = logging.getLogger(__name__)


def all_ranks(sums: DriftSums) -> DriftSums:
    """Sums over all processes; call it on each."""
    return sum(all_gather_object(sums), DriftSums())


class DriftMonitor:
    """Collects the sums of a step's micro-batches; warns when the mean leaves 1 ± band.

    Args:
        band: allowed distance of the mean from 1; `None`: any.
        folder: the rollouts, for the message.
    """

    def __init__(self, band: float | None, folder: str):
        self._band, self._folder = band, folder
        self._sums, self._outside = DriftSums(), False

    def add(self, sums: DriftSums) -> None:
        """Add a micro-batch."""
        self._sums += sums

    def finish_step(self, step: int) -> dict[str, float]:
        """Statistics of the step over all processes, for its row; warns once per excursion."""
        sums, self._sums = all_ranks(self._sums), DriftSums()
        outside = self._band is not None and bool(sums.tokens) and not sums.inside(self._band)
        if outside and not self._outside and rank() == 0:
            logger.warning(
                "Step %d: the student has drifted from the stored rollouts. The mean of π_θ(y)/π_ref(y) is %.3f "
                "(standard deviation %.3f), outside 1 ± %g. Lower the learning rate or train fewer steps, or collect "
                "new rollouts from the current weights: effopd cache --model_name_or_path CHECKPOINT (now: %s).",
                step,
                sums.mean,
                sums.std,
                self._band,
                self._folder,
            )
        self._outside = outside
        return sums.metrics()


class DriftGuard:
    """A look-ahead's scorer that refuses candidates whose mean ratio is outside 1 ± band.

    A refused candidate has the score NaN, which no gate accepts. The search's start is always
    scored, so a student that has drifted already can still stay where it is, or move back.

    It has the methods of `SlopeScorer`, through which a search tells the scale; it knows no slope.

    Args:
        scorer: the scorer of the look-ahead.
        measure: model → (sums on this process's sample, tokens in its forward passes).
        band: allowed distance of the mean from 1.
    """

    def __init__(self, scorer: Any, measure: Callable[[Any], tuple[DriftSums, int]], band: float):
        self._scorer, self._measure, self._band = scorer, measure, band

    def __getattr__(self, name: str) -> Any:
        if name == "_scorer":  # not built yet
            raise AttributeError(name)
        return getattr(self._scorer, name)

    def begin(self, model: Any, weights: Any) -> None:
        """Nothing to prepare."""

    def slope(self) -> None:
        """`None`: the slope is not known."""

    def end(self) -> None:
        """Nothing to release."""

    def __call__(self, model: Any, scale: float | None = None) -> Score:
        """Score of a candidate, or NaN if it has drifted too far; the drift is measured first."""
        if not scale:
            return self._scored(model)
        sums, tokens = self._measure(model)
        sums, tokens = all_ranks(sums), sum(all_gather_object(tokens))
        if sums.inside(self._band):
            score = self._scored(model)
            return replace(score, forward_tokens=score.forward_tokens + tokens)
        if rank() == 0:
            logger.warning(
                "The look-ahead refused scale %g: the mean of π_θ(y)/π_ref(y) on stored rollouts would be %.3f "
                "(standard deviation %.3f), outside 1 ± %g.",
                scale,
                sums.mean,
                sums.std,
                self._band,
            )
        return Score(math.nan, forward_tokens=tokens)

    def _scored(self, model: Any) -> Score:
        value = self._scorer(model)
        return value if isinstance(value, Score) else Score(float(value))
