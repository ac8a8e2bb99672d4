"""From settings to a finished run: checks → trainer → train. `effopd train` and `effopd quickstart` both come here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from accelerate.state import AcceleratorState, PartialState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, get_peft_config, get_quantization_config

from effopd.distill.best_model import check_metric
from effopd.distill.config import OPDConfig
from effopd.distill.preflight import (
    check_disk,
    check_model_name,
    check_models,
    check_task,
    load_tokenizer,
    parameter_count,
)
from effopd.distill.resuming import check_kind
from effopd.distill.run_dir import RunDir, in_trajectory, step_of_checkpoint
from effopd.distill.saving import check_generation_config
from effopd.distill.task_eval import metric_names
from effopd.distill.teacher_kl import check_rollouts, rollouts_a_step
from effopd.distill.trainer import OPDTrainer
from effopd.errors import ConfigError
from effopd.extrapolate.callback import EffOPDCallback, check_validation_size
from effopd.extrapolate.config import EffOPDConfig
from effopd.optional import TRACKERS, ensure, is_available
from effopd.tasks import Task, TaskConfig, load_task
from effopd.versions import versions


@dataclass
class RunSettings:
    """Everything that defines a run."""

    model: ModelConfig
    task: TaskConfig
    opd: OPDConfig
    effopd: EffOPDConfig


def build_trainer(settings: RunSettings) -> OPDTrainer:
    """Check everything that can be checked cheaply and load the models; `config.yaml` is written when training starts.

    Raises:
        EffOPDError: a subclass that says what does not fit; nothing has been written or trained then.
    """
    model, task, opd, effopd = settings.model, settings.task, settings.opd, settings.effopd
    check_settings(settings)
    text = to_yaml(settings)  # before a trainer exists: another TrainingArguments resets accelerate's state
    tokenizer = tokenizer_of(model, other_models(opd), opd)
    train, held_out = prompts(task, opd, tokenizer, why_answers(opd, effopd))
    check_prompts(settings, train)
    check_space(model, opd, len(train), rollouts_a_step(opd), effopd=effopd.enabled)
    _merge_init_kwargs(model, opd)
    trainer = OPDTrainer(
        model.model_name_or_path,
        opd.teacher_model_name_or_path,
        opd,
        train_dataset=train.to_dataset(),
        processing_class=tokenizer,
        eval_task=held_out,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.task_name = train.name
    if effopd.enabled:
        trainer.add_callback(EffOPDCallback(trainer, effopd, task=train))
    trainer.run_dir.settings = text
    return trainer


def check_settings(settings: RunSettings) -> None:
    """Refuse what its settings alone tell against; no model, no row and no network is needed.

    Raises:
        EffOPDError: a subclass that says what does not fit.
    """
    opd, effopd = settings.opd, settings.effopd
    names = {
        "--model_name_or_path": settings.model.model_name_or_path,
        "--teacher_model_name_or_path": opd.teacher_model_name_or_path,
    }
    if opd.reference_model_name_or_path is not None:
        names["--reference_model_name_or_path"] = opd.reference_model_name_or_path
    check_run(settings.model, opd, names)
    if effopd.enabled and effopd.resolved_scorer == "teacher_kl":
        check_rollouts(opd, effopd.score_rollouts)


def check_run(model: ModelConfig, args: Any, names: Mapping[str, str | None]) -> None:
    """Model names, by the flags they are given with, packages, and the folder or checkpoint that a run starts from."""
    for flag, name in names.items():
        check_model_name(flag, name)
    require_packages(model, args)
    run_dir, resume = RunDir(args.output_dir), resume_argument(args)
    run_dir.refuse_unwritable()
    if checkpoint := run_dir.to_resume(resume):
        check_kind(checkpoint, adapter=model.use_peft)
    check_metric(args, metric_names(teacher=hasattr(args, "teacher_model_name_or_path"), greedy=args.eval_greedy))
    if not resume:
        run_dir.refuse_overwrite()


def check_prompts(settings: RunSettings, train: Task) -> None:
    """There are prompts for a step, and for D_v.

    Raises:
        ConfigError, TaskError: there are too few.
    """
    batch = rollouts_a_step(settings.opd)
    if len(train) < batch:
        raise ConfigError(
            f"a step takes {batch} prompts but the task has {len(train)}: lower --per_device_train_batch_size or "
            "--gradient_accumulation_steps, or raise --train_size."
        )
    if settings.effopd.scored:
        check_validation_size(settings.effopd, train)


def other_models(opd: OPDConfig) -> list[str]:
    """The models of a run that read the student's tokens."""
    return [name for name in (opd.teacher_model_name_or_path, opd.reference_model_name_or_path) if name]


