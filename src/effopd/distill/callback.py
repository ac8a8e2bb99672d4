"""`EffOPDCallback`: the look-ahead as a callback for any `transformers.Trainer`.

The host passes callbacks the model but neither the trainer nor its rollout engine, so the
constructor takes the trainer. A search runs right after the optimizer step (`on_step_end`), before
that step is logged, evaluated or saved. With the scorers `teacher_kl` and `next_batch_loss` it runs
at the start of the next step instead, on that step's rollouts or batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from effopd.common.distributed import broadcast_from_rank0, world_size
from effopd.common.files import append_row, keep_rows, move_aside
from effopd.common.host_values import name_of
from effopd.distill.next_batch import NEXT_BATCH_LOSS, next_batch_scorer, wanted_examples
from effopd.distill.scoring import accuracy_scorer, rollout_scorer, text_batch, wanted_rollouts
from effopd.distill.teachers.offload import in_use
from effopd.distill.trl_host.events import HostEvents
from effopd.distill.trl_host.state import drop_rollouts, log_metrics, mark_engine_stale, resumed_checkpoint
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate.checks import check_model, check_scorer, lora_under_deepspeed, refuse_unread
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.effopd import EffOPD
from effopd.extrapolate.lora_weights import has_adapters
from effopd.extrapolate.saved_state import STATE_FILE, check_same, read_state
from effopd.extrapolate.scorers.accuracy import training_task
from effopd.extrapolate.scorers.base import Scorer
from effopd.extrapolate.scorers.next_batch import NextBatchLoss
from effopd.extrapolate.scorers.teacher_kl import RolloutScorer
from effopd.extrapolate.search import Score
from effopd.extrapolate.zero_settings import (
    check_zero,
    check_zero_optimizer,
    deepspeed_config,
    optimizer_needs_whole_weights,
)
from effopd.runs.records import SEARCHES, SearchRecord
from effopd.tasks.base import Task, Verifier

logger = logging.getLogger(__name__)


def check_deepspeed(args: Any, *, lora: bool) -> None:
    """Check that the look-ahead can work with the DeepSpeed settings of a run, if it has any.

    Args:
        args: training arguments.
        lora: whether LoRA adapters are trained.

    Raises:
        ConfigError: a setting of DeepSpeed or the optimizer is not supported, or adapters are
            trained.
    """
    config = deepspeed_config(args)
    if config is not None:
        check_zero(config)
        if getattr(args, "optimizer_class", None) is not None:
            raise optimizer_needs_whole_weights(f"optimizer_class={args.optimizer_class!r}")
        for name in ("k_step_lookahead", "average_weights"):
            if (value := getattr(args, name, None)) not in (None, 0, "none"):
                raise optimizer_needs_whole_weights(f"{name}={value!r}")
        check_zero_optimizer(name_of(args.optim), config)
        if lora:
            raise lora_under_deepspeed()


class EffOPDCallback(TrainerCallback):
    """Search along the training update Δ and move the weights to the accepted scale.

    The trainer is patched only while training runs. The patches are removed when training ends or
    fails, and when the callback is removed or replaced. A trainer has one such callback at a time.

    Args:
        trainer: the trainer to which the callback is added. `OPDTrainer` and plain
            `trl.DistillationTrainer` support every strategy; any other `transformers.Trainer` needs
            a `scorer`. docs/hosts.md has a table of TRL's trainers.
        config: default: the paper's settings.
        task: source of the validation prompts (examples with answers and their verifier). Default:
            the trainer's training dataset, columns `prompt` and `answer`.
        verify: verifier for answers of that dataset; default: `math-verify`.
        scorer: a callable `model → number` that replaces the configured scorer, or
            'next_batch_loss': the trainer's own loss on the next batch, before training on it. It
            reads `score_rollouts`, the number of examples; default: a quarter of the step's,
            within the bounds of docs/hosts.md.
        score_timeout: seconds that scoring one candidate may take before training stops with an
            error; `None`: no limit.
        resume_from_checkpoint: folder with the look-ahead state for a resumed run; default: the
            checkpoint that the trainer loads.

    Raises:
        ConfigError: the trainer uses FSDP1, or settings of DeepSpeed that are not supported; the
            strategy scores by KL and the trainer has no teacher; `parameters` matches no parameter;
            a device does not exist; `scorer` does not read a setting that was given; or the
            trainer's loss on the next batch cannot rank weights.
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
        scorer: Scorer | str | None = None,
        score_timeout: float | None = None,
        resume_from_checkpoint: str | Path | None = None,
    ):
        self.trainer, self.config = trainer, config or EffOPDConfig()
        self._check_host(trainer)
        if isinstance(scorer, str):
            scorer = self._named_scorer(scorer)
        elif scorer is not None:
            refuse_unread(self.config, scorer, ())
        check_model(trainer.accelerator.unwrap_model(trainer.model), self.config, target=self._teacher() is not None)
        rollouts = self.config.score_rollouts if scorer is None else None
        self._events = HostEvents(trainer)
        self._rollouts: RolloutScorer | None = None
        self._next_batch = scorer if isinstance(scorer, NextBatchLoss) else None
        self._host: dict[str, Any] = {"max_completion_length": getattr(trainer.args, "max_completion_length", None)}
        if self._next_batch is not None:
            self._host["score_rollouts"] = wanted_examples(trainer, self.config)
        elif rollouts is not None:
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

    def _named_scorer(self, name: str) -> NextBatchLoss:
        if name != NEXT_BATCH_LOSS:
            raise ConfigError(
                f"scorer={name!r}: expected '{NEXT_BATCH_LOSS}' or a callable model → number. The scorers 'accuracy' "
                "and 'teacher_kl' are chosen by EffOPDConfig(validation_size=…) and EffOPDConfig(score_rollouts=…)."
            )
        scorer = next_batch_scorer(self.trainer, self.config)
        refuse_unread(self.config, scorer)
        return scorer

    @staticmethod
    def _check_host(trainer: Trainer) -> None:
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ConfigError(
                "this run uses FSDP1, which flattens the weights: expected DDP, FSDP2 or DeepSpeed ZeRO. Launch it "
                "with DDP (accelerate launch --multi_gpu) or FSDP2 (fsdp_version: 2), or train without a look-ahead."
            )
        check_deepspeed(trainer.args, lora=has_adapters(trainer.accelerator.unwrap_model(trainer.model)))
        if world_size() != trainer.accelerator.num_processes:
            raise ConfigError(
                f"torch.distributed has {world_size()} processes but the trainer counts "
                f"{trainer.accelerator.num_processes}, so each process trains alone. "
                "Build the TrainingArguments once, in every process, under one launcher."
            )

    def check_resume(self, checkpoint: Path) -> None:
        """Check that the checkpoint was written with the same look-ahead settings.

        `OPDTrainer` calls this before it loads or writes anything.

        Raises:
            CheckpointError: the look-ahead state is missing or has other settings.
        """
        check_same(read_state(self._state_of(checkpoint))["fingerprint"], self.config, self.scorer, self._host)

    # -- on and off the trainer --------------------------------------------------------------------

    @property
    def waits_for_rollouts(self) -> bool:
        """Whether a search runs at the start of the next step, on its rollouts or batch."""
        return self._rollouts is not None or self._next_batch is not None

    @property
    def _registered(self) -> bool:
        """Whether the trainer still has this callback; the host sends no event on removal."""
        return any(callback is self for callback in self.trainer.callback_handler.callbacks)

    def _attach(self) -> None:
        self._events.attach(
            active=lambda: self._registered,
            stopped=self._detach,
            rate_multiplier=self._applied_factor if self.config.adapt_learning_rate else None,
            rollouts_ready=self._on_rollouts if self._rollouts is not None else None,
            batch_ready=self._on_batch if self._next_batch is not None else None,
        )

    def _detach(self) -> None:
        """Remove every patch from the trainer and close the look-ahead."""
        self._events.detach()
        if self.look_ahead is not None:
            self.look_ahead.close()

    def _applied_factor(self) -> float:
        return 1.0 if self.look_ahead is None else self.look_ahead.applied_learning_rate_factor

    def _check_trainer(self, state: Any) -> None:
        if state is not self.trainer.state:
            raise ConfigError(
                "this EffOPDCallback was built with another trainer than the one it is on, and a search moves the "
                "weights of the trainer it was built with. Build one callback per trainer: "
                "trainer.add_callback(EffOPDCallback(trainer, …))."
            )
        others = [each for each in self.trainer.callback_handler.callbacks if isinstance(each, EffOPDCallback)]
        if len(others) > 1:
            raise ConfigError(
                f"the trainer has {len(others)} EffOPDCallbacks "
                f"({', '.join(each.config.strategy for each in others)}): expected one, because each counts the "
                "other's jumps as training. Remove the others with trainer.remove_callback(…)."
            )

    # -- events ------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Set the anchor: the weights at the start of the run, or the resumed checkpoint's anchor.

        Raises:
            ConfigError: the callback belongs to another trainer, or the trainer has several.
            CheckpointError: a resumed run lacks the look-ahead state or has other settings.
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
            updates=self._passes,
            seen=lambda: self._reused,
            averages=[average] if (average := getattr(self.trainer, "weight_average", None)) is not None else [],
        )
        try:
            if state.global_step > 0:
                self.look_ahead.load(self._state_of(resumed_checkpoint(self.trainer)))
            self._attach()
        except BaseException:
            self._detach()
            raise
        if state.is_world_process_zero and not hasattr(self.trainer, "run_dir"):  # otherwise `RunDirCallback` does
            searches = Path(args.output_dir) / SEARCHES
            if state.global_step == 0 and (aside := move_aside(searches)) is not None:
                logger.warning("%s held the searches of an earlier run; they are now in %s.", searches, aside.name)
            keep_rows(searches, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        """Report the last search to trainers without TRL's metric buffer.

        Raises:
            ConfigError: the callback was added while training was running.
        """
        if self.look_ahead is None:
            raise ConfigError(
                "this EffOPDCallback was added while training was running, too late to record the initial weights. "
                "Add it before trainer.train()."
            )
        self._flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Report the last search."""
        self._flush()
        self._detach()

    def on_step_end(self, args, state, control, **kwargs):
        """Search if this step is a trigger, unless the scorer waits for the next rollouts."""
        if self.look_ahead is not None and not self.waits_for_rollouts:
            self._search(args, state, state.global_step)

    def scores_rollouts(self, step: int) -> bool:
        """Whether a search scores the rollouts that are sampled for this step."""
        look = self.look_ahead
        if look is None or not self.waits_for_rollouts:
            return False
        if any(self._searches(each) for each in range(step, step + self._parts)):
            return True
        shared = self._passes > 1 and not self._reused
        return shared and look.finds_rate and look.due(step + self._parts)

    def _searches(self, step: int) -> bool:
        """Whether a search runs before this step, on its rollouts or batch.

        No step has trained on them, except in the search that finds the learning rate. It follows
        the first step at once, so that the other steps on the same rollouts have that rate.
        """
        look = self.look_ahead
        if look is None or not self.waits_for_rollouts or step <= look.schedule_start + 1:
            return False
        if self._reused:
            return look.finds_rate and look.due(step)
        return look.due(step, self._since(step))

    def _since(self, step: int) -> int:
        """The last step before which a search could run; what was due later waited for `step`."""
        assert self.look_ahead is not None
        parts = self._parts
        place = (step - 1) % (self._passes * parts)
        waited = 1 if 0 < place < parts else (self._passes - 1) * parts + 1
        return max(step - waited, self.look_ahead.anchor_step, self.look_ahead.schedule_start + 1)

    def _on_rollouts(self, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Search on the next step's rollouts, before that step.

        The search belongs to that next step, so it comes after the previous step's checkpoint.
        The teacher's forward pass on the scored micro-batches is that of their loss, made early.
        """
        scorer, trainer, look = self._rollouts, self.trainer, self.look_ahead
        assert scorer is not None
        many = self._reused or self._parts > 1
        scorer.take(map(text_batch, rollouts), most=many and look is not None and look.finds_rate)
        if getattr(trainer, "predicts_ahead", False) and self._searches(trainer.state.global_step + 1):
            scorer.use_predictions(map(trainer.predict_ahead, rollouts))
        self._search_before_step(scorer)

    def _on_batch(self, micro_batches: Sequence[Mapping[str, Any]], num_items: Any) -> None:
        """Search on the next step's batch, before that step; see `_on_rollouts`."""
        scorer = self._next_batch
        assert scorer is not None
        scorer.take(micro_batches, num_items)
        self._search_before_step(scorer)

    @property
    def _parts(self) -> int:
        """Parts of a batch of rollouts, one per optimizer step."""
        return self.trainer.args.num_mini_batches if hasattr(self.trainer, "repeats_rollouts") else 1

    @property
    def _passes(self) -> int:
        """Optimizer steps on each of these parts."""
        return getattr(self.trainer.args, "updates_per_rollouts", 1) // self._parts

    @property
    def _reused(self) -> bool:
        """Whether the next step trains on rollouts that earlier steps trained on."""
        repeats = getattr(self.trainer, "repeats_rollouts", None)
        return repeats is not None and repeats()

    def _search_before_step(self, scorer: RolloutScorer | NextBatchLoss) -> None:
        state = self.trainer.state
        try:
            if self._searches(state.global_step + 1):
                self._search(self.trainer.args, state, state.global_step + 1)
        finally:
            scorer.drop()

    def _search(self, args, state, step: int) -> None:
        assert self.look_ahead is not None  # `on_step_begin`
        ledger = getattr(self.trainer, "ledger", None)
        with ledger.track("search") if ledger is not None else nullcontext():
            record = self.look_ahead.step(step, self._since(step) if self.waits_for_rollouts else None)
        if record is None:
            return
        if ledger is not None and state.is_world_process_zero:  # the record sums the tokens of all ranks
            ledger.count(
                "search",
                generated=record.generated_tokens,
                forward=record.forward_tokens,
                search_teacher=record.teacher_tokens or 0,
            )
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_row(Path(args.output_dir) / SEARCHES, record.to_row())
        self._log(record)

    def on_save(self, args, state, control, **kwargs):
        """Save the look-ahead state for trainers that do not call `save_state` themselves."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if broadcast_from_rank0(folder.is_dir()):
            self.save_state(folder)

    def save_state(self, folder: Path) -> None:
        """Write the look-ahead state into a checkpoint folder; called on every rank.

        `OPDTrainer` calls this before it publishes the checkpoint.
        """
        if self.look_ahead is not None:
            self.look_ahead.save(folder)

    def _target(self) -> Callable[[], Score | float] | None:
        """Function that scores the teacher; `None` without a teacher or a scorer."""
        scorer = self.scorer
        if self._teacher() is None or scorer is None:
            return None

        def measured() -> Score | float:
            teacher = self.trainer.accelerator.unwrap_model(self._teacher())  # it can change
            with in_use(teacher):
                return scorer(teacher)

        return measured

    def _teacher(self) -> Any:
        return getattr(self.trainer, "teacher_model", None)

    # -- helpers -----------------------------------------------------------------------------------

    def _state_of(self, checkpoint: Path | None) -> Path:
        """Folder that holds the look-ahead state of a resumed run."""
        folder = self._resume_from or checkpoint
        if folder is not None and (folder / STATE_FILE).is_file():
            return folder
        raise CheckpointError(
            f"the run is resumed but there is no look-ahead state ({STATE_FILE}) in {folder}. The next jump needs the "
            "anchor that is saved there. Pass resume_from_checkpoint to EffOPDCallback, or resume from a checkpoint "
            "written with a look-ahead."
        )

    def _weights_moved(self) -> None:
        """Mark the engine stale and, if needed, drop rollouts that the old weights sampled.

        Losses over the vocabulary stay valid off-policy, so their rollouts are kept. Losses of the
        sampled tokens do not. Trainers that do not say which loss they have keep the rollouts that
        were scored.
        """
        mark_engine_stale(self.trainer)
        if getattr(self.trainer.args, "on_sampled_tokens", not self.waits_for_rollouts):
            drop_rollouts(self.trainer)

    def _log(self, record: SearchRecord) -> None:
        metrics = {name: float(value) for name, value in record.metrics().to_row().items()}
        if not log_metrics(self.trainer, metrics):
            # logging in on_step_end would swallow the step's own row, so wait for the next event
            self._pending = metrics

    def _flush(self) -> None:
        if self._pending:
            metrics, self._pending = self._pending, None
            self.trainer.log(metrics)
