"""`next_batch_loss` scorer: the trainer's own negative loss on the next batch, before its step.

The batch of the next step was not trained on, so the update Δ was not fitted to it. The loss is the
one that is trained, whatever it is: no teacher, no answers and no generation are needed. Cost: one
forward pass per candidate on a few examples, with the reference or teacher of the loss, if any.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from effopd.common.distributed import all_gather_or_raise
from effopd.extrapolate.search import Score


@dataclass(frozen=True)
class ExampleLosses:
    """Losses of the scored examples of one process, and the cost of computing them.

    Attributes:
        values: one loss per example; their mean is the loss of the step, if all are scored.
        forward_tokens: tokens in forward passes.
        teacher_tokens: the part of `forward_tokens` in frozen models.
    """

    values: tuple[float, ...]
    forward_tokens: int = 0
    teacher_tokens: int = 0


class BatchLoss(Protocol):
    """The loss that a run trains on, example by example."""

    def select(self, micro_batches: Sequence[Mapping[str, Any]], num_items: Any) -> Any:
        """The examples to score, from the micro-batches of a step."""

    def __call__(self, model: Any, selected: Any) -> ExampleLosses:
        """Losses of the selected examples of this process at the current weights."""


class NextBatchLoss:
    """−loss of the trainer on examples of the next step, mean over examples, in the loss's unit.

    With several processes, each scores examples of its own and all return the full score.

    Args:
        loss: the trainer's loss.
    """

    #: Settings of `EffOPDConfig` that this scorer is built from.
    reads = ("score_rollouts",)

    def __init__(self, loss: BatchLoss):
        self._loss = loss
        self._next: tuple[Sequence[Mapping[str, Any]], Any] | None = None
        self._selected: Any = None

    def take(self, micro_batches: Sequence[Mapping[str, Any]], num_items: Any) -> None:
        """Set the batch to score: the micro-batches of a new step, not yet trained on.

        Args:
            num_items: number by which the trainer divides the loss of this step, if any.
        """
        self._next, self._selected = (micro_batches, num_items), None

    def drop(self) -> None:
        """Release the batch."""
        self._next = self._selected = None

    def __call__(self, model: Any) -> Score:
        assert self._next is not None, "the trainer hands out the next batch before it searches"
        start = time.perf_counter()
        if self._selected is None:
            self._selected = self._loss.select(*self._next)
        parts = all_gather_or_raise(lambda: self._loss(model, self._selected))
        values = [-value for part in parts for value in part.values]
        return Score(
            mean=sum(values) / len(values),
            per_example=tuple(values),
            seconds=time.perf_counter() - start,
            forward_tokens=sum(part.forward_tokens for part in parts),
            teacher_tokens=sum(part.teacher_tokens for part in parts),
        )
