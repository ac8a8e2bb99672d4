"""Replay: the last of the steps that share rollouts trains on a random one of the last batches.

sampled batch  →  `ReplayBuffer`, the last N  →  last step of a cycle: one of them, drawn uniformly

Rollouts of earlier weights are no sample of the present policy. The divergence at a token needs
none: on any prefix it is smallest where the student equals the teacher. Training on the union of
the rollouts of all policies so far is dataset aggregation (DAgger, arXiv 1011.0686). The draw
depends on the seed and the step alone, so all processes and a resumed run make the same one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from accelerate.utils import send_to_device

from effopd.distill.teachers.kept import park, share

#: Micro-batches of one cycle.
Batch = Sequence[dict[str, Any]]


class ReplayBuffer:
    """The last `size` batches of rollouts with the teacher's predictions.

    All but the newest are in host memory.

    Args:
        size: number of batches, the newest included.
        seed: of the draws.
        device: where a drawn batch is trained on.
    """

    def __init__(self, size: int, seed: int, device: Any):
        self._batches: deque[Batch] = deque(maxlen=size)
        self._seed, self._device = seed, device

    @property
    def batches(self) -> list[Batch]:
        """The batches, oldest first."""
        return list(self._batches)

    def add(self, batch: Batch) -> None:
        """Add a new batch; the same object again, from the next micro-step, changes nothing."""
        if self._batches and self._batches[-1] is batch:
            return
        if self._batches:
            self._batches[-1] = [_parked(each) for each in self._batches[-1]]
        for micro_batch in batch:
            share(micro_batch, None)
        self._batches.append(batch)

    def restore(self, batches: Sequence[Batch]) -> None:
        """Replace all batches by those of a checkpoint.

        The teacher's predictions are made when a batch is drawn.
        """
        self._batches.clear()
        for batch in batches:
            self.add(batch)

    def draw(self, step: int) -> tuple[int, Batch]:
        """How many batches ago the batch for a step was sampled, and the batch.

        Args:
            step: completed optimizer steps.
        """
        for micro_batch in (each for batch in self.batches[:-1] for each in batch):
            park(micro_batch)  # a restored batch got its predictions in a step
        index = random.Random(f"{self._seed}:{step}").randrange(len(self._batches))
        batch = [send_to_device(each, self._device) for each in self._batches[index]]
        return len(self._batches) - 1 - index, batch


def _parked(micro_batch: dict[str, Any]) -> dict[str, Any]:
    park(micro_batch)
    return send_to_device(micro_batch, "cpu")
