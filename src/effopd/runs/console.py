"""Callbacks that print one line per step and evaluation, replacing those of transformers.

The callbacks of transformers print whole rows, which are in `metrics.jsonl`, `evals.jsonl` and the
trackers of `report_to` anyway.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from effopd.runs.lines import eval_line, step_line
from effopd.runs.records import EvaluationRecord, StepRecord

#: Deprecated names that TRL 1.16 and PEFT use on every rollout; users cannot change them.
_RENAMED = ("is_gradient_checkpointing", "gradient_checkpointing_disable", "gradient_checkpointing_enable")


class _Lines(TrainerCallback):
    """Prints the lines on rank 0; the host handles other logs."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            exact, averaged = _loss_is_kl(args), args.logging_strategy != "steps" or state.logging_steps > 1
            clock = getattr(args, "cost_clock", "wall")
            step = StepRecord.from_row({"step": state.global_step, **logs})
            say(step_line(step, state.max_steps, loss_is_kl=exact, averaged=averaged, clock=clock))
        elif not any(
            key.endswith("_runtime") for key in logs
        ):  # `on_evaluate` prints evaluations, the command prints the end
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if state.is_world_process_zero and metrics:
            say(eval_line(EvaluationRecord.from_row({"step": state.global_step, **metrics})))


class LinesAlone(_Lines, PrinterCallback):
    """For `disable_tqdm`."""


class LinesWithBar(_Lines, ProgressCallback):
    """With the host's progress bar, if standard error is a terminal."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = 0
        self.training_bar: Any = None
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)

    def end_bar(self) -> None:
        """Close the bar of an interrupted training, so that later output starts on a new line."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def in_lines(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """`callbacks` with transformers' two printers replaced; subclasses of them stay."""
    ours: dict[type, type] = {PrinterCallback: LinesAlone, ProgressCallback: LinesWithBar}
    return [ours[type(callback)]() if type(callback) in ours else callback for callback in callbacks]


def end_bars(callbacks: Iterable[TrainerCallback]) -> None:
    """Close progress bars that are still open."""
    for callback in callbacks:
        if isinstance(callback, LinesWithBar):
            callback.end_bar()


@contextmanager
def quiet_hosts(*, bars: bool) -> Iterator[None]:
    """In this block, hide warnings about names that TRL uses, and transformers' progress bars.

    Args:
        bars: keep the bars of loading and saving if standard error is a terminal.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    hide = shown and not (bars and sys.stderr.isatty())
    with warnings.catch_warnings():
        for name in _RENAMED:
            warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
        if hide:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if hide:
                transformers_logging.enable_progress_bar()


def _loss_is_kl(args: Any) -> bool:
    full = getattr(args, "loss_type", None) == "full"
    return full and args.beta == 1 and args.lambda_extrapolation == 1


def say(line: str) -> None:
    """Print a line to standard output, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()
