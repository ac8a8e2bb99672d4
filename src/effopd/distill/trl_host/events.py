"""Events of a training run that the host does not tell its callbacks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Call = Callable[..., Any]

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

    def replace(self, name: str, around: Callable[[Call], Call]) -> None:
        """Replace a method.

        Args:
            name: of the method.
            around: method → what is called in its place.
        """
        attributes, method = vars(self._trainer), getattr(self._trainer, name)
        before = attributes.get(name)
        call = [around(method)]

        def patched(*args: Any, **kwargs: Any) -> Any:
            return call[0](*args, **kwargs)

        def undo() -> None:
            call[0] = method  # a later patch on top may still call this one
            if attributes.get(name) is not patched:
                return
            if before is None:
                del attributes[name]
            else:
                attributes[name] = before

        attributes[name] = patched
        self._undo.append(undo)

    def undo(self) -> None:
        """Put the methods back; safe to call twice."""
        while self._undo:
            self._undo.pop()()


class HostEvents:
    """Events of a training run that the host does not tell its callbacks, from `attach` to
    `detach`.

    Args:
        trainer: any `transformers.Trainer`; `rollouts_ready` needs one of TRL's trainers that
            sample.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._patches: Patches | None = None

    def attach(
        self,
        *,
        active: Callable[[], bool],
        stopped: Callable[[], object],
        rate_multiplier: Callable[[], float] | None = None,
        rollouts_ready: Callable[[Sequence[Mapping[str, Any]]], object] | None = None,
    ) -> None:
        """Patch the trainer object; events of an earlier `attach` to it end.

        Args:
            active: asked before each event; False: no more events.
            stopped: called after an epoch that raised, or in which `active` became False.
            rate_multiplier: factor on the logged learning rate; the host knows the rate of the
                schedule only.
            rollouts_ready: called once per optimizer step with its micro-batches, before any of
                them is trained on. If it calls `drop_rollouts`, the step samples again.
        """
        self._patches = patches = Patches(self._trainer)
        patches.replace("_run_epoch", partial(_guarded_epoch, active, stopped))
        if rollouts_ready is not None:
            patches.replace("_prepare_inputs", partial(_announced_inputs, self._trainer, active, rollouts_ready))
        if rate_multiplier is not None:
            patches.replace("_get_learning_rate", lambda scheduled: lambda: scheduled() * rate_multiplier())

    def detach(self) -> None:
        """Leave nothing on the trainer; safe to call twice."""
        if self._patches is not None:
            self._patches.undo()
            self._patches = None


def _guarded_epoch(active: Callable[[], bool], stopped: Callable[[], object], run_epoch: Call) -> Call:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        goes_on = False
        try:
            result = run_epoch(*args, **kwargs)
            goes_on = active()
            return result
        finally:
            if not goes_on:
                stopped()

    return guarded


def _announced_inputs(trainer: Any, active: Callable[[], bool], ready: Callable[..., object], prepare: Call) -> Call:
    announced = [-1]  # the last step whose rollouts were announced

    def prepared(generation_batch: Any) -> Any:
        inputs = prepare(generation_batch)
        if trainer.model.training and trainer.state.global_step != announced[0] and active():
            announced[0] = trainer.state.global_step
            ready(trainer._buffered_inputs)
            if trainer._buffered_inputs is None:
                inputs = prepare(generation_batch)
        return inputs

    return prepared
