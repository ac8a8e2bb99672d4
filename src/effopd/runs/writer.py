"""Callback that writes a run's settings and rows, and cuts rows from beyond the resumed step."""

from __future__ import annotations

import logging
from collections.abc import Callable

from transformers import TrainerCallback

from effopd.common.distributed import all_gather_object
from effopd.common.files import append_row, keep_rows, write_atomically
from effopd.runs.records import CONFIG, EVALS, METRICS, SEARCHES, EvaluationRecord, StepRecord
from effopd.runs.run_dir import RunDir

logger = logging.getLogger(__name__)


class RunDirCallback(TrainerCallback):
    """Writes `config.yaml`, `metrics.jsonl` and `evals.jsonl`, and drops rows beyond the resumed
    step.

    Must run after every other callback: if another one raises, the folder is unchanged.

    Args:
        check: called on every rank before anything is written; raises if the run must not start.
    """

    def __init__(self, run_dir: RunDir, check: Callable[[], None] = lambda: None):
        self._run_dir, self._check = run_dir, check
        self._started = False
        self._before: EvaluationRecord | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Start a run, or cut the rows back to the resumed checkpoint."""
        all_gather_object(None)  # no rank writes before all ranks are here
        self._check()
        self._started, before, self._before = True, self._before, None
        if not state.is_world_process_zero:
            return
        root, step = self._run_dir.root, state.global_step
        root.mkdir(parents=True, exist_ok=True)
        if aside := self._run_dir.set_aside(step):
            logger.warning("Resuming from step %d; files from beyond it are now in %s.", step, aside)
        for name in (METRICS, SEARCHES, EVALS):
            keep_rows(root / name, step if step > 0 else -1)  # a new run has no rows, not even for step 0
        if step >= state.max_steps:
            logger.warning("%s is finished (step %d of %d); nothing was trained.", root, step, state.max_steps)
            return
        if text := self._run_dir.settings:
            write_atomically(root / CONFIG, lambda path: path.write_text(text))
        if before is not None and step == 0 and not args.eval_on_start:
            append_row(root / EVALS, before.to_row())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write one row per training log; evaluations and the final summary have no `loss`."""
        if state.is_world_process_zero and logs and "loss" in logs:
            step = StepRecord.from_row({"step": state.global_step, **logs})
            append_row(self._run_dir.root / METRICS, step.to_row())

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Write one row per evaluation; a row from before training waits until training starts."""
        if not state.is_world_process_zero or not metrics:
            return
        evaluation = EvaluationRecord.from_row({"step": state.global_step, **metrics})
        if self._started:
            append_row(self._run_dir.root / EVALS, evaluation.to_row())
        else:
            self._before = evaluation
