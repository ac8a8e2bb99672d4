"""Settings of a run as YAML for `--config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import yaml
from trl import ModelConfig

from effopd.common.versions import versions
from effopd.distill.trl_host.state import accelerate_undisturbed
from effopd.tasks import TaskConfig
from effopd.tasks.builtin_models import spoken_name

#: Always written, even at their defaults: the settings that readers look for first, and those whose
#: defaults depend on the machine.
_ALWAYS = ("output_dir", "seed", "learning_rate", "max_steps", "loss_type", "max_completion_length", "bf16", "fp16")
#: Settings that name models.
_MODELS = (
    "model_name_or_path", "teacher_model_name_or_path", "reference_model_name_or_path", "teachers",
    "curriculum_teachers",
)  # fmt: skip


def settings_yaml(
    model: ModelConfig, task: TaskConfig, args: Any, extra: dict[str, Any], preset: Collection[str] = ()
) -> str:
    """Settings as YAML, with the versions of libraries and plugins as comments.

    Contains all settings that differ from their defaults, all task settings that are set, and the
    settings in `_ALWAYS`, `preset` and `extra`.
    """
    with accelerate_undisturbed():
        default = type(args)(output_dir=args.output_dir)
    values = differing(model, ModelConfig()) | plain(task)
    values |= differing(args, default) | {
        name: getattr(args, name) for name in (*_ALWAYS, *preset) if hasattr(args, name)
    }
    values.pop("resume_from_checkpoint", None)
    values.pop("generation_batch_size", None)  # TRL derives one from the other and accepts only one
    values.pop("steps_per_generation", None)
    if getattr(args, "steps_per_generation", None) not in (None, args.gradient_accumulation_steps):  # TRL's default
        values["steps_per_generation"] = args.steps_per_generation
    values |= extra
    values |= {name: spoken(values[name]) for name in _MODELS if name in values}
    lines = [f"# {name} {version}" for name, version in versions().items()]
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)])


def spoken(model: Any) -> Any:
    """The name of a built-in model in place of its folder; of LABEL=MODEL; of each of a list.

    The folder is another on the next machine.
    """
    if isinstance(model, list):
        return [spoken(each) for each in model]
    label, equals, name = model.rpartition("=")
    return f"{label}{equals}{spoken_name(name)}"


def plain(config: Any) -> dict[str, Any]:
    """Field → value, for the fields that are not `None`."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) is not None}


def differing(config: Any, default: Any) -> dict[str, Any]:
    """Field → value, for the fields that differ from `default`.

    Enums become their values, nested configs become dictionaries. Other types are left out.
    """
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
