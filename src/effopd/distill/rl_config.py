"""Configs of the RL baselines: TRL's GRPO and RLOO configs, with published settings as presets."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig, RLOOConfig

from effopd.distill.config import RunArguments
from effopd.distill.values import check_values
from effopd.errors import ConfigError

# arXiv 2402.03300 with the settings of 2605.11739: clip 0.2, KL weight 0.001 to the initial model,
# 16 answers per prompt
_GRPO: dict[str, Any] = {
    "learning_rate": 1e-6, "num_generations": 16, "per_device_train_batch_size": 16, "epsilon": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.001, "loss_type": "grpo", "scale_rewards": "group",
}  # fmt: skip
#: Defaults of `effopd rl` by `--algorithm`; flags and YAML override them.
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": _GRPO,
    # arXiv 2503.14476: higher upper clip, no KL, mean over tokens, soft overlong punishment
    "dapo": {
        "learning_rate": 1e-6, "num_generations": 16, "per_device_train_batch_size": 16, "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0, "loss_type": "dapo", "scale_rewards": "group", "overlong_cache": 0.2,
    },
    # arXiv 2402.14740
    "rloo": {"learning_rate": 1e-6, "num_generations": 16, "per_device_train_batch_size": 16, "beta": 0.0},
    # arXiv 2605.12227. Its β and group size are not known to us: β 1 as in verl 0.9
    # (distillation_loss_coef), ROLL (opd_kl_coef) and slime (--opd-kl-coef); the rest as `grpo`
    "dgrpo": _GRPO | {"beta": 1.0},
    # KDRL, arXiv 2506.02208: β 2e-3, with the k2 estimate in the place of the exact KL
    "dgrpo_kdrl": _GRPO | {"beta": 2e-3},
    # its annealed variant: 5e-3 to 1e-3, 5e-5 less per step
    "dgrpo_kdrl_annealed": _GRPO | {"beta": 5e-3, "beta_decay": 5e-5, "beta_min": 1e-3},
}  # fmt: skip


@dataclass
class RLArguments(RunArguments):
    """Flags of the reinforcement-learning trainers."""

    best_metric: ClassVar[str] = "accuracy"  # an evaluation has no loss

    output_dir: str = field(default="runs/rl", metadata={"help": "The run directory."})
    algorithm: str = field(
        default="grpo",
        metadata={
            "help": "Algorithm and its preset of published settings, which flags and YAML override.",
            "choices": list(PRESETS),
        },
    )
    overlong_cache: float = field(
        default=0.0,
        metadata={
            "help": "Soft overlong punishment (DAPO, eq. 13): share of max_completion_length, counted back from the "
            "limit, over which a penalty grows linearly from 0 to −1. 0: none."
        },
    )

    def __post_init__(self) -> None:
        clip = getattr(self, "reward_clip_range", None)
        if clip is not None:
            self.reward_clip_range = _two_numbers(clip)
        super().__post_init__()
        if self.algorithm not in PRESETS:
            raise ConfigError(f"algorithm must be one of {', '.join(PRESETS)}; got {self.algorithm!r}.")
        if not 0.0 <= self.overlong_cache < 1.0:
            raise ConfigError(f"overlong_cache must be in [0, 1), got {self.overlong_cache}.")


def _two_numbers(value: Any) -> tuple[float, float]:
    """Parse a range from a list or text; the command line passes text as a tuple of characters."""
    text = "".join(value) if isinstance(value, tuple) and all(isinstance(part, str) for part in value) else value
    parts = text.strip("[]() ").split(",") if isinstance(text, str) else text
    try:
        low, high = (float(part) for part in parts)
    except (ValueError, TypeError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"--reward_clip_range: expected two numbers, the lower first, such as -1,1; got {text!r}.")
    return low, high


@dataclass
class TaskGRPOConfig(RLArguments, GRPOConfig):
    """`trl.GRPOConfig` and `RLArguments`; for `algorithm` grpo and dapo."""


@dataclass
class TaskDGRPOConfig(TaskGRPOConfig):
    """`TaskGRPOConfig` for dGRPO, in which `beta` weights the exact KL to a teacher."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher, with the same tokenizer as the student: a folder, Hub id or testbed:teacher."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Loading arguments of the teacher, as a JSON object."}
    )
    beta_decay: float = field(default=0.0, metadata={"help": "Decrease of beta per optimizer step. 0: constant."})
    beta_min: float = field(default=0.0, metadata={"help": "Smallest beta with beta_decay."})

    def __post_init__(self) -> None:
        if isinstance(self.teacher_model_init_kwargs, str):
            check_values(self)
            self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)
        super().__post_init__()
        if self.sync_ref_model:
            raise ConfigError("sync_ref_model=True: dGRPO's reference is the teacher, which is fixed. Leave it out.")
        if self.beta_min and not (self.beta_decay and self.beta_min <= self.beta):
            raise ConfigError(
                f"beta_min={self.beta_min} is read only with beta_decay above 0 and must be at most beta={self.beta}; "
                f"got beta_decay={self.beta_decay}. Change one of the three."
            )


@dataclass
class TaskRLOOConfig(RLArguments, RLOOConfig):
    """`trl.RLOOConfig` and `RLArguments`."""


def config_class(algorithm: str) -> type[TaskGRPOConfig] | type[TaskRLOOConfig]:
    """The configuration class of an algorithm.

    Raises:
        ConfigError: unknown algorithm.
    """
    if algorithm not in PRESETS:
        raise ConfigError(f"--algorithm must be one of {', '.join(PRESETS)}; got {algorithm!r}.")
    if algorithm.startswith("dgrpo"):
        return TaskDGRPOConfig
    return TaskRLOOConfig if algorithm == "rloo" else TaskGRPOConfig