def tokenizer_of(model: ModelConfig, others: Sequence[str], args: Any) -> Any:
    """The student's tokenizer, once it is known that `others` read its tokens."""
    name, load = model.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(name, revision=model.model_revision, **load)
    check_generation_config(name, revision=model.model_revision)
    for other in others:
        check_models(name, other, tokenizer, **load)
    return tokenizer


def evaluates(args: Any) -> bool:
    """Whether a run measures itself on held-out prompts."""
    return args.eval_strategy != "no" or args.eval_on_start


def why_answers(opd: OPDConfig, effopd: EffOPDConfig) -> str:
    """The settings of a run that need reference answers, as a sentence; "" if it needs none."""
    causes = []
    if effopd.scored:
        causes.append(f"--effopd.scorer {effopd.scorer}" if effopd.scorer else f"--effopd.strategy {effopd.strategy}")
    if evaluates(opd):
        strategy = getattr(opd.eval_strategy, "value", opd.eval_strategy)
        causes.append("--eval_on_start" if strategy == "no" else f"--eval_strategy {strategy}")
    if not causes:
        return ""
    return f"Answers are needed because of {' and '.join(causes)}; --effopd.strategy lookahead without evaluation needs none."


def prompts(task: TaskConfig, args: Any, tokenizer: Any, why: str) -> tuple[Task, Task | None]:
    """Training and held-out prompts, checked; held out only if the run evaluates.

    Args:
        tokenizer: the student's, or `None`: prompts are not measured then.
        why: what needs reference answers, as a sentence; "" if nothing does.
    """
    train = load_task(task, "train", answers_required=bool(why), why=why)
    held_out = load_task(task, "eval", why=why) if evaluates(args) else None
    for part in (train, held_out):
        if part is not None:
            check_task(part, tokenizer, task.max_prompt_length, **(args.chat_template_kwargs or {}))
    return train, held_out


def resume_argument(opd: Any) -> str | bool | None:
    """`resume_from_checkpoint` with the words of a command line understood."""
    value = opd.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(value).lower(), value)


def require_packages(model: ModelConfig, args: Any) -> None:
    """Refuse flags whose package is missing, before anything is loaded.

    Raises:
        MissingDependencyError: it is.
        ConfigError: a tracker that the host does not know.
    """
    for module, wanted in (
        ("peft", model.use_peft),
        ("bitsandbytes", model.load_in_4bit or model.load_in_8bit),
        ("vllm", args.use_vllm),
    ):
        if wanted:
            ensure(module)
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ConfigError(f"--report_to: {error}") from error
    for tracker in TRACKERS.intersection(args.report_to):
        if tracker != "tensorboard" or not is_available("tensorboardX"):  # either will do
            ensure(tracker)


