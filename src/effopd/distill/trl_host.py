"""Changes to a host trainer that last as long as one training run, and what the host does not tell its callbacks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The patches in place on a trainer; neither keeps the other alive.
_IN_PLACE: weakref.WeakKeyDictionary[Any, weakref.ref[Patches]] = weakref.WeakKeyDictionary()


class Patches:
    """Methods of one trainer object, replaced until `undo`; its class is never touched.

    A trainer has one `Patches` at a time: a new one undoes what an earlier one left.

    Args:
        trainer: any object with methods.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._undo: list[Callable[[], None]] = []
        earlier = _IN_PLACE.get(trainer)
        if earlier is not None and (left := earlier()) is not None:
            left.undo()
        _IN_PLACE[trainer] = weakref.ref(self)

    def replace(self, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a method.

        Args:
            name: of the method.
            around: method → what is called in its place.
        """
        own, method = vars(self._trainer), getattr(self._trainer, name)
        before = own.get(name)
        call = [around(method)]

        def patched(*args: Any, **kwargs: Any) -> Any:
            return call[0](*args, **kwargs)

        def undo() -> None:
            call[0] = method  # somebody else's patch on top may still call this one
            if own.get(name) is not patched:
                return
            if before is None:
                del own[name]
            else:
                own[name] = before

        own[name] = patched
        self._undo.append(undo)

    def undo(self) -> None:
        """Put the methods back; safe to call twice."""
        while self._undo:
            self._undo.pop()()


def resumed_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint that the training loop now running was given.

    Callbacks are not told, and the trainer keeps no record, so this reads the argument of `Trainer._inner_training_loop`
    off the stack.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            found = frame.f_locals.get("resume_from_checkpoint")
            return Path(found) if found else None
        frame = frame.f_back  # type: ignore[assignment]
    return None
