"""Flags and YAML of `effopd train` → `RunSettings`. `effopd compare` reads its runs through here
too.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from trl import ModelConfig

from effopd.commands.parser import RUN_ESSENTIALS, CommandParser, OneSpelling, arrange, parsed, require
from effopd.distill.callback import DEEPSPEED, host_refused
from effopd.distill.config import OPDConfig
from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch.opd import RunSettings
from effopd.tasks import TaskConfig
from effopd.tasks.builtin_models import resolve_model

#: What the first section of `--help` shows.
ESSENTIALS = {
    "model_name_or_path": "The student: a folder or a Hub id; testbed:student is the built-in one.",
    "teacher_model_name_or_path": "The teacher, with the student's tokenizer: a folder or a Hub id; testbed:teacher is the "
    ""
    ""
    ""
    "built-in one.",
    "task": "",
    "output_dir": "",
    "dry_run": "",
    **RUN_ESSENTIALS,
    "eval_strategy": "When to measure KL and accuracy on held-out prompts: no, steps (every eval_steps), epoch.",
    "eval_steps": "Optimizer steps between evaluations.",
    "save_steps": "Optimizer steps between checkpoints.",
    "use_vllm": "Sample rollouts with vLLM (vllm_mode: see --help); default: with transformers.",
    "use_peft": "Train LoRA adapters (lora_r, lora_alpha, …: see --help) instead of all weights.",
    "report_to": "",
    "seed": "",
}


def effopd_arguments() -> type:
    """A dataclass with the fields of `EffOPDConfig` as flags `--effopd.NAME` (and `--effopd_NAME`);
    the command's default strategy is 'none'."""
    types = typing.get_type_hints(EffOPDConfig) | {"args": str | None}  # JSON
    defaults = {"strategy": "none", "args": None}
    fields = []
    for field in dataclasses.fields(EffOPDConfig):
        metadata = {**field.metadata, "aliases": [f"--effopd.{field.name}"]}
        default = defaults.get(field.name, field.default)
        fields.append(
            (f"effopd_{field.name}", types[field.name], dataclasses.field(default=default, metadata=metadata))
        )
    made: Any = dataclasses.make_dataclass("EffOPDArguments", fields)
    made._argument_group_name = "look-ahead (EffOPD)"
    return made


def train_parser():
    """The parser of `effopd train`."""

    class Parser(CommandParser):
        def parse_known_args(self, args=None, namespace=None):
            found, rest = super().parse_known_args(args, namespace)
            if found.deepspeed and found.effopd_strategy != "none":  # said before the host asks for the package
                raise host_refused(DEEPSPEED)
            return found, rest

    configs = [ModelConfig, TaskConfig, OPDConfig, effopd_arguments()]
    parser = Parser(
        configs,
        prog="effopd train",
        usage="effopd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--task TASK [--FLAG VALUE …]",
        description="Distil a teacher into a student on the student's own answers: the student samples, "
        "the teacher grades every "
        "token.\nWith --effopd.strategy line_search it also tries points further along its "
        "own updates and keeps what is closer to the "
        "teacher.",
        epilog="Example:\n  effopd train --model_name_or_path STUDENT --teacher_model_name_or_path "
        "TEACHER --task math:train.jsonl \\\n"
        "      --eval_strategy steps --eval_steps 10 --effopd.strategy line_search --output_dir runs/first\n"
        "--dry_run with it checks what needs neither weights nor network and shows the "
        "memory per rank; the same command with --resume_from_checkpoint true goes on.",
        formatter_class=OneSpelling,
        add_help=False,
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Check all that needs neither weights nor network: flags, rows of a file, folders, "
        "packages. Show the plan and its "
        "memory; write nothing.",
    )
    require(parser, "model_name_or_path", "teacher_model_name_or_path")
    arrange(parser, configs, ESSENTIALS)
    return parser


def parse_train(argv: Sequence[str]) -> RunSettings:
    """Command line and YAML → settings of a run; see `parse_command`."""
    return parse_command(argv)[0]


def parse_command(argv: Sequence[str]) -> tuple[RunSettings, bool]:
    """Command line and YAML → (settings, whether it is a dry run).

    Raises:
        ConfigError: an unknown setting in the YAML file, or a value out of range.
    """
    model, task, opd, look, command = parsed(train_parser(), argv)
    model.model_name_or_path = resolve_model(model.model_name_or_path)
    opd.teacher_model_name_or_path = resolve_model(opd.teacher_model_name_or_path)
    opd.reference_model_name_or_path = resolve_model(opd.reference_model_name_or_path)
    if opd.lambda_extrapolation != 1 and opd.reference_model_name_or_path is None:
        raise ConfigError(
            f"--lambda_extrapolation {opd.lambda_extrapolation} needs --reference_model_name_or_path: the student's "
            "start, or the teacher's base before RL."
        )
    given = [word.partition("=")[0] for word in argv if word.startswith("--effopd")]
    if look.effopd_strategy == "none" and not any(name.endswith("strategy") for name in given) and given:
        raise ConfigError(
            f"{', '.join(given)}: without a strategy there is no look-ahead to set. Add "
            "--effopd.strategy line_search (or effopd, "
            "the paper's), or leave it out."
        )
    values = {field.name: getattr(look, f"effopd_{field.name}") for field in dataclasses.fields(EffOPDConfig)}
    return RunSettings(model, task, opd, EffOPDConfig(**values)), command.dry_run
