"""From settings to a finished run: checks → trainer → train. `effopd train` and `effopd quickstart` both come here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from accelerate.state import AcceleratorState, PartialState
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, get_quantization_config

from effopd.common.versions import versions
from effopd.distill.callback import EffOPDCallback, check_validation_size
from effopd.distill.config import OPDConfig
from effopd.distill.saving import check_generation_config
from effopd.distill.teacher_kl import check_rollouts, rollouts_a_step
from effopd.distill.trainer import OPDTrainer
from effopd.distill.values import check_values
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate.anchored import usable_device
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.parameter_rules import select
from effopd.launch.adapters import adapter_config, check_adapter
from effopd.launch.host_settings import check_host_settings
from effopd.launch.meta_model import check_positions, meta_model
from effopd.launch.preflight import check_disk, check_model_name, check_models, check_task, load_tokenizer
from effopd.models.files import check_whole_model
from effopd.runs.best_model import check_metric
from effopd.runs.checkpoints import check_kind
from effopd.runs.records import metric_names
from effopd.runs.run_dir import RunDir, in_trajectory, step_of_checkpoint
from effopd.tasks import Task, TaskConfig, load_task


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
    models = check_models_of(settings)
    tokenizer = tokenizer_of(model, other_models(opd), opd)
    train, held_out, longest = prompts(task, opd, tokenizer, why_answers(opd, effopd))
    check_prompts(settings, train)
    check_lengths(models, longest, opd.max_completion_length)
    check_space(model, opd, models, len(train), rollouts_a_step(opd), effopd=effopd.enabled)
    opd.model_init_kwargs, opd.teacher_model_init_kwargs = loading(model, opd)
    trainer = OPDTrainer(
        model.model_name_or_path,
        opd.teacher_model_name_or_path,
        opd,
        train_dataset=train.to_dataset(),
        processing_class=tokenizer,
        eval_task=held_out,
        quantization_config=get_quantization_config(model),
        peft_config=adapter_config(model),
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
    check_values(settings.task)
    check_values(effopd, "effopd.")
    names = {
        "--model_name_or_path": settings.model.model_name_or_path,
        "--teacher_model_name_or_path": opd.teacher_model_name_or_path,
    }
    if opd.reference_model_name_or_path is not None:
        names["--reference_model_name_or_path"] = opd.reference_model_name_or_path
    check_run(settings.model, opd, names)
    usable_device(effopd.anchor_device)
    if opd.eval_on_start is None:  # the curve begins before the first jump
        opd.eval_on_start = effopd.enabled and opd.eval_strategy != "no"
    if effopd.score_rollouts is not None:
        check_rollouts(opd, effopd.score_rollouts)


def check_run(model: ModelConfig, args: Any, names: Mapping[str, str | None]) -> None:
    """Model names, by the flags they are given with, packages, and the folder or checkpoint that a run starts from."""
    for flag, name in names.items():
        check_model_name(flag, name)
        check_whole_model(flag, str(name))
    check_host_settings(model, args)
    run_dir, resume = RunDir(args.output_dir), resume_argument(args)
    run_dir.refuse_unwritable()
    try:
        if checkpoint := run_dir.to_resume(resume):
            check_kind(checkpoint, adapter=model.use_peft)
    except CheckpointError as error:
        raise CheckpointError(f"--resume_from_checkpoint: {error}") from error
    check_metric(args, metric_names(teacher=hasattr(args, "teacher_model_name_or_path"), greedy=args.eval_greedy))
    if not resume:
        run_dir.refuse_overwrite()


class NamedModel(NamedTuple):
    """A model of a run: its flag, its name, and the model on the meta device."""

    flag: str
    name: str
    meta: PreTrainedModel


def check_models_of(settings: RunSettings) -> list[NamedModel]:
    """Student, teacher and reference on the meta device, the student first; the adapter's names are the student's.

    Raises:
        CompatibilityError: a model that cannot be read or distilled.
        ConfigError: loading arguments, an attention implementation or adapter names that a model does not have, or look-ahead
            `parameters` that match nothing of the student.
    """
    model, opd = settings.model, settings.opd
    student, other = loading(model, opd)
    found = [on_meta("--model_name_or_path", str(model.model_name_or_path), student, opd)]
    found += [
        on_meta(f"--{role}_model_name_or_path", name, other, opd)
        for role in ("teacher", "reference")
        if (name := getattr(opd, f"{role}_model_name_or_path"))
    ]
    check_student_adapter(model, found[0], student, opd)
    if settings.effopd.enabled and not model.use_peft:
        names = (name for name, _ in found[0].meta.named_parameters())
        select(names, str(settings.effopd.parameters), "the student")
    return found


def check_student_adapter(model: ModelConfig, student: NamedModel, init: Mapping[str, Any], args: Any) -> None:
    """The adapter's names are names of the student; it is built anew, since PEFT changes it."""
    if model.use_peft:
        check_adapter(model, on_meta(student.flag, student.name, init, args).meta)


