"""Progress of the runs of `effopd quickstart`: bars on a terminal, otherwise lines."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from effopd.commands.quickstart_settings import ARMS, LABEL_WIDTH
from effopd.common.progress import spoken_time, time_left
from effopd.runs.lines import held_out
from effopd.runs.records import EvaluationRecord


def bars(console: Console) -> Progress:
    """Empty display for one bar per run."""
    return Progress(
        TextColumn(f"{{task.description:<{LABEL_WIDTH}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )


class Bar:
    """Progress of a run on a terminal."""

    def __init__(self, progress: Progress, task: Any):
        self._progress, self._task = progress, task

    def stepped(self) -> None:
        """Advance the bar by one step."""
        self._progress.advance(self._task)

    def evaluated(self, evaluation: EvaluationRecord) -> None:
        """Ignore evaluations."""


class Lines:
    """Progress of a run without a terminal: one line per evaluation, with the time left for all.

    Args:
        before: number of runs finished before this one, all of the same length.
        start: start of the first run, in seconds on the monotonic clock.
    """

    def __init__(self, label: str, before: int, steps: int, start: float, console: Console):
        self._label, self._before, self._steps = label, before, steps
        self._start, self._console = start, console

    def stepped(self) -> None:
        """Ignore steps."""

    def evaluated(self, evaluation: EvaluationRecord) -> None:
        """Print one line about the evaluation."""
        step = evaluation.step
        seconds, done = time.monotonic() - self._start, self._before * self._steps + step
        left = time_left(seconds, done, len(ARMS) * self._steps - done)
        rest = f", about {spoken_time(left)} left" if left else ""
        self._console.print(
            f"{self._label:<{LABEL_WIDTH}} step {step:>{len(str(self._steps))}}/{self._steps}  "
            f"{'  '.join(held_out(evaluation))}  "
            f"({spoken_time(seconds)}{rest})",
            highlight=False,
            markup=False,
        )


class Watch(TrainerCallback):
    """Pass steps and evaluations of a run to its display."""

    def __init__(self, display: Bar | Lines):
        self._display = display

    def on_step_end(self, args, state, control, **kwargs):
        self._display.stepped()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._display.evaluated(EvaluationRecord.from_row({"step": state.global_step, **(metrics or {})}))
