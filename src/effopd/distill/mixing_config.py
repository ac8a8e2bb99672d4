"""Settings of the mixing of on-policy rollouts and stored answers (GKD), and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effopd.errors import ConfigError


@dataclass
class MixingArguments:
    """Flags of the mixing; part of `OPDConfig`."""

    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "λ of GKD (arXiv 2306.13649): probability in [0, 1] that a step trains on rollouts of the "
            "student and not on given answers. Both kinds of steps have the same loss; 1: always on-policy."
        },
    )
    traces: str | None = field(
        default=None,
        metadata={
            "help": "With lmbda < 1: folder of stored answers, written by effopd cache --sampled_by teacher; only "
            "correct ones are used. Default: the column `completion` of the training dataset."
        },
    )

    def check_mixing(self) -> None:
        """Check the combination of settings; `effopd.distill.values` checks their ranges.

        Raises:
            ConfigError: `traces` is not read, or the loss needs rollouts of the present weights.
        """
        host: Any = self
        if self.lmbda == 1:
            if self.traces is not None:
                raise ConfigError(
                    f"traces={self.traces!r} is read only with lmbda < 1. Leave it out, or set --lmbda (for example "
                    "0.5)."
                )
            return
        if host.on_sampled_tokens:
            raise ConfigError(
                f"lmbda={self.lmbda:g}: loss_type={host.loss_type!r} is an estimate for rollouts of the present "
                "weights, and given answers are not. Use --loss_type full or teacher_top_k, or --lmbda 1."
            )
        if host.rollout_horizon == "prune":
            raise ConfigError(
                f"lmbda={self.lmbda:g}: rollout_horizon='prune' adapts the length to the student's own rollouts, and "
                "given answers are not. Use another rollout_horizon, or --lmbda 1."
            )
        if host.teachers or host.curriculum != "none":
            name = "teachers" if host.teachers else "curriculum"
            raise ConfigError(
                f"lmbda={self.lmbda:g}: given answers belong to no row of the step, so they have neither a teacher "
                f"nor a stage of their own. Leave --{name} out, or use --lmbda 1."
            )
        if self.traces is not None and not str(self.traces).strip():
            raise ConfigError("--traces: expected a folder that effopd cache wrote, got nothing.")