def check_space(model: ModelConfig, args: Any, prompts: int, batch: int, *, effopd: bool) -> None:
    """Refuse a run whose checkpoints and trajectory will not fit on the disk. Adapters are small: they are not counted.

    Raises:
        CheckpointError: less is free than a full set takes, without what the run has there already.
    """
    if model.use_peft:
        return
    steps = args.max_steps if args.max_steps > 0 else math.ceil(prompts / batch * args.num_train_epochs)
    run_dir = RunDir(args.output_dir)
    checkpoint = run_dir.to_resume(resume_argument(args))
    done = step_of_checkpoint(checkpoint) if checkpoint else 0
    kept = 0
    if done < steps and args.save_strategy != SaveStrategy.NO:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
        kept = max(1, math.ceil(steps / every)) if args.save_strategy == SaveStrategy.STEPS else 1
        kept = 1 + min(kept, args.save_total_limit or kept)  # one more while it is being written
    check_disk(
        args.output_dir,
        parameter_count(model.model_name_or_path, trust_remote_code=args.trust_remote_code),
        checkpoints=kept,
        models=1 + sum(in_trajectory(args.trajectory, step, steps) for step in range(steps + 1)),
        optimizer=not args.save_only_model,
        effopd=effopd,
        held=run_dir.held(done),
    )


def _merge_init_kwargs(model: ModelConfig, opd: OPDConfig) -> None:
    """TRL's command line does the same: model flags become loading arguments, explicit ones win."""
    common = {"attn_implementation": model.attn_implementation, "trust_remote_code": opd.trust_remote_code}
    dtype = {"dtype": model.dtype} if model.dtype not in (None, "auto") else {}
    student = common | {"revision": model.model_revision} | dtype
    opd.model_init_kwargs = student | dict(opd.model_init_kwargs or {})
    opd.teacher_model_init_kwargs = common | dtype | dict(opd.teacher_model_init_kwargs or {})


def run(settings: RunSettings) -> OPDTrainer:
    """Train, and leave the final model beside the rows in the run directory."""
    trainer = build_trainer(settings)
    trainer.train(resume_from_checkpoint=resume_argument(settings.opd))
    trainer.save_final()
    return trainer


def to_yaml(settings: RunSettings) -> str:
    """The run as YAML that `effopd train --config` takes back."""
    return settings_yaml(settings.model, settings.task, settings.opd, {"effopd": plain(settings.effopd)})


#: Written even where they are the default: what one looks for first, and what another machine has another default of.
_ALWAYS = ("output_dir", "seed", "learning_rate", "max_steps", "loss_type", "max_completion_length", "bf16", "fp16")


def settings_yaml(
    model: ModelConfig, task: TaskConfig, args: Any, extra: dict[str, Any], preset: Collection[str] = ()
) -> str:
    """Every setting that is not a default, all of ours, what depends on the machine or on a preset, and the versions of the
    libraries as comments."""
    with _accelerate_undisturbed():
        default = type(args)(output_dir=args.output_dir)
    values = differing(model, ModelConfig()) | plain(task)
    values |= differing(args, default) | {
        name: getattr(args, name) for name in (*_ALWAYS, *preset) if hasattr(args, name)
    }
    values.pop("resume_from_checkpoint", None)
    values.pop("generation_batch_size", None)  # TRL derives one from the other and takes only one back
    values.pop("steps_per_generation", None)
    if getattr(args, "steps_per_generation", None) not in (None, args.gradient_accumulation_steps):  # TRL's default
        values["steps_per_generation"] = args.steps_per_generation
    values |= extra
    lines = [f"# {name} {version}" for name, version in versions().items()]
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)])


@contextmanager
def _accelerate_undisturbed() -> Iterator[None]:
    """A second `TrainingArguments` resets accelerate's state, perhaps to another device and to one process; put it back."""
    states = (PartialState._shared_state, AcceleratorState._shared_state)
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, saved, strict=True):
            state.clear()
            state.update(before)


def plain(config: Any) -> dict[str, Any]:
    """Fields that are set, as a dictionary."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) is not None}


def differing(config: Any, default: Any) -> dict[str, Any]:
    """Fields whose value is not the default's; enums as their value, nested configs as dictionaries."""
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.init and value != getattr(default, field.name):
            value = value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
            if isinstance(value, list):
                value = [getattr(item, "value", item) for item in value]
            if isinstance(value, str | int | float | bool | list | dict) and not field.name.startswith("_"):
                result[field.name] = value
    return result
