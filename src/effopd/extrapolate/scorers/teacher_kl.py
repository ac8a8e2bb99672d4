"""`teacher_kl` scorer: negative divergence from the teacher on rollouts not yet trained on.

The rollouts of the next step were sampled from W and not yet trained on. They are on-policy for W,
and the update Δ was not fitted to them. The divergence is the one that is trained, exact over the
vocabulary. Cost: one student forward pass per candidate on a few rollouts. The teacher's forward
pass is made once per search, and the loss of the step reuses it if the trainer keeps it. No answers
and no generation are needed.

For a candidate the rollouts are slightly off-policy: its divergence is measured at the positions
that W visits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from effopd.common.distributed import all_gather_or_raise
from effopd.extrapolate.search import Score
from effopd.models.token_batch import TokenBatch


class TeacherDivergence(Protocol):
    """The divergence from the teacher that a run trains on."""

    def teacher_hidden(self, batches: Sequence[TokenBatch]) -> list[Any]:
        """The teacher's part of D at the N scored positions of each batch.

        Hidden states [N, H] of a teacher in memory, or the top k of a served teacher.
        """

    def from_predictions(self, batches: Sequence[TokenBatch], predictions: Sequence[Any]) -> list[Any]:
        """`teacher_hidden` without a forward pass, from the predictions that the loss reads.

        Args:
            batches: the first rows of micro-batches.
            predictions: the teacher's predictions for the whole micro-batches.
        """

    def __call__(
        self,
        model: Any,
        batches: Sequence[TokenBatch],
        teacher_hidden: Sequence[Any],
        keep: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """D(model, teacher) [N], in nats, at the scored positions of each batch.

        Args:
            keep: the student's hidden states of each batch are appended to it, if it is a list.
        """

    def moving_head(self, model: Any, weights: Any) -> Any | None:
        """The output layer of `model` along W + s·Δ; `None`: the slope of D is not implemented."""

    def slope(
        self, head: Any, teacher_hidden: Sequence[Any], hidden: Mapping[float, Sequence[Tensor]]
    ) -> tuple[float, float]:
        """Σ over positions of D′(0) and of its Gauss–Newton D″(0), from hidden states by scale."""


class RolloutScorer:
    """−D(student, teacher) on the first rollouts of a step, mean over scored tokens, in nats.

    With several processes, each scores rollouts of its own and all return the full score.

    Args:
        divergence: D, bound to its teacher.
        rollouts: number of rollouts scored by this process; all if a step has fewer.
        most: the same for `take(…, most=True)`; default: `rollouts`.
    """

    #: Settings of `EffOPDConfig` that this scorer is built from.
    reads = ("score_rollouts",)

    def __init__(self, divergence: TeacherDivergence, rollouts: int, most: int | None = None):
        self._divergence, self._rollouts, self._most = divergence, rollouts, rollouts if most is None else most
        self._batches: list[TokenBatch] = []
        self._places: list[int] = []  # their places among the step's micro-batches
        self._teacher: list[Any] | None = None
        self._line_head: Any | None = None
        self._hidden: dict[float, list[Tensor]] = {}

    def take(self, batches: Iterable[TokenBatch], *, most: bool = False) -> None:
        """Set the rollouts to score: the micro-batches of the next step.

        Micro-batches are scored one at a time. The search therefore needs the memory of one
        micro-batch's forward pass, plus the teacher's last hidden states.

        Args:
            most: whether to score `most` rollouts instead of `rollouts`.
        """
        self._batches, self._places, self._teacher = [], [], None
        missing = self._most if most else self._rollouts
        for place, batch in enumerate(batches):
            if len(batch.ids_BL):  # else none of its rollouts can be scored
                self._batches.append(batch.first(missing))
                self._places.append(place)
                missing -= len(self._batches[-1].ids_BL)
            if missing <= 0:
                break

    def use_predictions(self, predictions: Iterable[Any]) -> None:
        """Score with these predictions of the teacher for the micro-batches; do not ask it again.

        Args:
            predictions: one entry per micro-batch; read up to the last that is scored.
        """
        read = itertools.islice(predictions, self._places[-1] + 1)
        made = [each for place, each in enumerate(read) if place in self._places]
        self._teacher = self._divergence.from_predictions(self._batches, made)

    def drop(self) -> None:
        """Release the rollouts."""
        self._batches, self._teacher = [], None

    def begin(self, model: Any, weights: Any) -> None:
        """Begin a line from the current weights W, for `slope`. Ends with `end`."""
        moving_head = getattr(self._divergence, "moving_head", None)
        self._line_head, self._hidden = moving_head and moving_head(model, weights), {}

    def end(self) -> None:
        """Release what `begin` holds."""
        self._line_head, self._hidden = None, {}

    def slope(self) -> tuple[float, float] | None:
        """D′(0) and its Gauss–Newton D″(0) on the scored tokens, in nats, from scores 0 and 1.

        `None`: not implemented for this divergence or model.
        """
        if self._line_head is None or not {0.0, 1.0} <= self._hidden.keys():
            return None
        head, teacher, hidden = self._line_head, self._teacher, self._hidden
        assert teacher is not None, "scores come first"
        parts = all_gather_or_raise(
            lambda: (*self._divergence.slope(head, teacher, hidden), sum(len(h) for h in hidden[0.0]))
        )
        first, second, positions = (sum(column) for column in zip(*parts, strict=True))
        return (first / positions, second / positions) if positions else None

    def __call__(self, model: Any, scale: float | None = None) -> Score:
        assert self._batches, "the trainer hands out rollouts before it searches"
        start, forwards = time.perf_counter(), 2 if self._teacher is None else 1
        keep: list[Tensor] | None = [] if self._line_head is not None and scale in (0.0, 1.0) else None
        parts = all_gather_or_raise(lambda: self._part(model, keep))
        if keep is not None and scale is not None:
            self._hidden[scale] = keep
        sums, lengths = [value for part in parts for value in part[0]], [n for part in parts for n in part[1]]
        tokens = sum(part[2] for part in parts)
        mean_length = max(1, sum(lengths)) / len(lengths)
        return Score(
            mean=-sum(sums) / max(1, sum(lengths)),
            # scaled so that their mean equals `mean`
            per_example=tuple(-value / mean_length for value in sums),
            seconds=time.perf_counter() - start,
            forward_tokens=forwards * tokens,
            teacher_tokens=(forwards - 1) * tokens,
        )

    def _part(self, model: Any, keep: list[Tensor] | None) -> tuple[list[float], list[int], int]:
        """Summed divergence and scored tokens per rollout of this rank; tokens per forward pass."""
        if self._teacher is None:
            self._teacher = self._divergence.teacher_hidden(self._batches)
        more = {} if keep is None else {"keep": keep}
        values = self._divergence(model, self._batches, self._teacher, **more)
        sums = [each for batch, value_N in zip(self._batches, values, strict=True) for each in batch.sums(value_N)]
        lengths = [length for batch in self._batches for length in batch.lengths]
        return sums, lengths, sum(batch.tokens for batch in self._batches)
