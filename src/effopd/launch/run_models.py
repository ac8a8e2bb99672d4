"""Models of a run on the meta device, their loading arguments and their tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from trl import ModelConfig

from effopd.distill.curriculum import COLUMN
from effopd.distill.saving import check_generation_config
from effopd.distill.teachers.loading import resolved_dtype, revision_argument
from effopd.distill.teachers.settings import split_revision
from effopd.launch.adapters import adapter_config, check_adapter
from effopd.launch.meta_model import check_positions, meta_model
from effopd.launch.model_size import ModelSize, model_size, size_of_model
from effopd.launch.preflight import check_models, load_tokenizer


class NamedModel(NamedTuple):
    """A model of a run, on the meta device.

    Attributes:
        flag: the flag that names the model.
        name: its folder or Hub id.
        meta: the model. Checks and estimates share it, so it must not be modified.
        trained: number of parameters that its adapter trains. `None`: no adapter.
    """

    flag: str
    name: str
    meta: PreTrainedModel
    trained: int | None = None


def on_meta(flag: str, name: str, init: Mapping[str, Any], args: Any) -> NamedModel:
    """A model of a run on the meta device.

    Args:
        init: loading arguments of the model.

    Raises:
        CompatibilityError, ConfigError: as `meta_model`.
    """
    load = {"trust_remote_code": args.trust_remote_code, "revision": init.get("revision")}
    return NamedModel(flag, name, meta_model(flag, name, init, **load))


def frozen_on_meta(
    names: Mapping[str, str], init: Mapping[str, Any], args: Any, student: NamedModel, student_init: Mapping[str, Any]
) -> list[NamedModel]:
    """The frozen models of a run. A model that several flags name is built once.

    Args:
        names: flag → folder or Hub id.
        init, student_init: loading arguments of the frozen models and of the student.

    Raises:
        CompatibilityError, ConfigError: as `meta_model`.
    """
    built = {(student.name, revision_of(student_init)): student} if _same_model(init, student_init) else {}
    models = []
    for flag, name in names.items():
        own = loading_of(flag, init, args)
        key = (name, revision_of(own))
        if key not in built:
            built[key] = on_meta(flag, name, own, args)
        models.append(NamedModel(flag, name, built[key].meta))
    return models


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether loading arguments give the same model on the meta device, which ignores the dtype."""
    drop = {"dtype", "torch_dtype", "revision"}
    first, second = ({k: v for k, v in each.items() if k not in drop} for each in (one, other))
    return first == second


def with_adapter(model: ModelConfig, student: NamedModel, init: Mapping[str, Any], args: Any) -> NamedModel:
    """The student with the size of its adapter, after checking the adapter's names.

    PEFT modifies the model, so the check builds another one.
    """
    if not model.use_peft:
        return student
    return student._replace(trained=check_adapter(model, on_meta(student.flag, student.name, init, args).meta))


class RunSizes(NamedTuple):
    """Sizes of the models of a run; `None`: unknown.

    Attributes:
        student: size of the student.
        frozen: flag → size of a teacher or reference.
        trained: number of parameters that the student's adapter trains. `None`: no adapter, or not
            counted yet.
    """

    student: ModelSize | None
    frozen: dict[str, ModelSize | None]
    trained: int | None = None


def run_sizes(model: ModelConfig, frozen: Mapping[str, str], args: Any, models: Sequence[NamedModel] = ()) -> RunSizes:
    """Sizes of the models of a run.

    Args:
        model: settings of the student.
        frozen: flag → folder or Hub id of the frozen models.
        models: models on the meta device, the student first. Models that are not among them are
            measured by `model_size`, which never uses the network.
    """
    init, other = loading_arguments(model, args)
    names = {STUDENT: str(model.model_name_or_path), **frozen}
    keys = {
        flag: (name, revision_of(init if flag == STUDENT else loading_of(flag, other, args)))
        for flag, name in names.items()
    }
    built = {each.flag: size_of_model(each.meta) for each in models}
    known = {
        key: model_size(key[0], revision=key[1], trust_remote_code=args.trust_remote_code)
        for key in {keys[flag] for flag in names if flag not in built}
    }
    sizes = {flag: built[flag] if flag in built else known[keys[flag]] for flag in names}
    return RunSizes(sizes.pop(STUDENT), sizes, models[0].trained if models else None)


