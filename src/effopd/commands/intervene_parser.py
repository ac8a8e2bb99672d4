"""Flags and YAML of `effopd intervene`, parsed into a `Request`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from effopd.analysis.plan import labeled
from effopd.commands.measuring_parser import MeasuringParser, parsed_as_trained
from effopd.commands.parser import OneSpelling
from effopd.common.files import check_writable
from effopd.errors import ConfigError
from effopd.interventions.kinds import INTERVENTIONS
from effopd.interventions.options import InterventionOptions
from effopd.models.files import check_dtype
from effopd.tasks import TaskConfig
from effopd.tasks.builtin_models import resolve_model
from effopd.tasks.sampling import Sampling


class _Extend(argparse.Action):
    """Append the values of repeated flags; together they replace the YAML file's values."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest, self.default)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


@dataclass
class InterveneArguments:
    """Flags of `effopd intervene`, except those of sampling, intervention and task."""

    base: str = field(metadata={"help": "Folder of the base model W0, for example testbed:student."})
    trained: list[str] = field(
        metadata={
            "help": "Trained checkpoint, LoRA adapter, or run directory with a trajectory, for example "
            "rl=testbed:teacher; repeatable. Repeat a label for further seeds.",
            "action": _Extend,
            "metavar": "LABEL=DIR",
        }
    )
    out: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the results; required with --task. Repeat the command to resume; interventions "
            "on the same models and task can share a folder."
        },
    )
    save_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to write every point's model to, as a checkpoint. Does not need --task."},
    )
    steps: list[int] | None = field(
        default=None,
        metadata={"help": "Trajectory steps to use; the last one is the trained model. Default: all."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a teacher: measure the exact reverse KL to it on the sampled answers."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the evaluated and written weights. bfloat16 rounds small updates away."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository."})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.out is None and self.save_dir is None:
            raise ConfigError("--out is missing: expected a folder for the results. To only write, use --save_dir.")
        if self.save_dir is not None and self.out is not None and Path(self.save_dir) == Path(self.out):
            raise ConfigError(f"--save_dir and --out are both {self.out}: expected two different folders.")
        for setting, folder in (("--out", self.out), ("--save_dir", self.save_dir)):
            if folder is not None:
                check_writable(Path(folder), setting)

    def runs(self) -> dict[str, list[str]]:
        """Label → folders, in the order of the flags.

        Raises:
            ConfigError: a value is not LABEL=DIR, or its label is invalid.
        """
        return {label: [str(resolve_model(path)) for path in paths] for label, paths in labeled(self.trained).items()}


@dataclass
class InterveneTaskConfig(TaskConfig):
    """`TaskConfig` whose `task` is optional: without it the command only writes checkpoints."""

    _argument_group_name = "task"

    task: str = field(default="", metadata=TaskConfig.__dataclass_fields__["task"].metadata)

    def __post_init__(self) -> None:
        self.task = self.task or self.eval_task or ""
        if self.task:
            super().__post_init__()


class _Parser(MeasuringParser):
    own_task = False  # without a task, the command only writes checkpoints

    def models(self, arguments: argparse.Namespace) -> list[str]:
        """Paths of the trained models; invalid ones are reported when they are opened."""
        return [path for _, _, path in (str(pair).partition("=") for pair in arguments.trained or ()) if path]


def intervene_parser() -> MeasuringParser:
    """The parser of `effopd intervene`."""
    width = max(map(len, INTERVENTIONS))
    lines = [
        f"  {name:<{width}}  {(kind.points.__doc__ or '').splitlines()[0]}" for name, kind in INTERVENTIONS.items()
    ]
    parser = _Parser(
        [InterveneArguments, InterventionOptions, Sampling, InterveneTaskConfig],
        prog="effopd intervene",
        usage="effopd intervene INTERVENTION --base DIR --trained LABEL=DIR [--trained LABEL=DIR "
        "…] --task TASK --out DIR",
        description="Test which part of an update carries the gain: edit the update ΔW of a trained model W0 + ΔW\n"
        "and evaluate each edited model on the same prompts with the same sampling noise. For models in\n"
        "run directories, the run's config.yaml gives the defaults for prompts and sampling.\n\ninterventions:\n"
        + "\n".join(lines),
        epilog="Example: effopd intervene alpha --base testbed:student --trained rl=testbed:teacher "
        "--task testbed:chain_sum\n           --eval_size 200 --max_new_tokens 24 --out runs/alpha",
        formatter_class=OneSpelling,
    )
    parser.add_argument(
        "intervention", choices=list(INTERVENTIONS), metavar="INTERVENTION", help="one of the interventions above"
    )
    return parser


@dataclass(frozen=True)
class Request:
    """Parsed command line of `effopd intervene`."""

    intervention: str
    models: InterveneArguments
    options: InterventionOptions
    sampling: Sampling
    task: InterveneTaskConfig


def parse_intervene(argv: Sequence[str]) -> Request:
    """Parse command line and YAML into a `Request`.

    Raises:
        ConfigError: a YAML setting is unknown, a value is out of range, or there is nothing to do.
    """
    models, options, sampling, task, extra = parsed_as_trained(intervene_parser(), argv)
    if task.task and models.out is None:
        raise ConfigError("--out is missing: expected a folder for the results of --task.")
    if not task.task and models.save_dir is None:
        raise ConfigError(
            "--task is missing: expected a task to evaluate on. To only write checkpoints, use --save_dir."
        )
    if not INTERVENTIONS[extra.intervention].graded:
        _check_ungraded(extra.intervention, models)
    return Request(extra.intervention, models, options, sampling, task)


def _check_ungraded(intervention: str, models: InterveneArguments) -> None:
    if models.save_dir is not None:
        raise ConfigError(
            f"--save_dir: {intervention} measures models, and writes none. Leave it out. To write W0 + αΔW, use alpha."
        )
    if models.teacher is None:
        raise ConfigError(f"--teacher is missing: {intervention} measures the KL to a teacher.")
