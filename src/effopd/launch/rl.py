"""Check the settings of a reinforcement-learning run, build its trainer, and train."""

from __future__ import annotations

from dataclasses import dataclass

from trl import ModelConfig, get_quantization_config

from effopd.distill.dgrpo import TaskDGRPOTrainer
from effopd.distill.rl import TaskGRPOTrainer, TaskRLOOTrainer
from effopd.distill.rl_config import PRESETS, TaskDGRPOConfig, TaskGRPOConfig, TaskRLOOConfig
from effopd.distill.values import check_values
from effopd.errors import ConfigError
from effopd.launch.adapters import adapter_config
from effopd.launch.prompts import load_prompts
from effopd.launch.run_checks import check_run, check_space, resume_argument
from effopd.launch.run_models import check_lengths, check_student_adapter, loading_arguments, on_meta, tokenizer_of
from effopd.launch.settings_yaml import settings_yaml
from effopd.tasks import TaskConfig, check_packages


@dataclass
class RLRunSettings:
    """All settings of a reinforcement-learning run."""

    model: ModelConfig
    task: TaskConfig
    rl: TaskGRPOConfig | TaskRLOOConfig


def build_rl_trainer(settings: RLRunSettings) -> TaskGRPOTrainer | TaskRLOOTrainer:
    """Run the checks that need no weights, then load the model and build the trainer.

    `config.yaml` is written when training starts.

    Raises:
        EffOPDError: a check failed. Nothing was written or trained.
    """
    model, task, rl = settings.model, settings.task, settings.rl
    name = model.model_name_or_path
    check_values(task)
    check_packages(task)
    names = {"--model_name_or_path": name}
    teacher = rl.teacher_model_name_or_path if isinstance(rl, TaskDGRPOConfig) else None
    if isinstance(rl, TaskDGRPOConfig):
        names["--teacher_model_name_or_path"] = teacher
    check_run(model, rl, names)
    text = rl_yaml(settings)  # before a trainer exists: another TrainingArguments resets accelerate's state
    init, other = loading_arguments(model, rl)
    models = [on_meta("--model_name_or_path", str(name), init, rl)]
    check_student_adapter(model, models[0], init, rl)
    if teacher is not None:
        models.append(on_meta("--teacher_model_name_or_path", teacher, other, rl))
    tokenizer = tokenizer_of(model, [str(each) for each in names.values()], rl)
    train, held_out, longest = load_prompts(
        task, rl, tokenizer, "Answers are needed because the reward compares with them."
    )
    batch = rl.generation_batch_size // rl.num_generations
    if len(train) < batch:
        raise ConfigError(
            f"a generation batch takes {batch} prompts ({rl.generation_batch_size} answers, {rl.num_generations} per "
            f"prompt), but the task has only {len(train)}. Lower --per_device_train_batch_size or raise --train_size."
        )
    check_lengths(models, longest, rl.max_completion_length)
    check_space(model, rl, models, len(train), batch, effopd=False)
    rl.model_init_kwargs = init
    trainer_class: type[TaskGRPOTrainer | TaskRLOOTrainer] = TaskGRPOTrainer
    if isinstance(rl, TaskDGRPOConfig):
        rl.teacher_model_init_kwargs = other
        trainer_class = TaskDGRPOTrainer
    elif isinstance(rl, TaskRLOOConfig):
        trainer_class = TaskRLOOTrainer
    trainer = trainer_class(
        name,
        rl,
        train,
        held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=adapter_config(model),
    )
    trainer.run_dir.settings = text
    return trainer


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
