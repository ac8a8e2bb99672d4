"""A record in the run directory and in every checkpoint that a resumed run is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from transformers import TrainerCallback

from effopd.common.distributed import rank

T = TypeVar("T")


class RecordCallback(TrainerCallback, Generic[T]):
    """Writes a record into the run directory and its checkpoints, and compares it on resume.

    Runs after every other callback, so that the folder is unchanged if one of them raises.

    Args:
        root: the run directory.
        measure: returns the record; called once, when training starts or resumes, before weights
            are loaded from a checkpoint.
        write: writes a record into a folder.
        check: raises `CheckpointError` if a checkpoint's record does not fit.
    """

    def __init__(
        self,
        root: Path,
        measure: Callable[[], T],
        write: Callable[[Path, T], None],
        check: Callable[[Path, T], None],
    ):
        self._root, self._measure, self._write, self._check = root, measure, write, check
        self._known: T | None = None

    @property
    def record(self) -> T:
        """The run's record; measured at the first access."""
        if self._known is None:
            self._known = self._measure()
        return self._known

    @record.setter
    def record(self, value: T) -> None:
        self._known = value

    def check_resume(self, checkpoint: Path) -> None:
        """Compare the record with that of a checkpoint.

        Raises:
            CheckpointError: they do not fit.
        """
        self._check(checkpoint, self.record)

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the record of a run that starts or goes on."""
        record = self.record
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self._write(self._root, record)

    def save_state(self, folder: Path) -> None:
        """Write the record into a checkpoint; called on every rank."""
        if rank() == 0:
            self._write(folder, self.record)