def on_meta(flag: str, name: str, init: Mapping[str, Any], args: Any) -> NamedModel:
    """A model of a run on the meta device.

    Args:
        init: its loading arguments.

    Raises:
        CompatibilityError, ConfigError: as `meta_model`.
    """
    load = {"trust_remote_code": args.trust_remote_code} | (
        {"revision": init["revision"]} if "revision" in init else {}
    )
    return NamedModel(flag, name, meta_model(flag, name, init, **load))


def check_lengths(models: Sequence[NamedModel], longest: int | None, answer: int | None) -> None:
    """The longest prompt and an answer fit into the positions of every model.

    Raises:
        ConfigError: they do not fit into a table of positions.
    """
    for model in models:
        check_positions(model.flag, model.name, model.meta, longest or 0, answer or 0, "--max_completion_length")


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
    if settings.effopd.validation_size is not None:
        check_validation_size(settings.effopd.validation_size, train)


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
    return args.eval_strategy != "no" or bool(args.eval_on_start)


def why_answers(opd: OPDConfig, effopd: EffOPDConfig) -> str:
    """The settings of a run that need reference answers, as a sentence; "" if it needs none."""
    causes = []
    if effopd.scored:
        chosen = "validation_size" in effopd.changed
        causes.append(
            f"--effopd.validation_size {effopd.validation_size}" if chosen else f"--effopd.strategy {effopd.strategy}"
        )
    if evaluates(opd):
        strategy = getattr(opd.eval_strategy, "value", opd.eval_strategy)
        causes.append("--eval_on_start" if strategy == "no" else f"--eval_strategy {strategy}")
    if not causes:
        return ""
    return f"Answers are needed because of {' and '.join(causes)}; --effopd.strategy line_search without evaluation needs none."


class Prompts(NamedTuple):
    """Training and held-out prompts, and the longest of both in tokens, if a tokenizer measured them."""

    train: Task
    held_out: Task | None
    longest: int | None


def prompts(task: TaskConfig, args: Any, tokenizer: Any, why: str) -> Prompts:
    """Training and held-out prompts, checked; held out only if the run evaluates.

    Args:
        tokenizer: the student's, or `None`: prompts are not measured then.
        why: what needs reference answers, as a sentence; "" if nothing does.
    """
    train = load_task(task, "train", answers_required=bool(why), why=why)
    held_out = load_task(task, "eval", why=why) if evaluates(args) else None
    lengths = [
        check_task(part, tokenizer, task.max_prompt_length, **(args.chat_template_kwargs or {}))
        for part in (train, held_out)
        if part is not None
    ]
    return Prompts(train, held_out, max((length for length in lengths if length is not None), default=None))


def resume_argument(opd: Any) -> str | bool | None:
    """`resume_from_checkpoint` with the words of a command line understood.

    Raises:
        ConfigError: an empty text.
    """
    value = opd.resume_from_checkpoint
    if isinstance(value, str) and not value.strip():
        raise ConfigError("--resume_from_checkpoint: expected true, or the folder of a checkpoint, got nothing.")
    return {"true": True, "false": None}.get(str(value).lower(), value)


def check_space(
    model: ModelConfig, args: Any, models: Sequence[NamedModel], prompts: int, batch: int, *, effopd: bool
) -> None:
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
        models[0].meta.num_parameters(),
        checkpoints=kept,
        models=1 + sum(in_trajectory(args.trajectory, step, steps) for step in range(steps + 1)),
        optimizer=not args.save_only_model,
        effopd=effopd,
        held=run_dir.held(done),
    )


def loading(model: ModelConfig, args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loading arguments of the student and of the frozen models. TRL's command line does the same: model flags become
    loading arguments, explicit ones win."""
    common = {"attn_implementation": model.attn_implementation, "trust_remote_code": args.trust_remote_code}
    common |= {"dtype": model.dtype} if model.dtype not in (None, "auto") else {}
    student = common | {"revision": model.model_revision} | dict(args.model_init_kwargs or {})
    return student, common | dict(getattr(args, "teacher_model_init_kwargs", None) or {})


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
