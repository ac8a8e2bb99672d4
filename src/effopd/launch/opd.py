"""Check the settings of a distillation run, build its trainer, and train.

`effopd train` and `effopd quickstart` share this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import ModelConfig, get_quantization_config

from effopd.distill.callback import EffOPDCallback, check_deepspeed
from effopd.distill.config import OPDConfig
from effopd.distill.curriculum import OF_ANSWERS
from effopd.distill.curriculum_mixin import check_stages
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.distill.scoring import check_rollouts, check_validation_size, rollouts_per_step
from effopd.distill.served.trainer import ServedOPDTrainer
from effopd.distill.teachers.manifest import ONLY, check_same_teachers, planned_entries, read_manifest
from effopd.distill.teachers.settings import split_revision
from effopd.distill.teachers.several import check_task_labels
from effopd.distill.trainer import OPDTrainer
from effopd.distill.values import check_values
from effopd.errors import ConfigError
from effopd.extrapolate.anchored import usable_device
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.parameter_rules import select
from effopd.launch.offline import Stored, check_answers, check_offline_settings, stored_rollouts
from effopd.launch.optimizer_checks import check_copies
from effopd.launch.prompts import evaluates, evaluation_flag, load_prompts, more_prompts
from effopd.launch.run_checks import check_run, check_space, resume_argument
from effopd.launch.run_models import (
    REFERENCE,
    STUDENT,
    NamedModel,
    adapter_of,
    check_lengths,
    frozen_models,
    frozen_on_meta,
    kept_columns,
    loading_arguments,
    on_meta,
    teachers_of,
    tokenizer_of,
    with_adapter,
)
from effopd.launch.served import served_teacher
from effopd.launch.settings_yaml import plain, settings_yaml
from effopd.launch.teacher_memory import dtype_of, quantization_of
from effopd.runs.run_dir import RunDir
from effopd.tasks import Task, TaskConfig, check_packages


@dataclass
class RunSettings:
    """All settings of a distillation run."""

    model: ModelConfig
    task: TaskConfig
    opd: OPDConfig
    effopd: EffOPDConfig


def build_trainer(settings: RunSettings) -> OPDTrainer | OfflineOPDTrainer:
    """Run the checks that need no weights, then load the models and build the trainer.

    `config.yaml` is written when training starts.

    Raises:
        EffOPDError: a check failed. Nothing was written or trained.
    """
    model, task, opd, effopd = settings.model, settings.task, settings.opd, settings.effopd
    check_settings(settings)
    text = to_yaml(settings)  # before a trainer exists: another TrainingArguments resets accelerate's state
    models = check_models_of(settings)
    tokenizer = tokenizer_of(model, frozen_models(opd), opd)
    stored = stored_rollouts(model, opd, tokenizer, network=True)
    given = check_answers(opd, tokenizer)
    train, held_out, longest = load_prompts(task, opd, tokenizer, why_answers(settings), keep=kept_columns(opd))
    check_prompts(settings, train, stored, held_out)
    longest = max(longest or 0, given, 0 if stored is None else stored.longest) or None
    check_lengths(models, *lengths(settings, longest, stored))
    check_space(model, opd, models, len(train), rollouts_per_step(opd), effopd=effopd.enabled)
    served = served_teacher(opd, tokenizer, models[0], longest)
    opd.model_init_kwargs, opd.teacher_model_init_kwargs = loading_arguments(model, opd)
    common: dict[str, Any] = {
        "processing_class": tokenizer,
        "eval_task": held_out,
        "quantization_config": get_quantization_config(model),
        "peft_config": adapter_of(model, opd),
    }
    trainer: OPDTrainer | OfflineOPDTrainer
    if served is not None:
        trainer = ServedOPDTrainer(
            model.model_name_or_path, opd, train_dataset=train.to_dataset(), served=served, **common
        )
    elif stored is not None:
        trainer = OfflineOPDTrainer(model.model_name_or_path, opd, stored=stored, **common)
    else:
        trainer = OPDTrainer(
            model.model_name_or_path,
            opd.teacher_sources or opd.teacher_model_name_or_path,
            opd,
            train_dataset=train.to_dataset(),
            **common,
        )
    trainer.task_name = train.name
    if effopd.enabled:
        trainer.add_callback(EffOPDCallback(trainer, effopd, task=train))
    trainer.run_dir.settings = text
    return trainer


def check_settings(settings: RunSettings) -> None:
    """Check the settings that need no model configuration, data or network.

    Also sets `eval_on_start` if it is `None`.

    Raises:
        EffOPDError: a setting is invalid.
    """
    opd, effopd = settings.opd, settings.effopd
    check_values(settings.task)
    check_packages(settings.task)
    check_values(effopd, "effopd.")
    check_run(settings.model, opd, model_names(settings))
    _check_resumed_teachers(settings)
    usable_device(effopd.anchor_device)
    if opd.eval_on_start is None:  # evaluate before the first jump
        opd.eval_on_start = effopd.enabled and opd.eval_strategy != "no"
    check_offline_settings(opd, effopd)
    if effopd.enabled:
        check_copies(opd, lora=settings.model.use_peft)
        check_deepspeed(opd, lora=settings.model.use_peft)
    if effopd.score_rollouts is not None:
        check_rollouts(opd, effopd.score_rollouts)


def model_names(settings: RunSettings) -> dict[str, str | None]:
    """Flag → folder or Hub id of every model that the settings name; `None`: a missing name."""
    opd = settings.opd
    names = {
        STUDENT: settings.model.model_name_or_path,
        "--teacher_model_name_or_path": opd.teacher_model_name_or_path,
    }
    if (opd.offline or opd.served or opd.teacher_sources) and opd.teacher_model_name_or_path is None:
        del names["--teacher_model_name_or_path"]
    names |= {flag: split_revision(source)[0] for flag, source in teachers_of(opd).items()}
    if opd.reference_model_name_or_path is not None:
        names[REFERENCE] = opd.reference_model_name_or_path
    return names


def _check_resumed_teachers(settings: RunSettings) -> None:
    """Check labels, dtype and quantization of the teachers against a checkpoint that is resumed.

    Their weights are compared when they are loaded.

    Raises:
        CheckpointError: they differ.
    """
    opd = settings.opd
    checkpoint = RunDir(opd.output_dir).to_resume(resume_argument(opd))
    if checkpoint is None or opd.offline or read_manifest(checkpoint) is None:
        return
    sources = opd.teacher_sources or {ONLY: str(opd.teacher_model_name_or_path)} | opd.stage_teachers
    sources = {label: split_revision(source)[0] for label, source in sources.items()}
    init = loading_arguments(settings.model, opd)[1]
    check_same_teachers(checkpoint, planned_entries(sources, dtype_of(init), quantization_of(opd, init)))


def check_models_of(settings: RunSettings) -> list[NamedModel]:
    """Student, teacher and reference on the meta device, in this order, after their checks.

    Raises:
        CompatibilityError: a model cannot be read or distilled.
        ConfigError: a model does not support a loading argument, attention implementation or
            adapter name, or the look-ahead's `parameters` select nothing in the student.
    """
    model, opd = settings.model, settings.opd
    student, other = loading_arguments(model, opd)
    trained = on_meta(STUDENT, str(model.model_name_or_path), student, opd)
    frozen = frozen_on_meta(frozen_models(opd), other, opd, trained, student)
    trained = with_adapter(model, trained, student, opd)
    if settings.effopd.enabled and not model.use_peft:
        names = (name for name, _ in trained.meta.named_parameters())
        select(names, str(settings.effopd.parameters), "the student")
    return [trained, *frozen]


def check_prompts(
    settings: RunSettings, train: Task, stored: Stored | None = None, held_out: Task | None = None
) -> None:
    """Check that there are enough prompts for a step and for the validation prompts, and that every
    row names one of several teachers.

    Raises:
        ConfigError, TaskError: there are too few prompts.
    """
    if stored is None:
        check_step(settings.opd, len(train), train.available)
    if settings.opd.teacher_sources:
        for task in (train, held_out):
            if task is not None:
                check_task_labels(task, list(settings.opd.teacher_sources), settings.opd.teacher_column)
    if settings.opd.curriculum != "none":
        check_stages(settings.opd, [vars(example) for example in train.examples])
    if settings.effopd.validation_size is not None:
        check_validation_size(settings.effopd.validation_size, train)


def lengths(settings: RunSettings, longest: int | None, stored: Stored | None) -> tuple[int | None, int | None]:
    """Tokens of the longest prompt and of the longest answer that a run reads or samples.

    A run on stored rollouts without evaluation and look-ahead samples nothing: its longest row
    counts.

    Args:
        longest: tokens of the longest prompt.
    """
    opd = settings.opd
    if stored is None or evaluates(opd) or settings.effopd.enabled:
        return longest, opd.max_completion_length
    row = max(stored.rows, key=lambda row: len(row.prompt_ids) + len(row.completion_ids))
    return len(row.prompt_ids), len(row.completion_ids)


def check_step(opd: OPDConfig, prompts: int, available: int | None = None) -> None:
    """Check that there are enough prompts for one step.

    Args:
        available: number of prompts that the source could give; `None`: any number.

    Raises:
        ConfigError: there are too few.
    """
    batch = rollouts_per_step(opd)
    if prompts < batch:
        raise ConfigError(
            f"a step takes {batch} prompts, but the task has only {prompts}. Lower --per_device_train_batch_size "
            f"or --gradient_accumulation_steps, or {more_prompts(prompts, available)}."
        )


def why_answers(settings: RunSettings) -> str:
    """Sentence that names the settings that need reference answers to the training prompts.

    "": none needs them. Evaluation does if its prompts are held out from the same source.
    """
    opd, effopd = settings.opd, settings.effopd
    causes: dict[str, str] = {}  # cause → what needs no answers
    if effopd.scored:
        chosen = "validation_size" in effopd.changed
        cause = f"validation_size {effopd.validation_size}" if chosen else f"strategy {effopd.strategy}"
        causes[f"--effopd.{cause}"] = "--effopd.strategy newton_search"
    if opd.curriculum in OF_ANSWERS:
        causes[f"--curriculum {opd.curriculum}"] = "another curriculum"
    if evaluates(opd) and settings.task.eval_task is None:
        causes[evaluation_flag(opd)] = "an --eval_task with answers (or no evaluation)"
    if not causes:
        return ""
    return f"Answers are needed because of {' and '.join(causes)}. Without them, use {' and '.join(causes.values())}."


def run(settings: RunSettings) -> OPDTrainer | OfflineOPDTrainer:
    """Train and save the final model in the run directory."""
    trainer = build_trainer(settings)
    trainer.train(resume_from_checkpoint=resume_argument(settings.opd))
    trainer.save_final()
    return trainer


def to_yaml(settings: RunSettings) -> str:
    """The settings as YAML for `effopd train --config`."""
    return settings_yaml(settings.model, settings.task, settings.opd, {"effopd": plain(settings.effopd)})
