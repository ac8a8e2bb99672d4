"""Teacher predictions for a micro-batch, kept in it for the losses that still read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from effopd.distill.teachers.several import Part

#: Key of a micro-batch's `Kept`.
_KEY = "kept_teacher_parts"


class Kept:
    """Predictions for one micro-batch, released after the last loss that reads them.

    It is no container to wrappers such as DDP and FSDP2, which copy and cast the tensors in a
    forward's arguments, so every loss gets the tensors that were made.

    Args:
        reads: number of losses on this micro-batch. `None`: unknown, so that they are kept.
    """

    def __init__(self, reads: int | None = 1):
        self._reads = reads
        self.parts: list[Part] | None = None

    def read(self, make: Callable[[], list[Part]]) -> list[Part]:
        """The predictions, made now if there are none."""
        parts = make() if self.parts is None else self.parts
        if self._reads is not None:
            self._reads -= 1
        self.parts = parts if self._reads is None or self._reads > 0 else None
        return parts

    def park(self) -> None:
        """Move the predictions to host memory."""
        if self.parts is not None:
            self.parts = [part._replace(teacher=part.teacher.to(torch.device("cpu"))) for part in self.parts]


def share(rollouts: dict[str, Any], reads: int | None) -> None:
    """Let the first of several losses on a micro-batch keep its predictions for the others.

    Args:
        reads: number of these losses. `None`: unknown.
    """
    rollouts.setdefault(_KEY, Kept(reads))


def park(rollouts: Mapping[str, Any]) -> None:
    """Move the predictions kept for a micro-batch to host memory; losses move them back."""
    if (held := rollouts.get(_KEY)) is not None:
        held.park()


def make_ahead(rollouts: dict[str, Any], make: Callable[[], list[Part]]) -> list[Part]:
    """The predictions that are kept for a micro-batch, or new ones, kept for its losses."""
    held: Kept = rollouts.setdefault(_KEY, Kept())
    if held.parts is None:
        held.parts = make()
    return held.parts


def kept_or_made(rollouts: Mapping[str, Any], make: Callable[[], list[Part]]) -> list[Part]:
    """The predictions that are kept for a micro-batch, or new ones."""
    held: Kept | None = rollouts.get(_KEY)
    return make() if held is None else held.read(make)


def without_kept(rollouts: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch without predictions, for a checkpoint."""
    return {key: value for key, value in rollouts.items() if key != _KEY}
