"""Events of a training run for which the host has no callback."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Call = Callable[..., Any]

#: Trainer → its current patches; both references are weak.
_IN_PLACE: weakref.WeakKeyDictionary[Any, weakref.ref[Patches]] = weakref.WeakKeyDictionary()


class Patches:
    """Replaces methods of one trainer object until `undo`; its class is never changed.

    A trainer has one `Patches` at a time: a new one first undoes an earlier one.

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
            name: name of the method.
            around: maps the method to its replacement.
        """
        attributes, method = vars(self._trainer), getattr(self._trainer, name)
        before = attributes.get(name)
        call = [around(method)]

        def patched(*args: Any, **kwargs: Any) -> Any:
            return call[0](*args, **kwargs)

        def undo() -> None:
            call[0] = method  # a later patch may still call this one
            if attributes.get(name) is not patched:
                return
            if before is None:
                del attributes[name]
            else:
                attributes[name] = before

        attributes[name] = patched
        self._undo.append(undo)

    def undo(self) -> None:
        """Restore the methods; safe to call twice."""
        while self._undo:
            self._undo.pop()()


class HostEvents:
    """Events of a training run for which the host has no callback, from `attach` to `detach`.

    Args:
        trainer: any `transformers.Trainer`; `rollouts_ready` needs a TRL trainer that samples.
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
        batch_ready: Callable[[Sequence[Mapping[str, Any]], Any], object] | None = None,
    ) -> None:
        """Patch the trainer object; ends the events of an earlier `attach` to it.

        Args:
            active: called before `rollouts_ready` and after each epoch; False: no more events.
            stopped: called after an epoch that raised, or after which `active` is False.
            rate_multiplier: factor on the logged learning rate; the host logs only the schedule's
                rate.
            rollouts_ready: called once per optimizer step with the micro-batches that it and later
                steps train on, its own first, before training on any of its own. If it calls
                `drop_rollouts`, the step samples again.
            batch_ready: called once per optimizer step with its micro-batches, before training on
                any of them, and with the number of items that the host divides the loss by. For
                any trainer.
        """
        self._patches = patches = Patches(self._trainer)
        patches.replace("_run_epoch", partial(_guarded_epoch, active, stopped))
        if rollouts_ready is not None:
            patches.replace("_prepare_inputs", partial(_announced_inputs, self._trainer, active, rollouts_ready))
        if batch_ready is not None:
            fetched: list[Any] = []
            patches.replace("get_batch_samples", partial(_remembered_samples, fetched))
            patches.replace("_prepare_inputs", partial(_announced_batch, self._trainer, active, batch_ready, fetched))
        if rate_multiplier is not None:
            patches.replace("_get_learning_rate", lambda scheduled: lambda: scheduled() * rate_multiplier())

    def detach(self) -> None:
        """Remove all patches from the trainer; safe to call twice."""
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
            upcoming = getattr(trainer, "upcoming_rollouts", None)
            ready(trainer._buffered_inputs if upcoming is None else upcoming(trainer._buffered_inputs))
            if trainer._buffered_inputs is None:
                inputs = prepare(generation_batch)
        return inputs

    return prepared


def _remembered_samples(fetched: list[Any], fetch: Call) -> Call:
    def remembered(*args: Any, **kwargs: Any) -> Any:
        fetched[:] = fetch(*args, **kwargs)
        return tuple(fetched)

    return remembered


def _announced_batch(
    trainer: Any, active: Callable[[], bool], ready: Callable[..., object], fetched: list[Any], prepare: Call
) -> Call:
    announced = [-1]  # the last step whose batch was announced

    def prepared(batch: Any) -> Any:
        inputs = prepare(batch)
        if fetched and trainer.model.training and trainer.state.global_step != announced[0] and active():
            announced[0] = trainer.state.global_step
            samples, num_items = fetched
            fetched.clear()
            ready(_micro_batches(trainer, inputs, samples, prepare), num_items)
        return inputs

    return prepared


def _micro_batches(trainer: Any, first: Any, samples: Sequence[Any], prepare: Call) -> list[Any]:
    """Micro-batches of the optimizer step that starts with `first`."""
    buffered = getattr(trainer, "_buffered_inputs", None)
    if buffered is not None:  # TRL trainers that sample keep the micro-batches of one or several steps
        start = next((i for i, each in enumerate(buffered) if each is first), None)
        return [first] if start is None else list(buffered[start : start + len(samples)])
    return [first, *(prepare(each) for each in samples[1:])]
