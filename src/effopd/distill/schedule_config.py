"""`ScheduleArguments`: flags of schedules that depend on the data or on the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effopd.errors import ConfigError

#: Flags that only rollout_horizon='prune' reads.
PRUNE_FLAGS = (
    "prune_top_k", "prune_threshold", "prune_drop", "prune_base_weight", "prune_normalize", "prune_start_length",
    "prune_min_length", "prune_step", "prune_margin", "prune_hit_share", "prune_patience",
)  # fmt: skip


@dataclass
class ScheduleArguments:
    """Flags of Prune-OPD; mixed into `OPDConfig`."""

    prune_top_k: int = field(
        default=16, metadata={"help": "Prune-OPD: size k of the student's and the teacher's sets of likeliest tokens."}
    )
    prune_threshold: float = field(
        default=0.7,
        metadata={"help": "Prune-OPD: a token is bad if the two sets share less than this part of their tokens."},
    )
    prune_drop: float = field(
        default=0.01, metadata={"help": "Prune-OPD: loss of reliability per bad token; an answer starts with 1."}
    )
    prune_base_weight: float = field(
        default=0.5,
        metadata={"help": "Prune-OPD: weight of a token without reliability; the weight is reliability + this."},
    )
    prune_normalize: bool = field(
        default=True,
        metadata={
            "help": "Prune-OPD: divide the token weights by 1 + prune_base_weight, so that an answer without bad "
            "tokens has weight 1. false: the paper's weights, which also raise the learning rate by that factor."
        },
    )
    prune_start_length: int = field(
        default=2048, metadata={"help": "Prune-OPD: maximum rollout length of the first step, in tokens."}
    )
    prune_min_length: int = field(
        default=1024,
        metadata={"help": "Prune-OPD: smallest rollout length, in tokens. The largest is max_completion_length."},
    )
    prune_step: int = field(default=100, metadata={"help": "Prune-OPD: change of the rollout length, in tokens."})
    prune_margin: int = field(
        default=100,
        metadata={"help": "Prune-OPD: an answer that is reliable up to the length minus this hits the limit."},
    )
    prune_hit_share: float = field(
        default=0.1, metadata={"help": "Prune-OPD: share of answers that must hit the limit for the length to grow."}
    )
    prune_patience: int = field(
        default=3, metadata={"help": "Prune-OPD: steps in a row with too few hits after which the length shrinks."}
    )

    def _check_prune(self) -> None:
        host: Any = self
        if host.rollout_horizon != "prune":
            return
        low, start, high = self.prune_min_length, self.prune_start_length, host.max_completion_length
        if not low <= start <= high or low == high:
            raise ConfigError(
                f"prune_start_length={start}: expected a length from prune_min_length={low} to "
                f"max_completion_length={high}, and the first below the last. The defaults are the paper's, for "
                "answers of up to 12288 tokens. Lower --prune_min_length and --prune_start_length (and --prune_step "
                "and --prune_margin in proportion), or raise --max_completion_length."
            )
        if host.loss_type == "negative_advantage":
            raise ConfigError(
                "rollout_horizon='prune' compares the student's likeliest tokens with the teacher's, but "
                "loss_type='negative_advantage' has no teacher. Use another loss_type or rollout_horizon."
            )
