"""`fixed`, a control: always jumps to W + 2kΔ, without scoring."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from effopd.extrapolate.search import unscored
from effopd.extrapolate.strategy import STRATEGIES, Strategy, without


@dataclass(frozen=True)
class FixedArgs:
    """Length of the jump."""

    k: float = field(default=1.0, metadata={"help": "jump to W + 2kΔ"})

    def __post_init__(self) -> None:
        if not 0 <= self.k < math.inf:
            raise ValueError(f"k must be >= 0 and finite, got {self.k}")


STRATEGIES["fixed"] = Strategy(
    "control: always jumps to W + 2kΔ, without scoring",
    lambda score, config, args: unscored(2.0 * args.k),
    without("validation_size", "score_rollouts", "gate", "min_z", "adapt_learning_rate"),
    FixedArgs,
)
