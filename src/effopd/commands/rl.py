"""Flags and YAML of `effopd rl`, parsed into `RLRunSettings`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from trl import ModelConfig

from effopd.commands.parser import RUN_ESSENTIALS, CommandParser, OneSpelling, add_dry_run, arrange, parsed, require
from effopd.common.unique_keys import load_unique, settings_text
from effopd.distill.rl_config import PRESETS, TaskDGRPOConfig, config_class
from effopd.errors import ConfigError
from effopd.launch.rl import RLRunSettings
from effopd.launch.run_checks import check_folder_of_config
from effopd.tasks import TaskConfig
from effopd.tasks.builtin_models import resolve_model


def rl_parser(algorithm: str) -> CommandParser:
    """The parser of `effopd rl`, with the algorithm's preset as defaults.

    Raises:
        ConfigError: the algorithm is unknown.
    """
    configs = [ModelConfig, TaskConfig, config_class(algorithm)]
    parser = CommandParser(
        configs,
        prog="effopd rl",
        usage="effopd rl --algorithm grpo|dapo|rloo|dgrpo --model_name_or_path MODEL --task TASK [--FLAG VALUE …]",
        description="Reinforcement learning on a task: GRPO, DAPO, RLOO or dGRPO, with published defaults.",
        epilog="Example:\n  effopd rl --algorithm grpo --model_name_or_path STUDENT --task math:train.jsonl \\\n"
        "      --per_device_train_batch_size 64 --trajectory powers_of_two --output_dir runs/teacher\n"
        "Add --dry_run to check the settings and estimate the memory per rank.",
        formatter_class=OneSpelling,
        add_help=False,
    )
    parser.set_defaults(**PRESETS[algorithm])
    add_dry_run(parser)
    names = (
        "algorithm",
        "model_name_or_path",
        *(["teacher_model_name_or_path"] if algorithm.startswith("dgrpo") else []),
        "task",
        "output_dir",
        "dry_run",
        *RUN_ESSENTIALS,
        "num_generations",
        "beta",
        "trajectory",
    )
    ours = RUN_ESSENTIALS | {
        "per_device_train_batch_size": "Rollouts per forward pass and device. This × gradient_accumulation_steps × "
        "devices must be a multiple of num_generations; the quotient is the number of prompts per step. Presets: 16.",
        "beta": "Weight of the KL penalty to the initial model; 0 loads no reference model. Presets: "
        "grpo 0.001, dapo and rloo 0.",
    }
    if algorithm.startswith("dgrpo"):
        ours["beta"] = "Weight of the exact KL to the teacher. Presets: dgrpo 1, dgrpo_kdrl 0.002, and "
        ours["beta"] += "dgrpo_kdrl_annealed 0.005 to 0.001."
    require(parser, "model_name_or_path")
    arrange(parser, configs, {name: ours.get(name, "") for name in names})
    return parser


def parse_rl(argv: Sequence[str]) -> RLRunSettings:
    """Parse command line and YAML into the settings of a run; see `parse_command`."""
    return parse_command(argv)[0]


def parse_command(argv: Sequence[str]) -> tuple[RLRunSettings, bool]:
    """Parse command line and YAML into (settings, whether `--dry_run` is given).

    The algorithm's preset are the defaults.

    Raises:
        ConfigError: the algorithm or a setting is unknown, a value is out of range, or a resume
            would leave the run in whose folder the YAML file lies.
    """
    parser = rl_parser(_algorithm(list(argv)))
    model, task, rl, command = parsed(parser, argv)
    if parser.given("output_dir") is None:
        check_folder_of_config(parser.config_path, rl)
    network = not command.dry_run
    model.model_name_or_path = resolve_model(model.model_name_or_path, network=network)
    if isinstance(rl, TaskDGRPOConfig):
        rl.teacher_model_name_or_path = resolve_model(rl.teacher_model_name_or_path, network=network)
    return RLRunSettings(model, task, rl), command.dry_run


def _algorithm(argv: list[str]) -> str:
    """`--algorithm` from the command line, otherwise from the YAML file, otherwise grpo.

    It must be known first because the set of flags depends on it.

    Raises:
        ConfigError: the file cannot be read as YAML.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm")
    first.add_argument("--config")
    known, _ = first.parse_known_args(argv)
    if known.algorithm is None and known.config is not None:
        path = Path(known.config)
        try:
            settings = load_unique(settings_text(path), path.name) if path.is_file() else None
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(str(error)) from error
        known.algorithm = settings.get("algorithm") if isinstance(settings, dict) else None
    return known.algorithm or "grpo"
