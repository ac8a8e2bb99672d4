"""`EffOPDCallback`: the look-ahead on any `transformers.Trainer`.

A callback is handed the model but neither the trainer nor its rollout engine, so this one is built
with the trainer. It searches right after the optimizer step (`on_step_end`), before that step is
logged, evaluated or saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from effopd.common.distributed import broadcast_from_rank0, world_size
from effopd.common.files import append_row, keep_rows
from effopd.distill.scoring import accuracy_scorer, rollout_scorer, text_batch, wanted_rollouts
from effopd.distill.trl_host.events import HostEvents
from effopd.distill.trl_host.state import drop_rollouts, log_metrics, mark_engine_stale, resumed_checkpoint
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate.checks import check_model, check_scorer, refuse_unread
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.effopd import EffOPD
from effopd.extrapolate.saved_state import STATE_FILE, check_same, read_state
from effopd.extrapolate.scorers.accuracy import training_task
from effopd.extrapolate.scorers.teacher_kl import RolloutScorer
from effopd.extrapolate.scoring import Scorer
from effopd.extrapolate.search import Score
from effopd.runs.records import SEARCHES, SearchRecord
from effopd.tasks.base import Task, Verifier

#: What `host_refused` says of it.
DEEPSPEED = "DeepSpeed, whose masters live in the optimizer"


def host_refused(host: str) -> ConfigError:
    """The error for a host whose weights cannot be moved from here; `host`: its name and why."""
    return ConfigError(
        "the look-ahead moves weights that are whole (one process, DDP) or sharded row by row (FSDP2); this run uses "
        f"{host}. Launch it with DDP (accelerate launch --multi_gpu) or FSDP2 (fsdp_version: "
        "2), or train without a look-ahead."
    )


class EffOPDCallback(TrainerCallback):
    """Look ahead during training.

    The callback changes nothing on the trainer before training begins, and leaves nothing when it
    ends, fails, or the callback is removed or replaced. A trainer has one at a time.

    Args:
        trainer: the trainer the callback is added to: `OPDTrainer`, plain `trl.DistillationTrainer`
            (every strategy works on both), or any `transformers.Trainer` if `scorer` is given.
        config: defaults to the paper's settings.
        task: where D_v is drawn from (examples with answers and their verifier). Default: the
            trainer's training dataset, columns `prompt` and `answer`.
        verify: grades an answer of that dataset; default: `math-verify`.
        scorer: a callable `model → number` instead of the accuracy on D_v.
        score_timeout: stop with an error if scoring one candidate takes longer, in seconds; `None`:
            no limit.
        resume_from_checkpoint: where a resumed run finds the look-ahead state; default: in the
            checkpoint that the trainer loads.

    Raises:
        ConfigError: FSDP1 or DeepSpeed, where live weights cannot be moved from here yet; a
            strategy that scores by the KL to the teacher, on a trainer that has none; `parameters`
            that match nothing of the model; a device that is not there; a setting that `scorer`
            does not read.
        TaskError: too few training prompts, or prompts without answers.

    Example:
        >>> trainer = DistillationTrainer(...)                                   # doctest: +SKIP
        >>> trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig()))        # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        config: EffOPDConfig | None = None,
        *,
        task: Task | None = None,
        verify: Verifier | None = None,
        scorer: Scorer | None = None,
        score_timeout: float | None = None,
        resume_from_checkpoint: str | Path | None = None,
    ):
        self.trainer, self.config = trainer, config or EffOPDConfig()
        self._check_host(trainer)
        if scorer is not None:
            refuse_unread(self.config, scorer, ())
        check_model(trainer.accelerator.unwrap_model(trainer.model), self.config, target=self._teacher() is not None)
        rollouts = self.config.score_rollouts if scorer is None else None
        self.waits_for_rollouts = rollouts is not None
        self._events = HostEvents(trainer)
        self._rollouts: RolloutScorer | None = None
        self._host: dict[str, Any] = {"max_completion_length": getattr(trainer.args, "max_completion_length", None)}
        if rollouts is not None:
            scorer = self._rollouts = rollout_scorer(trainer, rollouts)
            self._host["score_rollouts"] = wanted_rollouts(trainer.args, rollouts)
        elif scorer is None and self.config.scored:
            task = task if task is not None else training_task(trainer.train_dataset, verify)
            scorer = accuracy_scorer(trainer, self.config, task)
        check_scorer(scorer, self.config, score_timeout)
        self.scorer: Scorer | None = scorer
        self._score_timeout = score_timeout
        self.look_ahead: EffOPD | None = None
        self._pending: dict[str, float] | None = None
        self._resume_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None

    @staticmethod
    def _check_host(trainer: Trainer) -> None:
        fsdp1 = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
        if trainer.is_deepspeed_enabled or fsdp1:
            raise host_refused("FSDP1, which flattens them" if fsdp1 else DEEPSPEED)
        if world_size() != trainer.accelerator.num_processes:
            raise ConfigError(
                f"torch.distributed has {world_size()} processes but the trainer counts "
                f"{trainer.accelerator.num_processes}: each "
                "would train on its own. Build the TrainingArguments once, in every process, under one launcher."
            )

    def check_resume(self, checkpoint: Path) -> None:
        """Refuse to go on from a checkpoint of other settings; `OPDTrainer` calls this before it
        loads or writes anything.

        Raises:
            CheckpointError: there is no look-ahead state, or it is that of other settings.
        """
        check_same(read_state(self._state_of(checkpoint))["fingerprint"], self.config, self.scorer, self._host)

    # -- on and off the trainer --------------------------------------------------------------------

    @property
    def _registered(self) -> bool:
        """Whether the trainer still has this callback; the host says nothing when it removes
        one.
        """
        return any(callback is self for callback in self.trainer.callback_handler.callbacks)

    def _attach(self) -> None:
        self._events.attach(
            active=lambda: self._registered,
            stopped=self._detach,
            rate_multiplier=self._applied_factor if self.config.adapt_learning_rate else None,
            rollouts_ready=self._on_rollouts if self.waits_for_rollouts else None,
        )

    def _detach(self) -> None:
        """Leave nothing on the trainer, its optimizer or its rollouts."""
        self._events.detach()
        if self.look_ahead is not None:
            self.look_ahead.close()

    def _applied_factor(self) -> float:
        return 1.0 if self.look_ahead is None else self.look_ahead.applied_learning_rate_factor

    def _check_trainer(self, state: Any) -> None:
        if state is not self.trainer.state:
            raise ConfigError(
                "this EffOPDCallback was built with another trainer than the one it is on: "
                "its search would move the other "
                "trainer's weights. Build one for each trainer: trainer.add_callback(EffOPDCallback(trainer, …))."
            )
        others = [each for each in self.trainer.callback_handler.callbacks if isinstance(each, EffOPDCallback)]
        if len(others) > 1:
            raise ConfigError(
                f"the trainer has {len(others)} EffOPDCallbacks "
                f"({', '.join(each.config.strategy for each in others)}): expected one, "
                "since each would take the other's jumps for training. Remove the others "
                "with trainer.remove_callback(…)."
            )

    # -- events ------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """The anchor is the weights the run starts from, or what the resumed checkpoint saved.

        Raises:
            ConfigError: the callback belongs to another trainer, or the trainer has several.
            CheckpointError: the run is resumed without the look-ahead's state, or with other
                settings.
        """
        self._detach()  # from an earlier `train`, perhaps interrupted
        self._check_trainer(state)
        self.look_ahead = EffOPD(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.scorer,
            self.config,
            target=self._target(),
            on_move=self._weights_moved,
            optimizer=kwargs.get("optimizer"),
            wanted=lambda: self._registered,
            host=self._host,
            score_timeout=self._score_timeout,
        )
        try:
            if state.global_step > 0:
                self.look_ahead.load(self._state_of(resumed_checkpoint(self.trainer)))
            self._attach()
        except BaseException:
            self._detach()
            raise
        if state.is_world_process_zero and not hasattr(self.trainer, "run_dir"):  # which cuts its own rows
            keep_rows(Path(args.output_dir) / SEARCHES, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        """Report the last search to trainers without TRL's metric buffer."""
        self._flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Report the last search."""
        self._flush()
        self._detach()

    def on_step_end(self, args, state, control, **kwargs):
        """Search if this step is a trigger (and the scorer does not wait for the next rollouts)."""
        if not self.waits_for_rollouts:
            self._search(args, state, state.global_step)

    def _on_rollouts(self, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Search on rollouts that nothing has been trained on yet.

        The search counts as part of the step that they belong to, so it comes after the checkpoint
        of the step before.
        """
        state, scorer = self.trainer.state, self._rollouts
        assert scorer is not None
        scorer.take(map(text_batch, rollouts))
        try:
            if self.look_ahead is not None and state.global_step > 0:
                self._search(self.trainer.args, state, state.global_step + 1)
        finally:
            scorer.drop()

    def _search(self, args, state, step: int) -> None:
        if self.look_ahead is None:
            raise ConfigError(
                "this EffOPDCallback was added while training was running, so it never saw "
                "the weights that training started from. "
                "Add it before trainer.train()."
            )
        ledger = getattr(self.trainer, "ledger", None)
        with ledger.track("search") if ledger is not None else nullcontext():
            record = self.look_ahead.step(step)
        if record is None:
            return
        if ledger is not None and state.is_world_process_zero:  # the record has everybody's tokens
            ledger.count("search", generated=record.generated_tokens, forward=record.forward_tokens)
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_row(Path(args.output_dir) / SEARCHES, record.to_row())
        self._log(record)

    def on_save(self, args, state, control, **kwargs):
        """Put anchor and history into the checkpoint of trainers that do not ask for them
        (`save_state`).
        """
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if broadcast_from_rank0(folder.is_dir()):
            self.save_state(folder)

    def save_state(self, folder: Path) -> None:
        """Write the look-ahead state into a checkpoint folder, on every rank; `OPDTrainer` calls
        this before publishing it.
        """
        if self.look_ahead is not None:
            self.look_ahead.save(folder)

    def _target(self) -> Callable[[], Score | float] | None:
        """The teacher's score, where the trainer has a teacher."""
        teacher, scorer = self._teacher(), self.scorer
        if teacher is None or scorer is None:
            return None
        return lambda: scorer(self.trainer.accelerator.unwrap_model(teacher))

    def _teacher(self) -> Any:
        return getattr(self.trainer, "teacher_model", None)

    # -- helpers -----------------------------------------------------------------------------------

    def _state_of(self, checkpoint: Path | None) -> Path:
        """Where the look-ahead state of a resumed run is."""
        folder = self._resume_from or checkpoint
        if folder is not None and (folder / STATE_FILE).is_file():
            return folder
        raise CheckpointError(
            f"the run is resumed but there is no look-ahead state ({STATE_FILE}) in {folder}. Without the anchor, "
            "the next jump would be up to 11 times the whole displacement, so this stops "
            "here. Pass resume_from_checkpoint to "
            "EffOPDCallback, or resume from a checkpoint written with it."
        )

    def _weights_moved(self) -> None:
        """Invalidate what was made with the old weights.

        Rollouts that a search has used stay unless the sampled loss is trained: the full KL is
        still a loss on them, the sampled one is an estimate only where the weights that it updates
        are those that sampled.
        """
        mark_engine_stale(self.trainer)
        if not self.waits_for_rollouts or getattr(self.trainer.args, "loss_type", None) == "sampled":
            drop_rollouts(self.trainer)

    def _log(self, record: SearchRecord) -> None:
        metrics = {name: float(value) for name, value in record.metrics().to_row().items()}
        if not log_metrics(self.trainer, metrics):
            # a log during on_step_end would swallow the step's own row, so this one waits for the
            # next event
            self._pending = metrics

    def _flush(self) -> None:
        if self._pending:
            metrics, self._pending = self._pending, None
            self.trainer.log(metrics)
