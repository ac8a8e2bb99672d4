"""Flags of `effopd quickstart` and the settings of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig

from effopd.distill.config import OPDConfig
from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch.opd import RunSettings
from effopd.tasks import TaskConfig
from effopd.tasks import builtin_models as testbed

#: Number of training prompts; the runs pass over them several times.
TRAIN_SIZE = 4096
#: Name → label of each run. All but the first use the strategy of that name.
ARMS = {"plain": "plain OPD", "effopd": "EffOPD", "newton_search": "newton_search"}
AHEAD = tuple(ARMS)[1:]
#: Columns of a label.
LABEL_WIDTH = max(map(len, ARMS.values())) + 1
#: Defaults of the demo, and of `--fast`, which takes a fifth of the time.
FULL = {"max_steps": 48, "eval_steps": 2, "eval_size": 256, "prompts_per_step": 64}
FAST = {"max_steps": 12, "eval_steps": 2, "eval_size": 64, "prompts_per_step": 32}
_UNSET: Any = None


@dataclass
class QuickstartArguments:
    """Flags of `effopd quickstart`."""

    output_dir: str = field(
        default="runs/demo",
        metadata={
            "help": "Folder for rows, figure and summary.json: new, empty, or from an earlier demo. An earlier "
            "demo's folder is renamed first."
        },
    )
    family: str = field(default="", metadata={"help": "Task family of the testbed. Default: the first."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, sampling and validation prompts in all runs."})
    fast: bool = field(
        default=False,
        metadata={"help": "Take under a minute: fewer and smaller steps, fewer held-out prompts, noisy speed-ups."},
    )
    max_steps: int = field(default=_UNSET, metadata={"help": "Optimizer steps per run. Default: 48; with --fast, 12."})
    eval_steps: int = field(
        default=_UNSET,
        metadata={"help": "Steps between evaluations; their cost is not charged. Default: 2."},
    )
    eval_size: int = field(default=_UNSET, metadata={"help": "Held-out prompts. Default: 256; with --fast, 64."})
    prompts_per_step: int = field(default=_UNSET, metadata={"help": "Default: 64; with --fast, 32."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: the testbed's reference learning rate."}
    )
    cost_clock: str = field(
        default=_UNSET,
        metadata={
            "help": "Clock of the net seconds: wall time, or CPU time, which excludes other processes. Default: wall "
            "with an accelerator, else cpu.",
            "choices": ["wall", "cpu"],
        },
    )

    def __post_init__(self) -> None:
        self.family = self.family or next(iter(testbed.FAMILIES))
        if self.family not in testbed.FAMILIES:
            raise ConfigError(f"--family: expected one of {', '.join(testbed.FAMILIES)}; got {self.family!r}.")
        self.cost_clock = self.cost_clock or ("wall" if torch.accelerator.is_available() else "cpu")
        for name, default in (FAST if self.fast else FULL).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: expected at least 1, got {getattr(self, name)}.")
        if self.prompts_per_step > TRAIN_SIZE:
            raise ConfigError(
                f"--prompts_per_step: expected at most {TRAIN_SIZE}, the number of training prompts, got "
                f"{self.prompts_per_step}. Lower it."
            )


def settings(arm: str, arguments: QuickstartArguments, output_dir: Path) -> RunSettings:
    """Settings of one run: the testbed's reference settings and the strategy named by `arm`."""
    reference = dict(testbed.reference_settings())
    if arguments.learning_rate is not None:
        reference["learning_rate"] = arguments.learning_rate
    reference["per_device_train_batch_size"] = arguments.prompts_per_step
    opd = OPDConfig(
        **reference,
        output_dir=str(output_dir),
        teacher_model_name_or_path=str(testbed.teacher_path()),
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        cost_clock=arguments.cost_clock,
        per_device_eval_batch_size=arguments.eval_size,
        eval_strategy="steps",
        eval_steps=arguments.eval_steps,
        eval_on_start=True,
        eval_greedy=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return RunSettings(
        ModelConfig(model_name_or_path=str(testbed.student_path())),
        TaskConfig(
            task=f"testbed:{arguments.family}",
            train_size=TRAIN_SIZE,
            eval_size=arguments.eval_size,
            task_seed=arguments.seed,
        ),
        opd,
        EffOPDConfig(arm if arm in AHEAD else "none", seed=arguments.seed),
    )
