"""`load_best_model_at_end` for this package's trainers: best of the saved steps, across resumes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from effopd.runs.best_model import Kept, best_row

logger = logging.getLogger(__name__)

_Host: Any = Trainer if TYPE_CHECKING else object


class BestModelMixin(_Host):
    """The part of `RunMixin` that tracks the best checkpoint, restores it on resume, and records
    which step became the final model.
    """

    run_dir: Any
    resumed_from: Path | None
    kept: Kept | None

    def _recall_best(self) -> None:
        """Restore the best step so far by this run's metric, among checkpoints that still exist."""
        args, state = self.args, self.state
        if not (args.load_best_model_at_end or args.save_strategy == "best"):
            return
        best = best_row(
            state.log_history,
            args.metric_for_best_model,
            bool(args.greater_is_better),
            lambda step: self._checkpoint_of(step) is not None,
        )
        state.best_metric, state.best_global_step = (best.value, best.step) if best else (None, None)
        state.best_model_checkpoint = str(self._checkpoint_of(best.step)) if best else None

    def _checkpoint_of(self, step: int) -> Path | None:
        """Checkpoint folder of a step, in this run or in the run it resumes from."""
        checkpoint = self.run_dir.checkpoint(step)
        folders = [checkpoint.parent, *([self.resumed_from.parent] if self.resumed_from else [])]
        return next((folder / checkpoint.name for folder in folders if (folder / checkpoint.name).is_dir()), None)

    def around_best_metric(self, judge: Callable[[], bool]) -> bool:
        """The host's judgment, limited to saved steps: only those can be restored at the end."""
        saved = self.args.save_strategy == "best" or self.control.should_save
        if self.args.load_best_model_at_end and not saved:
            return False
        return judge()

    def around_best_model(self, load: Callable[[], None]) -> None:
        load()
        self.kept = Kept(self.state.best_global_step, self.args.metric_for_best_model, self.state.best_metric)

    def _say_kept(self) -> None:
        if not self.is_world_process_zero():
            return
        self.run_dir.write_kept(self.kept)
        if self.args.load_best_model_at_end and self.kept is None:
            logger.warning(
                "No step was both evaluated and saved with a finite %s. The final model has the weights of step %d, "
                "the last.",
                self.args.metric_for_best_model, self.state.global_step,
            )  # fmt: skip
