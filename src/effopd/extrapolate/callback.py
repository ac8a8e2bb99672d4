"""`EffOPDCallback`: the look-ahead on any `transformers.Trainer`.

A callback is handed the model but neither the trainer nor its rollout engine, so this one is built with the trainer.
It searches right after the optimizer step (`on_step_end`), before that step is logged, evaluated or saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from effopd.errors import CheckpointError, ConfigError, TaskError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.lookahead import EffOPD, Scorer
from effopd.extrapolate.ranks import from_first, world_size
from effopd.extrapolate.saved_state import STATE_FILE, check_same, read_state
from effopd.extrapolate.scorers import AccuracyScorer
from effopd.extrapolate.search import Score
from effopd.files import append_row, keep_rows
from effopd.tasks.base import Example, Task, Verifier

SEARCHES = "searches.jsonl"
#: What `host_refused` says of it.
DEEPSPEED = "DeepSpeed, whose masters live in the optimizer"


def host_refused(host: str) -> ConfigError:
    """The error for a host whose weights cannot be moved from here; `host`: its name and why."""
    return ConfigError(
        "the look-ahead moves weights that are whole (one process, DDP) or sharded row by row (FSDP2); this run uses "
        f"{host}. Launch it with DDP (accelerate launch --multi_gpu) or FSDP2 (fsdp_version: 2), or train without a look-ahead."
    )


def check_validation_size(config: EffOPDConfig, task: Task) -> None:
    """D_v can be drawn from the training prompts.

    Raises:
        TaskError: there are too few.
    """
    if config.validation_size > len(task):
        raise TaskError(
            f"D_v needs {config.validation_size} training prompts but there are {len(task)}: lower "
            "EffOPDConfig.validation_size or add prompts."
        )


class EffOPDCallback(TrainerCallback):
    """Look ahead during training.

    Args:
        trainer: the trainer the callback is added to: `OPDTrainer`, plain `trl.DistillationTrainer` (every strategy works
            on both), or any `transformers.Trainer` if `scorer` is given.
        config: defaults to the paper's settings.
        task: where D_v is drawn from (examples with answers and their verifier). Default: the trainer's training
            dataset, columns `prompt` and `answer`.
        verify: grades an answer of that dataset; default: `math-verify`.
        scorer: a callable `model → number` instead of the accuracy on D_v.
        resume_from_checkpoint: where a resumed run finds the look-ahead state; default: in the checkpoint that the trainer
            loads.

    Raises:
        ConfigError: FSDP1 or DeepSpeed, where live weights cannot be moved from here yet; a strategy that scores by the KL to
            the teacher, on a trainer that has none.
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
        resume_from_checkpoint: str | Path | None = None,
    ):
        self.trainer, self.config = trainer, config or EffOPDConfig()
        self._check_host(trainer)
        self.waits_for_rollouts = scorer is None and self.config.resolved_scorer == "teacher_kl"
        self._rollouts: Any = None
        if self.waits_for_rollouts:
            from effopd.distill.teacher_kl import RolloutScorer  # knows the trainers, which know this module

            scorer = self._rollouts = RolloutScorer(trainer, self.config.score_rollouts)
            self._rollouts.watch(self._on_rollouts)
        elif scorer is None and self.config.scored:
            scorer = self._accuracy_scorer(task if task is not None else _training_task(trainer, verify))
        self.scorer: Scorer | None = scorer
        self.lookahead: EffOPD | None = None
        self._pending: dict[str, float] | None = None
        self._resume_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._loaded: Path | None = None
        self._notice_resume()
        if self.config.resolved_steer:
            self._log_steered_rate()

    @staticmethod
    def _check_host(trainer: Trainer) -> None:
        fsdp1 = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
        if trainer.is_deepspeed_enabled or fsdp1:
            raise host_refused("FSDP1, which flattens them" if fsdp1 else DEEPSPEED)
        if world_size() != trainer.accelerator.num_processes:
            raise ConfigError(
                f"torch.distributed has {world_size()} processes but the trainer counts {trainer.accelerator.num_processes}: each "
                "would train on its own. Build the TrainingArguments once, in every process, under one launcher."
            )

    def _accuracy_scorer(self, task: Task) -> AccuracyScorer:
        trainer, config = self.trainer, self.config
        limit = config.max_completion_length or getattr(trainer.args, "max_completion_length", None)
        if limit is None:
            raise ConfigError(
                f"{type(trainer).__name__} has no max_completion_length: set EffOPDConfig.max_completion_length for "
                "the validation answers, or pass a scorer."
            )
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        check_validation_size(config, task)
        return AccuracyScorer(
            task.sample(config.validation_size, config.seed),
            tokenizer,
            max_new_tokens=limit,
            temperature=config.temperature,
            batch_size=config.validation_batch_size,
            chat_template_kwargs=getattr(trainer, "chat_template_kwargs", None),
            progress=not trainer.args.disable_tqdm,
            vocab_size=getattr(trainer, "vocab_size", None),
        )

    def _log_steered_rate(self) -> None:
        """Let the trainer log the rate that steps are taken with instead of the schedule's, which is all that it knows."""
        scheduled = self.trainer._get_learning_rate
        self.trainer._get_learning_rate = lambda: (
            scheduled() * (1.0 if self.lookahead is None else self.lookahead.learning_rate_factor)
        )

    def _notice_resume(self) -> None:
        """Callbacks are not told which checkpoint a run resumes from: note it when the trainer loads it."""
        load = self.trainer._load_from_checkpoint

        def loading(resume_from_checkpoint, *args, **kwargs):
            self._loaded = Path(resume_from_checkpoint)
            return load(resume_from_checkpoint, *args, **kwargs)

        self.trainer._load_from_checkpoint = loading

    def check_resume(self, checkpoint: Path) -> None:
        """Refuse to go on from a checkpoint of other settings; `OPDTrainer` calls this before it loads or writes anything.

        Raises:
            CheckpointError: there is no look-ahead state, or it is that of other settings.
        """
        check_same(read_state(self._state_of(checkpoint))["fingerprint"], self.config, self.scorer)

    # -- events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """The anchor is the weights the run starts from, or what the resumed checkpoint saved."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.lookahead is not None:  # an earlier `train` of this process, perhaps interrupted
            self.lookahead.close()
        if self._rollouts is not None:
            self._rollouts.looked_at = -1
        self.lookahead = EffOPD(
            model,
            self.scorer,
            self.config,
            target=self._target(),
            on_move=self._weights_moved,
            optimizer=kwargs.get("optimizer"),
        )
        if state.global_step > 0:
            self.lookahead.load(self._state_of(self._loaded))
        if state.is_world_process_zero and not hasattr(self.trainer, "run_dir"):  # which cuts its own rows
            keep_rows(Path(args.output_dir) / SEARCHES, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        """Report the last search to trainers without TRL's metric buffer."""
        self._flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Report the last search."""
        self._flush()
        if self.lookahead is not None:
            self.lookahead.close()

    def on_step_end(self, args, state, control, **kwargs):
        """Search if this step is a trigger (and the scorer does not wait for the next rollouts)."""
        if not self.waits_for_rollouts:
            self._search(args, state, state.global_step)

    def _on_rollouts(self) -> None:
        """A step's rollouts are there and nothing has been trained on them yet. The search counts as part of that step, so it
        comes after the checkpoint of the step before."""
        state = self.trainer.state
        if self.lookahead is not None and state.global_step > 0:
            self._search(self.trainer.args, state, state.global_step + 1)

    def _search(self, args, state, step: int) -> None:
        assert self.lookahead is not None
        ledger = getattr(self.trainer, "ledger", None)
        with ledger.track("search") if ledger is not None else nullcontext():
            row = self.lookahead.step(step)
        if row is None:
            return
        if ledger is not None and state.is_world_process_zero:  # the row has everybody's tokens
            ledger.count("search", generated=row["generated_tokens"], forward=row["forward_tokens"])
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_row(Path(args.output_dir) / SEARCHES, row)
        self._log(row)

    def on_save(self, args, state, control, **kwargs):
        """Put anchor and history into the checkpoint of trainers that do not ask for them (`save_state`)."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if from_first(folder.is_dir()):
            self.save_state(folder)

    def save_state(self, folder: Path) -> None:
        """Write the look-ahead state into a checkpoint folder, on every rank; `OPDTrainer` calls this before publishing it."""
        if self.lookahead is not None:
            self.lookahead.save(folder)

    def _target(self) -> Callable[[], Score | float] | None:
        """The teacher's score, where the trainer has a teacher."""
        teacher, scorer = getattr(self.trainer, "teacher_model", None), self.scorer
        if teacher is None or scorer is None:
            return None
        return lambda: scorer(self.trainer.accelerator.unwrap_model(teacher))

    # -- helpers ------------------------------------------------------------------------------------------------

    def _state_of(self, checkpoint: Path | None) -> Path:
        """Where the look-ahead state of a resumed run is."""
        folder = self._resume_from or checkpoint
        if folder is not None and (folder / STATE_FILE).is_file():
            return folder
        raise CheckpointError(
            f"the run is resumed but there is no look-ahead state ({STATE_FILE}) in {folder}. Without the anchor, "
            "the next jump would be up to 11 times the whole displacement, so this stops here. Pass resume_from_checkpoint to "
            "EffOPDCallback, or resume from a checkpoint written with it."
        )

    def _weights_moved(self) -> None:
        """Engines with their own copy of the weights, and rollouts made with the old ones, are out of date now.

        The full KL of a search that used a step's rollouts is still a loss on them; the sampled one is an estimate only where
        the weights that it updates are those that sampled.
        """
        if getattr(self.trainer, "use_vllm", False):
            self.trainer._last_loaded_step = -1
        keep = self.waits_for_rollouts and getattr(self.trainer.args, "loss_type", None) != "sampled"
        if getattr(self.trainer, "_buffered_inputs", None) is not None and not keep:
            self.trainer._buffered_inputs = None

    def _log(self, row: dict[str, Any]) -> None:
        metrics = {
            "effopd/accepted_scale": row["accepted_scale"],
            "effopd/delta_norm": row["delta_norm"],
            "effopd/candidates": len(row["trials"]) - 1,
            "effopd/search_seconds": row["seconds"],
            "effopd/search_generated_tokens": row["generated_tokens"],
            "effopd/start_score": row["trials"][0].get("score"),
            "effopd/memory_bytes": row.get("memory_bytes"),
        }
        metrics = {name: float(value) for name, value in metrics.items() if value is not None}
        if hasattr(self.trainer, "_metrics"):  # TRL averages these into the step's own log row
            for name, value in metrics.items():
                self.trainer._metrics["train"][name].append(value)
        else:  # a log during on_step_end would swallow the step's own row, so this one waits for the next event
            self._pending = metrics

    def _flush(self) -> None:
        if self._pending:
            metrics, self._pending = self._pending, None
            self.trainer.log(metrics)


def _training_task(trainer: Trainer, verify: Verifier | None) -> Task:
    """A task made of the trainer's own training rows."""
    dataset = trainer.train_dataset
    columns = getattr(dataset, "column_names", None) or []
    if "prompt" not in columns or "answer" not in columns or not hasattr(dataset, "__len__"):
        raise TaskError(
            "the accuracy gate draws D_v from the training set and needs its columns 'prompt' and 'answer'; got "
            f"{columns or type(dataset).__name__}. Add an `answer` column, or pass task=… or scorer=… to "
            "EffOPDCallback."
        )
    if verify is None:
        from effopd.tasks import MathVerifier

        verify = MathVerifier()
    rows = (dataset[i] for i in range(len(dataset)))
    examples = (
        Example(
            str(row.get("id", index)),
            row["prompt"],
            None if row["answer"] is None else str(row["answer"]),
            _metadata(row.get("metadata")),
        )
        for index, row in enumerate(rows)
    )
    return Task("training set", tuple(examples), verify)


def _metadata(value: Any) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) and value else dict(value or {})
