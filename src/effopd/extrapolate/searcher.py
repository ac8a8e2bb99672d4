"""One search on live weights: begin → score → move → commit; an exception restores the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from effopd.common.distributed import (
    assert_same_on_ranks,
    broadcast_from_rank0,
    raise_on_all_ranks,
    rank,
    world_size,
)
from effopd.common.isolation import evaluating, isolated_rng
from effopd.errors import NonFiniteWeightsError
from effopd.extrapolate.movable import Direction, MovableWeights
from effopd.extrapolate.scorers.base import Scorer, SlopeScorer, as_score, ask
from effopd.extrapolate.search import Score, SearchResult, Trial

logger = logging.getLogger(__name__)


class Along:
    """s → Score of W + s·D, for one search; the model is moved to the point.

    Args:
        searcher: moves and scores the model.
        seed: seed of all scores.
        after_one_of_several: whether it is the first search of a run, after one of several steps on
            the scored examples.
    """

    def __init__(self, searcher: Searcher, seed: int, after_one_of_several: bool = False):
        self._searcher, self._seed, self.after_one_of_several = searcher, seed, after_one_of_several

    def __call__(self, scale: float) -> Score:
        return self._searcher.score_at(scale, self._seed)

    @contextmanager
    def with_slope(self) -> Iterator[Callable[[], tuple[float, float] | None]]:
        """In this block, the scorer keeps what it needs for the slope. Enter it at W, unscored.

        Yields a function, to be called after scales 0 and 1 have been scored. It returns the slope
        of the scored divergence at scale 0 and its Gauss–Newton curvature, or `None` if the scorer
        does not know them.
        """
        scorer = self._searcher.scorer
        if not isinstance(scorer, SlopeScorer):
            yield lambda: None
            return
        scorer.begin(self._searcher.model, self._searcher.weights)
        try:
            yield scorer.slope
        finally:
            scorer.end()


#: Result if the weights equal the anchor: there is no direction, so the model stays.
NOWHERE = SearchResult(0.0, (Trial(0.0, None, "start"),))


class Searcher:
    """Moves and scores one model.

    Args:
        model: the model that the weights belong to.
        weights: the weights that move.
        scorer: scores the model; `None` for strategies that do not score.
        seed: seed of the look-ahead.
        timeout: time limit of one score, in seconds; `None`: no limit.
    """

    def __init__(self, model: Any, weights: MovableWeights, scorer: Scorer | None, seed: int, timeout: float | None):
        self.model, self.weights, self.scorer = model, weights, scorer
        self._seed, self._timeout = seed, timeout
        self._untouched = self._warned = False

    def search(
        self,
        step: int,
        direction: Direction,
        decide: Callable[[Along], SearchResult],
        after_one_of_several: bool = False,
    ) -> tuple[SearchResult, int]:
        """Run `decide` on points along `direction` and move the model to the scale it accepts.

        Args:
            decide: (scores of W + s·D) → search result.
            after_one_of_several: passed to `Along`.

        Returns:
            The search result, and the bytes held beside the model during the search.

        Raises:
            ScorerError: the scorer failed; the weights are restored.
        """
        seed = self.seed_at(step)
        self._begin(direction)
        nbytes = self.weights.nbytes
        try:
            with evaluating(self.model):
                result = decide(Along(self, seed, after_one_of_several))
            result = self._move(result)
            if world_size() > 1:
                assert_same_on_ranks(
                    "(accepted scale, checksum of the weights)", (result.accepted_scale, self.weights.checksum())
                )
        except BaseException:
            self.weights.abort()
            raise
        self.weights.commit()
        return result, nbytes

    def score_present(self, step: int) -> Score:
        """Score of the current weights."""
        self._begin()
        try:
            with evaluating(self.model):
                return self.score_at(0.0, self.seed_at(step))
        finally:
            self.weights.abort()

    def measure(self, score: Callable[[], Score | float] | None, step: int) -> Score:
        """Rank 0's value of `score`, for example of the teacher, with this step's random seed."""
        assert score is not None, "check_model asks for a target"
        with isolated_rng(self.seed_at(step)), torch.no_grad():
            value = broadcast_from_rank0(raise_on_all_ranks(score))
        return as_score(value)

    def seed_at(self, step: int) -> int:
        """Seed shared by all scores of one step."""
        return int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0])

    def score_at(self, scale: float, seed: int) -> Score:
        """Move to a scale and score it."""
        scorer = self.scorer
        assert scorer is not None
        if scale != 0.0 or not self._untouched:  # a search starts at scale 0
            self.weights.move_to(scale)
        self._untouched = False
        asked: Scorer = (lambda model: scorer(model, scale)) if isinstance(scorer, SlopeScorer) else scorer
        score = ask(asked, self.model, scale, seed, self._timeout)
        if scale == 0.0:
            self._warn_unless_finite(score)
        return score

    def _warn_unless_finite(self, start: Score) -> None:
        """Warn once if the start of a search has no finite score."""
        if math.isfinite(start.mean) or self._warned:
            return
        self._warned = True
        if rank() == 0:
            logger.warning(
                "The scorer gave %s for the current weights: expected a finite number. Nothing can be compared with "
                "it, so the weights stay. Check the scorer and the loss; later scores like this are not reported.",
                start.mean,
            )

    def _begin(self, *direction: Direction) -> None:
        self.weights.begin(*direction)
        self._untouched = True

    def _move(self, result: SearchResult) -> SearchResult:
        """Move to the accepted scale; stay if that point, unscored so far, is not finite."""
        try:
            self.weights.move_to(result.accepted_scale)
        except NonFiniteWeightsError:
            return SearchResult(0.0, (*result.trials[:-1], Trial(result.accepted_scale, None, "non-finite")))
        return result
