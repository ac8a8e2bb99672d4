"""Flags and YAML of `effopd train` → `RunSettings`. `effopd compare` reads its runs through here too."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from trl import ModelConfig, TrlParser

from effopd.distill.config import OPDConfig
from effopd.distill.launch import RunSettings
from effopd.errors import ConfigError, EffOPDError
from effopd.extrapolate.config import EffOPDConfig
from effopd.tasks import TaskConfig
from effopd.testbed import resolve_model


def effopd_arguments() -> type:
    """A dataclass with the fields of `EffOPDConfig` as flags `--effopd.NAME` (and `--effopd_NAME`); the command's
    default strategy is 'none'."""
    types = typing.get_type_hints(EffOPDConfig)
    fields = []
    for field in dataclasses.fields(EffOPDConfig):
        options: dict[str, Any] = {"metadata": {**field.metadata, "aliases": [f"--effopd.{field.name}"]}}
        if field.name == "strategy":
            options["default"] = "none"
        elif field.default is not dataclasses.MISSING:
            options["default"] = field.default
        else:
            options["default_factory"] = field.default_factory
        fields.append((f"effopd_{field.name}", types[field.name], dataclasses.field(**options)))
    made: Any = dataclasses.make_dataclass("EffOPDArguments", fields)
    made._argument_group_name = "look-ahead (EffOPD)"
    return made


def train_parser():
    """The parser of `effopd train`."""

    class Parser(TrlParser):
        def set_defaults_with_config(self, **kwargs):
            for name, value in (kwargs.pop("effopd", None) or {}).items():
                kwargs[f"effopd_{name}"] = value
            return super().set_defaults_with_config(**kwargs)

    parser = Parser(
        [ModelConfig, TaskConfig, OPDConfig, effopd_arguments()],
        prog="effopd train",
        description="Distil a teacher into a student on the student's own answers.",
        epilog="Example: effopd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--task math:train.jsonl --eval_strategy steps --eval_steps 10 --effopd.strategy effopd --output_dir runs/first",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Check every flag, show the plan and its memory; load and write nothing.",
    )
    return parser


def parse_train(argv: Sequence[str]) -> RunSettings:
    """Command line and YAML → settings of a run; see `parse_command`."""
    return parse_command(argv)[0]


def parse_command(argv: Sequence[str]) -> tuple[RunSettings, bool]:
    """Command line and YAML → (settings, whether it is a dry run).

    Raises:
        ConfigError: an unknown setting in the YAML file, or a value out of range.
    """
    try:
        model, task, opd, look, command = train_parser().parse_args_and_config(list(argv))
    except (ValueError, OSError) as error:
        raise error if isinstance(error, EffOPDError) else ConfigError(str(error)) from error
    model.model_name_or_path = resolve_model(model.model_name_or_path)
    opd.teacher_model_name_or_path = resolve_model(opd.teacher_model_name_or_path)
    opd.reference_model_name_or_path = resolve_model(opd.reference_model_name_or_path)
    if opd.lambda_extrapolation != 1 and opd.reference_model_name_or_path is None:
        raise ConfigError(
            f"--lambda_extrapolation {opd.lambda_extrapolation} needs --reference_model_name_or_path: the student's "
            "start, or the teacher's base before RL."
        )
    values = {field.name: getattr(look, f"effopd_{field.name}") for field in dataclasses.fields(EffOPDConfig)}
    return RunSettings(model, task, opd, EffOPDConfig(**values)), command.dry_run
