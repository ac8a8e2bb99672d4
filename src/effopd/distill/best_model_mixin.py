"""`load_best_model_at_end` for our trainers: the best checkpoint is among those that were saved,
and survives a resume.
"""

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
    """The part of `RunMixin` that finds the best checkpoint, remembers it through a resume, and
    says which one was kept.
    """

    run_dir: Any
    resumed_from: Path | None
    kept: Kept | None

    def _recall_best(self) -> None:
        """What was best before a resume, among the checkpoints that are there, by the metric of
        this run.
        """
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
        """The checkpoint of a step: this run's, or that of the run it goes on from."""
        own = self.run_dir.checkpoint(step)
        folders = [own.parent, *([self.resumed_from.parent] if self.resumed_from else [])]
        return next((folder / own.name for folder in folders if (folder / own.name).is_dir()), None)

    def around_best_metric(self, judge: Callable[[], bool]) -> bool:
        """The host's, among the steps that are saved: another one could not be gone back to."""
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
                "No step was both evaluated and saved with a finite %s: the model is that of step %d, the last.",
                self.args.metric_for_best_model, self.state.global_step,
            )  # fmt: skip
