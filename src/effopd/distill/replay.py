"""Replay: the last of the steps that share rollouts trains on a random one of the last batches.

sampled batch  →  `ReplayBuffer`, the last N  →  last step of a cycle: one of them, drawn uniformly

Rollouts of earlier weights are no sample of the present policy. The divergence at a token needs
none: on any prefix it is smallest where the student equals the teacher. Training on the union of
the rollouts of all policies so far is dataset aggregation (DAgger, arXiv 1011.0686). The draw
depends on the seed and the step alone, so all processes and a resumed run make the same one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from accelerate.utils import send_to_device

from effopd.distill.teachers.kept import from_checkpoint, park, share

#: Micro-batches of one cycle.
Batch = Sequence[dict[str, Any]]


class ReplayBuffer:
    """The last `size` batches of rollouts with the teacher's predictions.

    All but the newest are in host memory, and so are their predictions, from the next `add` on.

    Args:
        size: number of batches, the newest included.
        seed: of the draws.
        device: where a drawn micro-batch is trained on.

    Attributes:
        batches: oldest first.
    """

    def __init__(self, size: int, seed: int, device: Any):
        self.batches: list[Batch] = []
        self._size, self._seed, self._device = size, seed, device

    def add(self, batch: Batch) -> None:
        """Add a new batch; the same object again, from the next micro-step, changes nothing."""
        if self.batches and self.batches[-1] is batch:
            return
        for micro_batch in batch:
            share(micro_batch, None)
        older = [[_parked(each) for each in one] for one in self.batches]
        self.batches = [*older, batch][-self._size :]

    def restore(self, batches: Sequence[Batch]) -> None:
        """Replace all batches by those of a checkpoint.

        The teacher's predictions are made when a batch is drawn, without charge if they had been
        made before.
        """
        self.batches = []
        for batch in batches:
            self.add([from_checkpoint(each, None) for each in batch])

    def draw(self, step: int, index: int, size: int) -> tuple[int, dict[str, Any]]:
        """How many batches ago the batch for a step was sampled, and one of its micro-batches.

        Args:
            step: completed optimizer steps.
            index: of the micro-batch among those of the step.
            size: micro-batches per step. Of a batch in several parts, one part is drawn.
        """
        draw = random.Random(f"{self._seed}:{step}")
        chosen = draw.randrange(len(self.batches))
        batch = self.batches[chosen]
        part = draw.randrange(len(batch) // size)
        return len(self.batches) - 1 - chosen, send_to_device(batch[part * size + index], self._device)


def _parked(micro_batch: dict[str, Any]) -> dict[str, Any]:
    park(micro_batch)
    return send_to_device(micro_batch, "cpu")
