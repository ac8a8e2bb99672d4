"""Models of a run on the meta device, their loading arguments and their tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from trl import ModelConfig

from effopd.distill.curriculum import COLUMN
from effopd.distill.saving import check_generation_config
from effopd.distill.teachers.loading import resolved_dtype
from effopd.launch.adapters import check_adapter
from effopd.launch.meta_model import check_positions, meta_model
from effopd.launch.preflight import check_models, load_tokenizer


class NamedModel(NamedTuple):
    """A model of a run: its flag, its folder or Hub id, and the model on the meta device."""

    flag: str
    name: str
    meta: PreTrainedModel


def on_meta(flag: str, name: str, init: Mapping[str, Any], args: Any) -> NamedModel:
    """A model of a run on the meta device.

    Args:
        init: loading arguments of the model.

    Raises:
        CompatibilityError, ConfigError: as `meta_model`.
    """
    load = {"trust_remote_code": args.trust_remote_code} | (
        {"revision": init["revision"]} if "revision" in init else {}
    )
    return NamedModel(flag, name, meta_model(flag, name, init, **load))


def check_student_adapter(model: ModelConfig, student: NamedModel, init: Mapping[str, Any], args: Any) -> None:
    """Check the adapter's names on another copy of the student, because PEFT modifies the model."""
    if model.use_peft:
        check_adapter(model, on_meta(student.flag, student.name, init, args).meta)


def check_lengths(models: Sequence[NamedModel], longest: int | None, answer: int | None) -> None:
    """Check that the longest prompt and answer fit into the positions of every model.

    Raises:
        ConfigError: as `check_positions`.
    """
    for model in models:
        check_positions(model.flag, model.name, model.meta, longest or 0, answer or 0, "--max_completion_length")


def tokenizer_of(model: ModelConfig, others: Sequence[str], args: Any) -> Any:
    """The student's tokenizer, after checking that the models `others` are compatible with it."""
    name, load = model.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(name, revision=model.model_revision, **load)
    check_generation_config(name, revision=model.model_revision)
    for other in others:
        check_models(name, other, tokenizer, **load)
    return tokenizer


def loading_arguments(model: ModelConfig, args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(loading arguments of the student, loading arguments of the frozen models).

    As on TRL's command line, model flags become loading arguments, and explicit `*_init_kwargs`
    take precedence.
    """
    common = {"attn_implementation": model.attn_implementation, "trust_remote_code": args.trust_remote_code}
    common |= {"dtype": model.dtype} if model.dtype not in (None, "auto") else {}
    student = common | {"revision": model.model_revision} | dict(args.model_init_kwargs or {})
    dtype = {"dtype": resolved_dtype(args, model.dtype)} if hasattr(args, "teacher_dtype") else {}
    return student, common | dtype | dict(getattr(args, "teacher_model_init_kwargs", None) or {})


#: Flag of the teachers of which one at a time is in memory.
STAGES = "--curriculum_teachers"


def frozen_models(opd: Any) -> dict[str, str]:
    """Flag → name of teachers and, if there is one, reference, as far as they are loaded."""
    if not opd.holds_teacher:
        return {}
    models = {f"--teachers {label}": name for label, name in opd.teacher_sources.items()}
    for role in ("teacher", "reference"):
        if name := getattr(opd, f"{role}_model_name_or_path"):
            models[f"--{role}_model_name_or_path"] = name
    for stage, name in opd.stage_teachers.items():
        if name not in models.values():
            models[f"{STAGES} ({stage})"] = name
    return models


def kept_columns(opd: Any) -> tuple[str, ...]:
    """Columns of the rows that a run reads besides prompt, answer and tests."""
    columns = [opd.teacher_column] if opd.teacher_sources else []
    if opd.curriculum.startswith(COLUMN):
        columns.append(opd.curriculum.removeprefix(COLUMN))
    return tuple(columns)
