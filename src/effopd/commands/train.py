"""Flags and YAML of `effopd train`, parsed into `RunSettings`.

`effopd compare` uses the same parser to check the settings of its runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from trl import ModelConfig

from effopd.commands.parser import RUN_ESSENTIALS, CommandParser, OneSpelling, add_dry_run, arrange, parsed, require
from effopd.distill.config import OPDConfig
from effopd.distill.offline_store import RolloutStore
from effopd.errors import ConfigError
from effopd.extrapolate.config import NONE, EffOPDConfig
from effopd.extrapolate.setting_help import TEXTS, setting_help
from effopd.extrapolate.strategy import PAPER, STRATEGIES
from effopd.launch.opd import RunSettings
from effopd.launch.run_checks import check_folder_of_config
from effopd.tasks import TaskConfig
from effopd.tasks.builtin_models import resolve_model

#: Fields of the first section of `--help` → help; "": the field's own help.
ESSENTIALS = {
    "model_name_or_path": "The student: folder, Hub id, testbed:student or testbed:smollm2.",
    "teacher_model_name_or_path": "The teacher, with the same tokenizer as the student: a folder or a Hub id, or "
    "testbed:teacher.",
    "task": "",
    "output_dir": "",
    "dry_run": "",
    **RUN_ESSENTIALS,
    "eval_strategy": "When to measure KL and accuracy on held-out prompts: no, steps (every eval_steps) or epoch.",
    "eval_steps": "Optimizer steps between evaluations.",
    "save_steps": "Optimizer steps between checkpoints.",
    "use_vllm": "Sample rollouts with vLLM instead of transformers; see vllm_mode in --help.",
    "use_peft": "Train LoRA adapters instead of all weights; see lora_r, lora_alpha, … in --help.",
    "report_to": "",
    "seed": "",
}


def effopd_arguments() -> type:
    """Dataclass with the fields of `EffOPDConfig` as flags `--effopd.NAME` and `--effopd_NAME`.

    Its default strategy is 'none'.
    """
    types = typing.get_type_hints(EffOPDConfig) | {"args": str | None}  # JSON
    defaults = {"strategy": NONE, "args": None}
    fields = []
    for field in dataclasses.fields(EffOPDConfig):
        metadata = {**field.metadata, "aliases": [f"--effopd.{field.name}"]}
        if field.name in TEXTS:
            metadata["help"] = setting_help(field.name)  # also of strategies that were added since
        if field.name == "strategy":
            metadata["choices"] = [NONE, *STRATEGIES]
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
            given, rest = super().parse_known_args(args, namespace)
            if given.rollouts:
                loss_type_of_rollouts(args, given)
                task_of_rollouts(given)
            return given, rest

        def adopted(self, values):
            return without_own_values(super().adopted(values), self.given("effopd_strategy"))

        def optional(self, given):
            if given.rollouts:
                return ("teacher_model_name_or_path", "task")
            return ("teacher_model_name_or_path",) if given.teacher_server or given.teachers else ()

    configs = [ModelConfig, TaskConfig, OPDConfig, effopd_arguments()]
    parser = Parser(
        configs,
        prog="effopd train",
        usage="effopd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--task TASK [--FLAG VALUE …]",
        description="Distill a teacher into a student on the student's own rollouts: the student samples, the\n"
        "teacher scores every token. With --effopd.strategy newton_search, training also searches further along\n"
        "the weight update and accepts candidates that are closer to the teacher.",
        epilog="Example:\n  effopd train --model_name_or_path STUDENT --teacher_model_name_or_path "
        "TEACHER --task math:train.jsonl \\\n"
        "      --eval_strategy steps --eval_steps 10 --effopd.strategy newton_search --output_dir runs/first\n"
        "Add --dry_run to check the settings and estimate the memory per rank, or --resume_from_checkpoint true to\n"
        "resume the run.",
        formatter_class=OneSpelling,
        add_help=False,
    )
    add_dry_run(parser)
    require(parser, "model_name_or_path", "teacher_model_name_or_path")
    arrange(parser, configs, ESSENTIALS)
    return parser


def without_own_values(values: dict[str, Any], strategy: str | None) -> dict[str, Any]:
    """The settings of a YAML file, without those that the file's strategy sets itself.

    A run's `config.yaml` holds all values of its strategy. They do not apply to another strategy;
    settings that differ from the values of the file's strategy do.

    Args:
        values: by field, as in the file.
        strategy: that of the command line; `None`, or the file's own: nothing changes.
    """
    start = "effopd_"
    block = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
    if strategy in (None, block.get("strategy")) or block.get("strategy", NONE) == NONE:
        return values
    config = EffOPDConfig(**block)
    kept = {name: value for name, value in block.items() if name in config.changed or name not in PAPER}
    kept["args"] = {name: value for name, value in config.args.items() if name in config.changed}
    others = {name: value for name, value in values.items() if not name.startswith(start)}
    return others | {start + name: value for name, value in kept.items() if name != "strategy"}


def loss_type_of_rollouts(words: Sequence[str] | None, given: argparse.Namespace) -> None:
    """Refuse an explicit `--loss_type full` with `--rollouts`, which implies 'sampled'."""
    text = " ".join(words or ())
    if given.loss_type == "full" and ("--loss_type full" in text or "--loss_type=full" in text):
        raise ConfigError(
            "loss_type='full' needs a live teacher, but --rollouts stores log-probabilities of the sampled tokens. "
            "Leave out --loss_type, or --rollouts."
        )


def task_of_rollouts(given: argparse.Namespace) -> None:
    """Without `--task`, use the task of the stored rollouts; flags that are set take precedence."""
    if given.task is not None:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(TaskConfig)}
    for name, value in RolloutStore(given.rollouts).header().task.items():
        if name in defaults and getattr(given, name) in (None, defaults[name]):
            setattr(given, name, value)


def parse_train(argv: Sequence[str]) -> RunSettings:
    """Parse command line and YAML into the settings of a run; see `parse_command`."""
    return parse_command(argv)[0]


def parse_command(argv: Sequence[str]) -> tuple[RunSettings, bool]:
    """Parse command line and YAML into (settings, whether `--dry_run` is given).

    Raises:
        ConfigError: a setting is unknown, out of range, or contradicts another setting, or a resume
            would leave the run in whose folder the YAML file lies.
    """
    parser = train_parser()
    model, task, opd, effopd, command = parsed(parser, argv)
    if parser.given("output_dir") is None:
        check_folder_of_config(parser.config_path, opd)
    for settings, role in ((model, ""), (opd, "teacher_"), (opd, "reference_")):
        name = f"{role}model_name_or_path"
        setattr(settings, name, resolve_model(getattr(settings, name), network=not command.dry_run))
    sources = opd.teacher_sources
    opd.teachers = [f"{k}={resolve_model(v, network=not command.dry_run)}" for k, v in sources.items()] or None
    stages = opd.curriculum_teachers or ()
    opd.curriculum_teachers = [str(resolve_model(name, network=not command.dry_run)) for name in stages] or None
    if opd.lambda_extrapolation != 1 and opd.reference_model_name_or_path is None:
        raise ConfigError(
            f"--lambda_extrapolation {opd.lambda_extrapolation} needs --reference_model_name_or_path: the initial "
            "student, or the teacher's base model before RL."
        )
    given = [word.partition("=")[0] for word in argv if word.startswith("--effopd")]
    if effopd.effopd_strategy == "none" and not any(name.endswith("strategy") for name in given) and given:
        raise ConfigError(
            f"{', '.join(given)}: the look-ahead is off without a strategy. Add --effopd.strategy newton_search "
            "(or effopd, the paper's), or leave it out."
        )
    values = {field.name: getattr(effopd, f"effopd_{field.name}") for field in dataclasses.fields(EffOPDConfig)}
    return RunSettings(model, task, opd, EffOPDConfig(**values)), command.dry_run
