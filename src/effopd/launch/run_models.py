"""The models of a run and their tokenizer, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from trl import ModelConfig

from effopd.distill.saving import check_generation_config
from effopd.launch.adapters import check_adapter
from effopd.launch.meta_model import check_positions, meta_model
from effopd.launch.preflight import check_models, load_tokenizer


class NamedModel(NamedTuple):
    """A model of a run: its flag, its name, and the model on the meta device."""

    flag: str
    name: str
    meta: PreTrainedModel


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


def check_student_adapter(model: ModelConfig, student: NamedModel, init: Mapping[str, Any], args: Any) -> None:
    """The adapter's names are names of the student; it is built anew, since PEFT changes it."""
    if model.use_peft:
        check_adapter(model, on_meta(student.flag, student.name, init, args).meta)


def check_lengths(models: Sequence[NamedModel], longest: int | None, answer: int | None) -> None:
    """The longest prompt and an answer fit into the positions of every model.

    Raises:
        ConfigError: they do not fit into a table of positions.
    """
    for model in models:
        check_positions(model.flag, model.name, model.meta, longest or 0, answer or 0, "--max_completion_length")


def tokenizer_of(model: ModelConfig, others: Sequence[str], args: Any) -> Any:
    """The student's tokenizer, once it is known that `others` read its tokens."""
    name, load = model.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(name, revision=model.model_revision, **load)
    check_generation_config(name, revision=model.model_revision)
    for other in others:
        check_models(name, other, tokenizer, **load)
    return tokenizer


def loading_arguments(model: ModelConfig, args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loading arguments of the student and of the frozen models. TRL's command line does the same:
    model flags become loading arguments, explicit ones win."""
    common = {"attn_implementation": model.attn_implementation, "trust_remote_code": args.trust_remote_code}
    common |= {"dtype": model.dtype} if model.dtype not in (None, "auto") else {}
    student = common | {"revision": model.model_revision} | dict(args.model_init_kwargs or {})
    return student, common | dict(getattr(args, "teacher_model_init_kwargs", None) or {})