def check_lengths(models: Sequence[NamedModel], longest: int | None, answer: int | None) -> None:
    """Check that the longest prompt and answer fit into the positions of every model.

    Raises:
        ConfigError: as `check_positions`.
    """
    for model in models:
        check_positions(model.flag, model.name, model.meta, longest or 0, answer or 0, "--max_completion_length")


def tokenizer_of(model: ModelConfig, others: Mapping[str, str], args: Any) -> Any:
    """The student's tokenizer, after checking that other models are compatible with it.

    Args:
        others: flag → folder or Hub id of the other models.
    """
    init, frozen = loading_arguments(model, args)
    name, load = str(model.model_name_or_path), {"trust_remote_code": args.trust_remote_code}
    own = revision_of(init)
    tokenizer = load_tokenizer(name, revision=own, **load)
    check_generation_config(name, revision=own)
    for flag, other in others.items():
        theirs = own if flag == STUDENT else revision_of(loading_of(flag, frozen, args))
        check_models(name, other, tokenizer, revisions=(own, theirs), **load)
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
    return student, common | dtype | revision_argument(args) | dict(
        getattr(args, "teacher_model_init_kwargs", None) or {}
    )


def adapter_of(model: ModelConfig, args: Any) -> Any:
    """PEFT configuration of the student's adapter, with its base's revision; `None`: no adapter."""
    config, revision = adapter_config(model), revision_of(loading_arguments(model, args)[0])
    if config is not None and revision != "main":
        config.revision = revision
    return config


def loading_of(flag: str, frozen: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Loading arguments of one frozen model.

    The teacher's revision is that of the teacher of evaluations. The reference has its own flag;
    each of several teachers, and those of a curriculum, can name their own.

    Args:
        flag: the flag that names the model.
        frozen: the loading arguments of the frozen models.
        args: settings of the run, with the revision of the reference.
    """
    if flag.startswith(REFERENCE):
        return {**frozen, "revision": args.reference_model_revision}
    drop = "revision" if flag.startswith(STAGES) else ""
    load = {name: value for name, value in frozen.items() if name != drop}
    own = split_revision(sources[flag])[1] if flag in (sources := teachers_of(args)) else None
    return load | ({} if own is None else {"revision": own})


def revision_of(init: Mapping[str, Any]) -> str:
    """Revision of a model on the Hub among its loading arguments."""
    return init.get("revision") or "main"


#: Flag of the student.
STUDENT = "--model_name_or_path"
#: Flag of the teachers of which one at a time is in memory.
STAGES = "--curriculum_teachers"
#: Flag of ExOPD's reference.
REFERENCE = "--reference_model_name_or_path"


def frozen_models(opd: Any) -> dict[str, str]:
    """Flag → name of teachers and, if there is one, reference, as far as they are loaded."""
    if not opd.holds_teacher:
        return {}
    sources = teachers_of(opd)
    models = {flag: source for flag, source in sources.items() if not flag.startswith(STAGES)}
    for role in ("teacher", "reference"):
        if name := getattr(opd, f"{role}_model_name_or_path"):
            models[f"--{role}_model_name_or_path"] = name
    for flag, source in sources.items():
        if source not in models.values():
            models[flag] = source
    return {flag: split_revision(each)[0] if flag in sources else each for flag, each in models.items()}


def teachers_of(args: Any) -> dict[str, str]:
    """Flag → each of several teachers and of a curriculum's, as `split_revision` reads it."""
    several = {f"--teachers {label}": source for label, source in getattr(args, "teacher_sources", {}).items()}
    stages = {f"{STAGES} ({stage})": source for stage, source in getattr(args, "stage_teachers", {}).items()}
    return several | stages


def kept_columns(opd: Any) -> tuple[str, ...]:
    """Columns of the rows that a run reads besides prompt, answer and tests."""
    columns = [opd.teacher_column] if opd.teacher_sources else []
    if opd.curriculum.startswith(COLUMN):
        columns.append(opd.curriculum.removeprefix(COLUMN))
    return tuple(columns)
