"""Check the settings of a reinforcement-learning run, build its trainer, and train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trl import ModelConfig, get_quantization_config

from effopd.distill.dgrpo import TaskDGRPOTrainer
from effopd.distill.rl import TaskGRPOTrainer, TaskRLOOTrainer
from effopd.distill.rl_config import PRESETS, TaskDGRPOConfig, TaskGRPOConfig, TaskRLOOConfig
from effopd.distill.values import check_values
from effopd.errors import ConfigError
from effopd.launch.prompts import load_prompts, more_prompts
from effopd.launch.run_checks import check_run, check_space, resume_argument
from effopd.launch.run_models import (
    STUDENT,
    NamedModel,
    adapter_of,
    check_lengths,
    frozen_on_meta,
    loading_arguments,
    on_meta,
    tokenizer_of,
    with_adapter,
)
from effopd.launch.settings_yaml import settings_yaml
from effopd.tasks import Task, TaskConfig, check_packages


@dataclass
class RLRunSettings:
    """All settings of a reinforcement-learning run."""

    model: ModelConfig
    task: TaskConfig
    rl: TaskGRPOConfig | TaskRLOOConfig


#: Flag of the teacher of dGRPO.
TEACHER = "--teacher_model_name_or_path"
#: Sentence of errors about rows without answers.
WHY_ANSWERS = "Answers are needed because the reward compares with them."


def build_rl_trainer(settings: RLRunSettings) -> TaskGRPOTrainer | TaskRLOOTrainer:
    """Run the checks that need no weights, then load the model and build the trainer.

    `config.yaml` is written when training starts.

    Raises:
        EffOPDError: a check failed. Nothing was written or trained.
    """
    model, task, rl = settings.model, settings.task, settings.rl
    names = check_settings(settings)
    text = rl_yaml(settings)  # before a trainer exists: another TrainingArguments resets accelerate's state
    init, other = loading_arguments(model, rl)
    models = check_models_of(settings)
    tokenizer = tokenizer_of(model, names, rl)
    train, held_out, longest = load_prompts(task, rl, tokenizer, WHY_ANSWERS)
    check_prompts(settings, train)
    check_fit(settings, models, train, longest)
    rl.model_init_kwargs = init
    trainer_class: type[TaskGRPOTrainer | TaskRLOOTrainer] = TaskGRPOTrainer
    if isinstance(rl, TaskDGRPOConfig):
        rl.teacher_model_init_kwargs = other
        trainer_class = TaskDGRPOTrainer
    elif isinstance(rl, TaskRLOOConfig):
        trainer_class = TaskRLOOTrainer
    trainer = trainer_class(
        model.model_name_or_path,
        rl,
        train,
        held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=adapter_of(model, rl),
    )
    trainer.run_dir.settings = text
    return trainer


def check_settings(settings: RLRunSettings) -> dict[str, str]:
    """Check the settings that need no model configuration, data or network; return flag → model.

    Raises:
        EffOPDError: a setting is invalid.
    """
    model, task, rl = settings.model, settings.task, settings.rl
    check_values(task)
    check_packages(task)
    names = {STUDENT: model.model_name_or_path}
    if isinstance(rl, TaskDGRPOConfig):
        names[TEACHER] = rl.teacher_model_name_or_path
    check_run(model, rl, names)
    return {flag: str(name) for flag, name in names.items()}


def check_models_of(settings: RLRunSettings) -> list[NamedModel]:
    """Student and, with dGRPO, teacher on the meta device, after their checks.

    Raises:
        CompatibilityError: a model cannot be read.
        ConfigError: a model does not support a loading argument or adapter name.
    """
    model, rl = settings.model, settings.rl
    init, other = loading_arguments(model, rl)
    student = on_meta(STUDENT, str(model.model_name_or_path), init, rl)
    adapted = with_adapter(model, student, init, rl)
    return [adapted, *frozen_on_meta(teacher_of(rl), other, rl, student, init)]


def teacher_of(rl: TaskGRPOConfig | TaskRLOOConfig) -> dict[str, str]:
    """Flag → name of the teacher; empty without one."""
    return {TEACHER: str(rl.teacher_model_name_or_path)} if isinstance(rl, TaskDGRPOConfig) else {}


def check_prompts(settings: RLRunSettings, train: Task) -> None:
    """Check that there are enough prompts for a generation batch.

    Raises:
        ConfigError: there are too few.
    """
    rl, batch = settings.rl, prompts_per_batch(settings.rl)
    if len(train) < batch:
        raise ConfigError(
            f"a generation batch takes {batch} prompts ({rl.generation_batch_size} answers, {rl.num_generations} per "
            f"prompt), but the task has only {len(train)}. Lower --per_device_train_batch_size, or "
            f"{more_prompts(len(train), train.available)}."
        )


def check_fit(settings: RLRunSettings, models: Sequence[NamedModel], train: Task, longest: int | None) -> None:
    """Check that prompts and answers fit into the models, and the run onto the disk.

    Raises:
        ConfigError, CheckpointError: they do not fit.
    """
    check_lengths(models, longest, settings.rl.max_completion_length)
    check_space(settings.model, settings.rl, models, len(train), prompts_per_batch(settings.rl), effopd=False)


def prompts_per_batch(rl: TaskGRPOConfig | TaskRLOOConfig) -> int:
    """Number of prompts that are answered at once, over all processes."""
    return rl.generation_batch_size // rl.num_generations


def run_rl(settings: RLRunSettings) -> TaskGRPOTrainer | TaskRLOOTrainer:
    """Train and save the final model in the run directory."""
    trainer = build_rl_trainer(settings)
    trainer.train(resume_from_checkpoint=resume_argument(settings.rl))
    trainer.save_final()
    return trainer


def rl_yaml(settings: RLRunSettings) -> str:
    """The settings as YAML for `effopd rl --config`."""
    algorithm = settings.rl.algorithm
    return settings_yaml(
        settings.model, settings.task, settings.rl, {"algorithm": algorithm}, preset=PRESETS[algorithm]
    )
