"""`TeacherArguments`: flags for the dtype, quantization and memory of local teachers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from effopd.errors import ConfigError

_LABEL = re.compile(r"[A-Za-z0-9_.-]+")
#: Settings of loading, which only a teacher given by path reads.
LOADING = ("teacher_dtype", "teacher_load_in_8bit", "teacher_load_in_4bit")
#: Settings that only a teacher in memory reads.
LOCAL_ONLY = (*LOADING, "teacher_offload", "teacher_shard", "teachers")


def split_revision(source: str, flag: str = "teacher_model") -> tuple[str, str | None]:
    """(folder or Hub id, revision) of `MODEL` or `MODEL@REVISION`; `None`: no revision is named.

    Args:
        flag: the setting that names the model, for messages.

    Raises:
        ConfigError: the revision is empty, or is that of a folder.
    """
    name, sign, revision = source.partition("@")
    if not sign or Path(source).exists() or source.startswith(("/", ".", "~")):
        return source, None
    if not name or not revision or Path(name).exists():
        what = "a folder has no revisions" if revision and name else "a part is missing"
        raise ConfigError(
            f"{flag} {source!r}: {what}; expected a folder, a Hub id, or HUB_ID@REVISION. Correct the name."
        )
    return name, revision


def given_teachers(teacher: Any) -> Any:
    """The `teacher_model` of a trainer: a path or a model, or a dictionary of them by label.

    Paths and whole numbers as labels become text.

    Raises:
        ConfigError: a teacher is neither a path nor a model; there is no label, or one that
            `--teachers` refuses; or a label occurs twice.
    """
    if not isinstance(teacher, Mapping):
        return _source(teacher, "teacher_model")
    sources: dict[str, Any] = {}
    for given, source in teacher.items():
        label = str(given)
        if isinstance(given, bool) or not isinstance(given, str | int) or not _LABEL.fullmatch(label):
            raise ConfigError(
                f"teacher_model: the label {given!r} is not a name: expected letters, digits, '_', '-' and '.', as in "
                "{'math': teacher}. Rename it, also in the rows."
            )
        if label in sources:
            raise ConfigError(f"teacher_model: the label {label!r} occurs twice. Give each teacher its own label.")
        sources[label] = _source(source, f"teacher_model[{label!r}]")
    if not sources:
        raise ConfigError("teacher_model={}: expected at least one teacher. Pass {label: teacher, …}, or one teacher.")
    return sources


def _source(teacher: Any, name: str) -> Any:
    if isinstance(teacher, os.PathLike):
        return os.fspath(teacher)
    if not isinstance(teacher, str | nn.Module):
        raise ConfigError(
            f"{name}: expected a path or a model, got {type(teacher).__name__}. Pass several teachers as "
            "{label: teacher, …}."
        )
    if isinstance(teacher, str):
        split_revision(teacher, name)
    return teacher


@dataclass
class TeacherArguments:
    """Flags of local teachers; part of `OPDConfig`. All apply to a teacher given by path."""

    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights of teacher and reference. 'auto': that of --dtype if it is not float32; "
            "otherwise bfloat16 on an accelerator that supports it, and float32 on the CPU, where bfloat16 is slower "
            "without AMX instructions.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    teacher_load_in_8bit: bool = field(
        default=False,
        metadata={
            "help": "Quantize the linear layers of teacher and reference to 8 bits (bitsandbytes), except output "
            "layers."
        },
    )
    teacher_load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantize the linear layers of teacher and reference to 4 bits (bitsandbytes, nf4), except output "
            "layers."
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the teacher's weights in host memory, and copy all but the output layer to the "
            "accelerator for each of its forward passes. No effect on the CPU."
        },
    )

    teacher_shard: bool = field(
        default=False,
        metadata={
            "help": "Under FSDP2: shard the decoder layers of teacher and reference over all ranks. Each layer is "
            "gathered for its forward pass."
        },
    )
    teachers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several teachers instead of --teacher_model_name_or_path, as LABEL=MODEL: math=DIR code=DIR, or "
            "LABEL=HUB_ID@REVISION. The column --teacher_column names the teacher of each row."
        },
    )
    teacher_column: str = field(
        default="teacher",
        metadata={"help": "With --teachers: column or nested field of the rows that holds the teacher's label."},
    )
    teachers_in_memory: str = field(
        default="all",
        metadata={
            "help": "With --teachers: 'all' loads every teacher once. 'one' holds one at a time and reads it again "
            "from disk at each change, in every micro-batch that has rows of several teachers.",
            "choices": ["all", "one"],
        },
    )

    def check_teachers(self) -> None:
        """Check the settings of this class; call it after the host has parsed the JSON settings.

        Raises:
            ConfigError: two settings contradict each other.
        """
        init = self._init_kwargs()
        if self.teacher_load_in_8bit and self.teacher_load_in_4bit:
            raise ConfigError("--teacher_load_in_8bit and --teacher_load_in_4bit are both set. Leave one of them out.")
        self._check_several()
        given = init.get("dtype", init.get("torch_dtype"))
        if self.teacher_dtype != "auto" and given not in (None, self.teacher_dtype):
            raise ConfigError(
                f"teacher_dtype={self.teacher_dtype!r}, but teacher_model_init_kwargs sets the dtype {given!r}. Leave "
                "one of them out."
            )
        if self.teacher_shard:
            for name, value in (
                ("teacher_offload", self.teacher_offload),
                (self._quantization_flag, self.quantization),
                ("teachers", self.teachers),
            ):
                if value:
                    raise ConfigError(f"--teacher_shard with --{name}: not supported together. Leave one of them out.")
        if self.quantization is None:
            return
        if "quantization_config" in init:
            raise ConfigError(
                f"--{self._quantization_flag} true, but teacher_model_init_kwargs sets a quantization_config. Leave "
                "one of them out."
            )
        if self.teacher_offload:
            raise ConfigError(
                f"--{self._quantization_flag} true with --teacher_offload true: bitsandbytes weights cannot be moved "
                "between host and accelerator. Leave one of them out."
            )

    def _check_several(self) -> None:
        if not self.teacher_sources:
            if any(getattr(self, name, None) for name in ("teacher_model_name_or_path", "teacher_server", "rollouts")):
                self.check_single_given()  # otherwise a trainer gets the teacher or teachers as an argument
            return
        if self.teachers_in_memory not in ("all", "one"):
            raise ConfigError(f"teachers_in_memory must be 'all' or 'one'; got {self.teachers_in_memory!r}.")
        if not str(self.teacher_column).strip():
            raise ConfigError("--teacher_column: expected the name of a column, got nothing.")
        for name, why in (
            ("teacher_model_name_or_path", "names a single teacher"),
            ("teacher_model_revision", "is the revision of a single teacher"),
            ("rollouts", "loads no teacher"),
        ):
            if (value := getattr(self, name, None)) is not None:
                raise ConfigError(f"--teachers with {name}={value!r}, which {why}. Leave one of them out.")
        if getattr(self, "lambda_extrapolation", 1) != 1:
            raise ConfigError(
                "--teachers with --lambda_extrapolation: ExOPD's target is defined for one teacher. Leave one of them "
                "out."
            )

    def check_single_given(self) -> None:
        """Check the settings beside a single teacher.

        Raises:
            ConfigError: a setting is read only with several teachers.
        """
        for name, default in (("teacher_column", "teacher"), ("teachers_in_memory", "all")):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is read only with several teachers. Leave it out, or set "
                    "--teachers; in Python, pass teacher_model={label: teacher, …}."
                )

    @property
    def teacher_sources(self) -> dict[str, str]:
        """Label → model of `teachers`, as `split_revision` reads it; empty with one teacher.

        Raises:
            ConfigError: an entry is not LABEL=MODEL, its revision is not valid, or a label occurs
                twice.
        """
        given = self.teachers
        if isinstance(given, Mapping):  # in Python and YAML
            given = [f"{label}={name}" for label, name in given.items()]
        sources: dict[str, str] = {}
        for entry in [given] if isinstance(given, str) else given or ():
            label, sign, name = str(entry).partition("=")
            if not sign or not _LABEL.fullmatch(label) or not name.strip():
                raise ConfigError(
                    f"--teachers: expected LABEL=MODEL, with letters, digits, '_', '-' and '.' in the label; got "
                    f"{entry!r}. Write for example --teachers math=models/math code=models/code."
                )
            if label in sources:
                raise ConfigError(f"--teachers: the label {label!r} occurs twice. Give each teacher its own label.")
            sources[label] = name.strip()
            split_revision(sources[label], "--teachers")
        return sources

    def _init_kwargs(self) -> Mapping[str, Any]:
        value = getattr(self, "teacher_model_init_kwargs", None) or {}
        return json.loads(value) if isinstance(value, str) else value

    @property
    def _quantization_flag(self) -> str:
        return "teacher_load_in_8bit" if self.teacher_load_in_8bit else "teacher_load_in_4bit"

    @property
    def quantization(self) -> str | None:
        """'8bit', '4bit' or `None`."""
        return "8bit" if self.teacher_load_in_8bit else "4bit" if self.teacher_load_in_4bit else None

    def changed_loading(self) -> list[str]:
        """Names of the settings of loading that differ from their defaults."""
        defaults = {f.name: f.default for f in fields(TeacherArguments)}
        return [name for name in LOADING if getattr(self, name) != defaults[name]]
