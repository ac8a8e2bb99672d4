"""Teacher predictions for a micro-batch, kept in it for the losses that still read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from effopd.distill.teachers.several import Part

#: Opens a block in which no costs are charged.
Uncharged = Callable[[], AbstractContextManager[None]]
#: Key of a micro-batch's `Kept`, and of its `Kept.made` in a checkpoint.
_KEY, _MADE = "kept_teacher_parts", "teacher_parts_made"


class Kept:
    """Predictions for one micro-batch, released after the last loss that reads them.

    It is no container to wrappers such as DDP and FSDP2, which copy and cast the tensors in a
    forward's arguments, so every loss gets the tensors that were made.

    Args:
        reads: number of losses on this micro-batch. `None`: unknown, so that they are kept.
        made: whether they were kept, and so charged, when the checkpoint was written.

    Attributes:
        parts: the predictions; `None`: there are none now.
        made: whether they are charged: made, before a resume or since, and not released.
    """

    def __init__(self, reads: int | None = 1, *, made: bool = False):
        self._reads = reads
        self.parts: list[Part] | None = None
        self.made = made

    def get(self, make: Callable[[], list[Part]], uncharged: Uncharged) -> list[Part]:
        """The predictions, made now if there are none; without charge if kept before a resume."""
        if self.parts is None:
            with uncharged() if self.made else nullcontext():
                self.parts = make()
            self.made = True
        return self.parts

    def read(self, make: Callable[[], list[Part]], uncharged: Uncharged) -> list[Part]:
        """`get` for one of the losses; the last one releases them."""
        parts = self.get(make, uncharged)
        if self._reads is not None:
            self._reads -= 1
        if self._reads is not None and self._reads <= 0:
            self.parts, self.made = None, False  # a later search makes them again and is charged
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


def make_ahead(
    rollouts: dict[str, Any], make: Callable[[], list[Part]], uncharged: Uncharged = nullcontext
) -> list[Part]:
    """The predictions that are kept for a micro-batch, or new ones, kept for its losses."""
    held: Kept = rollouts.setdefault(_KEY, Kept())
    return held.get(make, uncharged)


def kept_or_made(
    rollouts: Mapping[str, Any], make: Callable[[], list[Part]], uncharged: Uncharged = nullcontext
) -> list[Part]:
    """The predictions that are kept for a micro-batch, or new ones, for a loss."""
    held: Kept | None = rollouts.get(_KEY)
    return make() if held is None else held.read(make, uncharged)


def for_checkpoint(rollouts: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch without predictions; they are made again after a resume."""
    saved = {key: value for key, value in rollouts.items() if key != _KEY}
    held: Kept | None = rollouts.get(_KEY)
    return saved | ({_MADE: True} if held is not None and held.made else {})


def from_checkpoint(saved: Mapping[str, Any], reads: int | None) -> dict[str, Any]:
    """The micro-batch of `for_checkpoint`.

    Args:
        reads: number of losses to come on it, as for `share`.
    """
    rollouts = {key: value for key, value in saved.items() if key != _MADE}
    return rollouts | {_KEY: Kept(reads, made=bool(saved.get(_MADE)))}


def share_with(rollouts: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Let a copy of a micro-batch share the predictions of the other one."""
    rollouts[_KEY] = other[_KEY]
