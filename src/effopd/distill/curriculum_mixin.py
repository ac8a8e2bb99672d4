"""CLPD in a training run: prompts by stage, one teacher in memory, a new search per stage."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import AutoConfig, TrainerCallback

from effopd.common.distributed import broadcast_from_rank0, rank
from effopd.common.files import write_atomically
from effopd.common.isolation import evaluating, isolated_rng
from effopd.distill.curriculum import cut, row_difficulty, stage_batches, stage_of
from effopd.distill.divergence import gathered, shared_vocab_size, token_logprobs
from effopd.distill.horizon import look_aheads
from effopd.distill.scoring import rollouts_per_step
from effopd.distill.teachers.loading import teacher_revision
from effopd.distill.teachers.offload import in_use
from effopd.distill.teachers.settings import split_revision
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.models import release
from effopd.distill.trl_host.state import log_metrics
from effopd.errors import CheckpointError, ConfigError
from effopd.models.checks import check_models
from effopd.models.head import Head
from effopd.models.token_batch import TokenBatch
from effopd.runs.checkpoints import reading
from effopd.tasks.prompts import prompt_ids

CURRICULUM_FILE = "effopd_curriculum.json"


class CurriculumMixin(DistillationHooks):
    """Mixed into `OPDTrainer` before `RunMixin`.

    Differs from a run without a curriculum: the prompts of step k are those of its stage; with
    `args.curriculum_teachers`, the stage's teacher replaces the previous one in memory. Evaluations
    are against the teacher that the run names, so that the values of all stages are comparable.
    """

    teacher_model: Any
    _mixture_head: Head | None

    def _open_curriculum(self, teacher: Any) -> Any:
        """Check the settings against the dataset; return the teacher to load first.

        Args:
            teacher: the teacher of evaluations: a path or a model.
        """
        args = self.args
        self._evaluated_by, self._present = teacher, teacher
        self.difficulty: list[float] | None = None
        if args.curriculum == "none":
            return teacher
        if not hasattr(self.train_dataset, "__len__"):
            raise ConfigError(
                f"curriculum={args.curriculum!r} sorts the training rows: expected a dataset with a length, got an "
                "iterable one."
            )
        check_stages(args, [*self.train_dataset])
        if args.curriculum_teachers:
            self._present = args.curriculum_teachers[0]
        return self._present

    def _shared_by_all(self, vocab_size: int) -> int:
        """`vocab_size`, or less if a later teacher has fewer rows."""
        if not self.args.curriculum_teachers:
            return vocab_size
        teachers = (*self.args.curriculum_teachers, self._evaluated_by)
        return min(vocab_size, *(self._config_of(each).get_text_config().vocab_size for each in teachers))

    def _config_of(self, teacher: Any) -> Any:
        if not isinstance(teacher, str):
            return teacher.config
        name, own = split_revision(teacher)
        revision = teacher_revision(self.args) if teacher == self._evaluated_by else None
        return AutoConfig.from_pretrained(
            name, revision=own or revision, trust_remote_code=self.args.trust_remote_code
        )

    # -- teachers ----------------------------------------------------------------------------------

    def use_teacher(self, teacher: Any) -> None:
        """Replace the teacher in memory by another one, unless it is there already.

        Args:
            teacher: a path or a model.

        Raises:
            CompatibilityError: the teacher does not fit the student.
        """
        if teacher == self._present:
            return
        with isolated_rng():
            release(self, self.teacher_model)
            self.teacher_model = self._mixture_head = None
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            self.teacher_model = self._prepare_frozen(teacher, "teacher")
            student, loaded = map(self.accelerator.unwrap_model, (self.model, self.teacher_model))
            shared_vocab_size(student, loaded, len(self.text_tokenizer))
            with in_use(self.teacher_model):
                check_models(
                    student, {"teacher": self.teacher_model}, generates=False, decoding=self.args.decoding_roles
                )
        self._present = teacher

    @contextmanager
    def _evaluation_teacher(self) -> Iterator[None]:
        before = self._present
        with self.ledger.track("eval"):
            self.use_teacher(self._evaluated_by)
        try:
            yield
        finally:
            with self.ledger.track("eval"):
                self.use_teacher(before)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate against the run's named teacher, also during the stages of other teachers."""
        with self._evaluation_teacher():
            return super().evaluate(*args, **kwargs)

    # -- data order --------------------------------------------------------------------------------

    def train_sampler(self, sampler):
        wrapped = super().train_sampler(sampler)
        if self.args.curriculum == "none":
            return wrapped
        self._epochs.sampler = StageSampler(sampler, self)
        return self._epochs.sampler

    def stage(self, step: int) -> int:
        """Stage, from 0, of the step after `step` steps."""
        args = self.args
        return stage_of(step, self.state.max_steps, args.stages, args.updates_per_rollouts)

    def measure_difficulty(self, checkpoint: Path | None) -> None:
        """Set the difficulty of every row; read the student's values from `checkpoint`, if any."""
        args = self.args
        if args.curriculum == "nll" and checkpoint is not None:
            self.difficulty = _read(checkpoint)
        elif args.curriculum == "nll" and args.curriculum_order != "shuffled":
            self.difficulty = broadcast_from_rank0(self._negative_log_likelihoods())
        else:
            self.difficulty = [row_difficulty(args.curriculum, row) for row in self.train_dataset]

    @torch.no_grad()
    def _negative_log_likelihoods(self) -> list[float]:
        """−log p(answer | prompt) of the student, mean over the answer's tokens, in nats.

        Every process measures all rows, because the forward of a sharded model is collective.
        """
        student, tokenizer = self.accelerator.unwrap_model(self.model), self.text_tokenizer
        data, size, values = self.train_dataset, self.args.per_device_eval_batch_size, []
        with evaluating(student), self.accelerator.autocast():
            for start in range(0, len(data), size):
                rows = data[start : start + size]
                prompts = [prompt_ids(tokenizer, each, self.args.chat_template_kwargs) for each in rows["prompt"]]
                answers = [tokenizer(str(text), add_special_tokens=False)["input_ids"] for text in rows["answer"]]
                batch = TokenBatch.of(prompts, answers, tokenizer.pad_token_id)
                if rank() == 0:
                    self.ledger.count("other", forward=sum(map(len, [*prompts, *answers])))
                sums = gathered(student, partial(self._answer_nll, student, batch, answers))
                values += [total / max(1, len(answer)) for total, answer in zip(sums, answers, strict=True)]
        return values

    def _answer_nll(self, student: Any, batch: TokenBatch, answers: list[list[int]]) -> list[float]:
        """Sums over the answers' tokens."""
        hidden_NH = batch.hidden(student)
        ids_N = torch.tensor([token for answer in answers for token in answer], device=hidden_NH.device)
        head = Head.of(student, self.vocab_size).whole()
        return batch.sums(-token_logprobs(hidden_NH, head, ids_N, 1.0)[0])

    def rows_of_epoch(self, epoch: int, batch: int, seed: int | None) -> list[int]:
        """Rows of an epoch's batches, in order."""
        args = self.args
        assert self.difficulty is not None, "the callback measures it when training starts"
        stages = cut(self.difficulty, args.stages, args.curriculum_order, args.seed)
        total = -(-self.state.max_steps // args.updates_per_rollouts)
        each = len(self.train_dataset) // batch
        return stage_batches(stages, batch, total, (epoch + 1) * each, seed)[epoch * each * batch :]


def check_stages(args: Any, rows: list[Any]) -> None:
    """Check that every row has a difficulty, and that every stage has rows and steps.

    Args:
        args: an `OPDConfig` with a curriculum.
        rows: rows of the training data, as `row_difficulty` reads them.

    Raises:
        ConfigError: a stage has fewer rows than a step takes, or there are fewer steps than stages.
        TaskError: as `row_difficulty`.
    """
    for row in rows:
        row_difficulty(args.curriculum, row)
    batch, stages = rollouts_per_step(args), args.stages
    if len(rows) // stages < batch:
        raise ConfigError(
            f"curriculum_stages={stages} cuts {len(rows)} prompts into stages of {len(rows) // stages}, but a step "
            f"takes {batch}. Lower --curriculum_stages or --per_device_train_batch_size, or raise --train_size."
        )
    shared = args.updates_per_rollouts
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * (len(rows) // batch) * shared)
    if -(-steps // shared) < stages:
        raise ConfigError(
            f"curriculum_stages={stages} but the run has {steps} step(s)"
            + (f", {shared} per batch of rollouts" if shared > 1 else "")
            + ": expected at least one batch of rollouts per stage. Lower --curriculum_stages or raise --max_steps."
        )


class StageSampler(Sampler[int]):
    """TRL's prompt sampler with the rows of a curriculum; see `EpochSampler`."""

    def __init__(self, sampler: Any, trainer: CurriculumMixin):
        self._sampler, self._trainer, self._current = sampler, trainer, 0

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        rows = self._trainer.rows_of_epoch(
            self._current, sampler.batch_size, sampler.seed if sampler.shuffle else None
        )
        for start in range(0, len(rows), sampler.batch_size):
            for _ in range(sampler.repeat_count):
                yield from rows[start : start + sampler.batch_size]

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose rows are next."""
        self._current = epoch


class CurriculumCallback(TrainerCallback):
    """At the start of a stage: its teacher, and a new anchor and schedule of the look-ahead.

    Args:
        trainer: an `OPDTrainer` with a curriculum.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def check_resume(self, checkpoint: Path) -> None:
        """Check that the checkpoint has the student's difficulties, if they are used.

        Raises:
            CheckpointError: it has none, or the file is damaged.
        """
        if self._trainer.args.curriculum == "nll":
            rows, known = len(self._trainer.train_dataset), len(_read(checkpoint))
            if known != rows:
                raise CheckpointError(
                    f"{checkpoint} has the difficulties of {known} rows, but the training data has {rows}. Resume "
                    "with the run's data."
                )

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the difficulty of every row; the student's passes are charged."""
        with self._trainer.ledger.charged("other"):
            self._trainer.measure_difficulty(self._trainer.resumed_from)

    def on_step_begin(self, args, state, control, **kwargs):
        """Enter the stage of the coming step."""
        trainer, step = self._trainer, state.global_step
        stage = trainer.stage(step)
        if trainer.args.curriculum_teachers:
            with trainer.ledger.track("teacher"):
                trainer.use_teacher(trainer.args.curriculum_teachers[stage])
        if step > 0 and stage != trainer.stage(step - 1):
            for look_ahead in look_aheads(trainer):
                look_ahead.restart(step)
        log_metrics(trainer, {"curriculum/stage": float(stage + 1)})

    def save_state(self, folder: Path) -> None:
        """Write difficulties that the initial student measured into a checkpoint folder."""
        trainer = self._trainer
        if trainer.args.curriculum == "nll" and rank() == 0:
            text = json.dumps({"difficulty": trainer.difficulty})
            write_atomically(folder / CURRICULUM_FILE, lambda path: path.write_text(text))


def _read(checkpoint: Path) -> list[float]:
    if not (checkpoint / CURRICULUM_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} has no difficulties of the rows ({CURRICULUM_FILE}): it was written without --curriculum "
            "nll. Resume with the run's curriculum, or start a new run from its weights."
        )
    with reading(checkpoint, CURRICULUM_FILE):
        return [float(value) for value in json.loads((checkpoint / CURRICULUM_FILE).read_text())["difficulty"]]
