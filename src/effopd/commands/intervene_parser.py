"""The command line of `effopd intervene`: its flags, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from effopd.analysis.plan import labelled
from effopd.commands.measuring_parser import MeasuringParser, parsed_as_trained
from effopd.commands.parser import OneSpelling
from effopd.errors import ConfigError
from effopd.interventions.kinds import INTERVENTIONS
from effopd.interventions.options import InterventionOptions
from effopd.models.files import check_dtype
from effopd.tasks import TaskConfig
from effopd.tasks.builtin_models import resolve_model
from effopd.tasks.sampling import Sampling


class _Extend(argparse.Action):
    """Repeated flags add up, and together replace what a YAML file says."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest, self.default)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


@dataclass
class InterveneArguments:
    """Flags of `effopd intervene` besides those of the sampling, the intervention and the task."""

    base: str = field(metadata={"help": "Folder of the base model, W0; testbed:student ships."})
    trained: list[str] = field(
        metadata={
            "help": "LABEL=DIR, once or more: a checkpoint, a LoRA adapter, or a run directory with a trajectory "
            "(testbed:teacher ships). The same label again is another seed.",
            "action": _Extend,
            "metavar": "LABEL=DIR",
        }
    )
    out: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the results; needed with --task. A rerun goes on where it stopped, and other "
            "interventions on the same models and task may share it."
        },
    )
    save_dir: str | None = field(
        default=None,
        metadata={"help": "Also write the model of every point as a checkpoint in this folder; works without --task."},
    )
    steps: list[int] | None = field(
        default=None,
        metadata={"help": "Use these steps of the trajectories only; the last is the trained model. Default: all."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id; also measure the exact reverse KL to this model on the answers sampled."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the weights evaluated and written; in bfloat16 small updates vanish."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository."})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.out is None and self.save_dir is None:
            raise ConfigError("--out is missing: expected a folder for the results (or --save_dir, to only write).")
        if self.save_dir is not None and self.out is not None and Path(self.save_dir) == Path(self.out):
            raise ConfigError(f"--save_dir and --out: expected two folders, got {self.out} for both.")

    def runs(self) -> dict[str, list[str]]:
        """Label → folders, in the order given.

        Raises:
            ConfigError: not LABEL=DIR, or a label that cannot be used.
        """
        return {label: [str(resolve_model(path)) for path in paths] for label, paths in labelled(self.trained).items()}


@dataclass
class InterveneTaskConfig(TaskConfig):
    """`TaskConfig` whose task may be left out, where the command only writes checkpoints."""

    _argument_group_name = "task"

    task: str = field(default="", metadata=TaskConfig.__dataclass_fields__["task"].metadata)

    def __post_init__(self) -> None:
        self.task = self.task or self.eval_task or ""
        if self.task:
            super().__post_init__()


class _Parser(MeasuringParser):
    own_task = False  # without a task, the command only writes checkpoints

    def models(self, arguments: argparse.Namespace) -> list[str]:
        """The trained models; a mistake among them is reported where they are opened."""
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
        description="Test which part of an update carries the gain: models between and beside a base W0 and trained\n"
        "ones W0 + ΔW, each evaluated on the same prompts with the same sampling noise. Of "
        "models in run directories, prompts\n"
        "are written and answers sampled as config.yaml there says, unless a flag says otherwise.\n\ninterventions:\n"
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
    """A parsed command line."""

    intervention: str
    models: InterveneArguments
    options: InterventionOptions
    sampling: Sampling
    task: InterveneTaskConfig


def parse_intervene(argv: Sequence[str]) -> Request:
    """Command line and YAML → `Request`.

    Raises:
        ConfigError: an unknown setting in the YAML file, a value out of range, or nothing to do.
    """
    models, options, sampling, task, extra = parsed_as_trained(intervene_parser(), argv)
    if task.task and models.out is None:
        raise ConfigError("--out is missing: expected a folder for the results of --task.")
    if not task.task and models.save_dir is None:
        raise ConfigError(
            "--task is missing: expected what to evaluate on (or --save_dir, to only write checkpoints)."
        )
    return Request(extra.intervention, models, options, sampling, task)
