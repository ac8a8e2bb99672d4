"""`teacher_kl`: how good a candidate is, without answers and without generating anything.

Training has just sampled this step's rollouts from W and has not learned from them yet, so they are
held out from the displacement that is being judged, and exactly on-policy for W. A candidate is
scored by the divergence from the teacher that is trained, exact over the vocabulary, on them: one
student forward of a few rollouts; the teacher's hidden states are computed once per search. For a
candidate the rollouts are slightly off-policy: its divergence is that at the positions W visits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from effopd.common.distributed import all_gather_or_raise
from effopd.extrapolate.search import Score
from effopd.models.token_batch import TokenBatch


class TeacherDivergence(Protocol):
    """The divergence from one teacher that a run trains."""

    def teacher_hidden(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """The teacher's hidden states [N, H] at the N scored positions of each batch."""

    def __call__(self, model: Any, batches: Sequence[TokenBatch], teacher_hidden: Sequence[Tensor]) -> list[Tensor]:
        """D(model, teacher) [N], in nats, at the scored positions of each batch."""


class RolloutScorer:
    """−D(π_W+sD, π*), nats per token, on the first rollouts of the present step.

    Several processes score a share each of their own rollouts; all of them get the whole score.

    Args:
        divergence: D, with the teacher it is measured against.
        rollouts: how many rollouts this process scores; all of them if a step has fewer.
    """

    #: Settings of `EffOPDConfig` that this scorer is built from.
    reads = ("score_rollouts",)

    def __init__(self, divergence: TeacherDivergence, rollouts: int):
        self._divergence, self._rollouts = divergence, rollouts
        self._batches: list[TokenBatch] = []
        self._teacher: list[Tensor] | None = None

    def take(self, batches: Iterable[TokenBatch]) -> None:
        """The rollouts of a new step: its micro-batches, before any of them is trained on.

        They are scored in pieces of that size, so beside a forward of a micro-batch a search holds
        no more than the teacher's last hidden states.
        """
        self._batches, self._teacher, missing = [], None, self._rollouts
        for batch in batches:
            self._batches.append(batch.first(missing))
            missing -= len(self._batches[-1].ids_BL)
            if missing <= 0:
                break

    def drop(self) -> None:
        """Let go of the rollouts."""
        self._batches, self._teacher = [], None

    def __call__(self, model: Any) -> Score:
        assert self._batches, "the trainer hands out rollouts before it searches"
        start, forwards = time.perf_counter(), 2 if self._teacher is None else 1
        parts = all_gather_or_raise(lambda: self._part(model))
        sums, lengths = [value for part in parts for value in part[0]], [n for part in parts for n in part[1]]
        tokens = sum(part[2] for part in parts)
        mean_length = max(1, sum(lengths)) / len(lengths)
        return Score(
            mean=-sum(sums) / max(1, sum(lengths)),
            # their mean is `mean`, so that paired tests are about it
            per_example=tuple(-value / mean_length for value in sums),
            seconds=time.perf_counter() - start,
            forward_tokens=forwards * tokens,
        )

    def _part(self, model: Any) -> tuple[list[float], list[int], int]:
        """Of each rollout of this rank the summed divergence and the number of scored tokens; the
        tokens of a forward.
        """
        if self._teacher is None:
            self._teacher = self._divergence.teacher_hidden(self._batches)
        values = self._divergence(model, self._batches, self._teacher)
        sums = [each for batch, value_N in zip(self._batches, values, strict=True) for each in batch.sums(value_N)]
        lengths = [length for batch in self._batches for length in batch.lengths]
        return sums, lengths, sum(batch.tokens for batch in self._batches)
