"""Teacher predictions that a search made for a micro-batch, kept in it for the loss of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effopd.distill.teachers.several import Part

#: Key of a micro-batch's `Kept`.
_KEY = "kept_teacher_parts"


class Kept:
    """Predictions for one micro-batch, for one reader.

    It is no container to wrappers such as DDP and FSDP2, which copy and cast the tensors in a
    forward's arguments, so the loss gets the tensors that were made.
    """

    def __init__(self, parts: list[Part]):
        self._parts: list[Part] | None = parts

    def take(self) -> list[Part] | None:
        """The predictions, which are released here; `None` after the first call."""
        parts, self._parts = self._parts, None
        return parts


def keep(rollouts: dict[str, Any], parts: list[Part]) -> None:
    """Keep the teacher's predictions for a micro-batch in it."""
    rollouts[_KEY] = Kept(parts)


def taken(rollouts: Mapping[str, Any]) -> list[Part] | None:
    """The predictions that `keep` left, once; `None`: there are none."""
    kept: Kept | None = rollouts.get(_KEY)
    return None if kept is None else kept.take()
