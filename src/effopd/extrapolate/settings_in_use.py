"""Which settings of `EffOPDConfig` a strategy reads; every other one is refused instead of ignored.

Two tables say it: `ONLY_FOR` by strategy, `ONLY_WITH` by the value of another setting. The same tables tell a resumed run
what must be as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from effopd.errors import ConfigError
from effopd.extrapolate.strategies import STRATEGIES

#: Settings that `None` leaves to the strategy.
OF_THE_STRATEGY = ("schedule", "scorer", "optimizer", "steer", "gate", "parameters")

_SEARCHING = tuple(name for name, strategy in STRATEGIES.items() if strategy.direction)
_FITTING = tuple(name for name, strategy in STRATEGIES.items() if strategy.fit)
_SCORED = tuple(name for name, strategy in STRATEGIES.items() if strategy.scorer)
_GATED = ("line_search", "effopd", "effopd-released", "random_direction", "noop")

#: Settings that only some strategies read.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "schedule": _SEARCHING,
    "scorer": _GATED,  # AlphaOPD's is its own
    "scales": ("effopd", "effopd-released", "random_direction"),
    "gate": _GATED,
    "gate_z": _GATED,
    # no jump, no moments to reset; no score, no preferred scale to steer by
    "optimizer": tuple(name for name in STRATEGIES if name != "noop"),
    "steer": ("line_search", "effopd", "effopd-released", "random_direction"),
    "fixed_k": ("fixed",),
    "fit_every": _FITTING,
    "fit_until": _FITTING,
    "relex_factor": ("relex",),
    "alpha_target": ("alpha_opd",),
    "score_rollouts": _SCORED,
    "validation_size": _SCORED,
    "validation_batch_size": _SCORED,
    "temperature": _SCORED,
    "max_completion_length": _SCORED,
    "score_timeout": _SCORED,
    "seed": _SCORED,
}
#: Settings that are read only while another one has this value.
ONLY_WITH: dict[str, tuple[str, str]] = {
    "gate_z": ("gate", "margin"),
    "score_rollouts": ("scorer", "teacher_kl"),
    "validation_size": ("scorer", "accuracy"),
    "validation_batch_size": ("scorer", "accuracy"),
    "temperature": ("scorer", "accuracy"),
    "max_completion_length": ("scorer", "accuracy"),
}
#: What a scorer of one's own replaces.
OF_BUILT_IN_SCORERS = ("scorer", *(name for name, (other, _) in ONLY_WITH.items() if other == "scorer"))
#: Accepted where nothing is drawn, too: a grid gives every run its seed.
WELCOME_ANYWHERE = ("seed",)
#: Settings that decide where and for how long, but not what: a resumed run may change them.
DECIDE_NOTHING = ("anchor_device", "score_timeout")


def why_unread(name: str, strategy: str, resolved: dict[str, Any]) -> str | None:
    """Why a run does not read a setting, as the middle of a sentence; `None` if it does.

    Args:
        name: a field of `EffOPDConfig`.
        strategy: of the run.
        resolved: its settings, those that `None` leaves to the strategy included.
    """
    if strategy == "none":
        return (
            None
            if name == "strategy"
            else "is set, but strategy 'none' is plain training: there is no look-ahead to set"
        )
    strategies = ONLY_FOR.get(name, (strategy,))
    if strategy not in strategies:
        return f"is read by the strategies {', '.join(strategies)} only, so with strategy '{strategy}' it would be ignored"
    other, value = ONLY_WITH.get(name, (None, None))
    if other is not None and resolved[other] != value:
        return f"is read by {other} '{value}' only; with {other} '{resolved[other]}' it would be ignored"
    return None


def refuse_unread(config: Any, scorer: Any, reads: Collection[str] | None = None) -> None:
    """Settings of the built-in scorers mean nothing to another one.

    Args:
        config: an `EffOPDConfig`.
        scorer: what scores.
        reads: the settings that it was built from; default: those that `scorer.reads` names, if it does.

    Raises:
        ConfigError: a setting would be ignored.
    """
    if scorer is None or config.plan.scorer is None:
        return
    reads = getattr(scorer, "reads", ()) if reads is None else reads
    unread = sorted((config.given & set(OF_BUILT_IN_SCORERS)) - set(reads))
    if unread:
        raise ConfigError(
            f"EffOPDConfig.{unread[0]} is read by the built-in scorers only; with a scorer of your own "
            f"({type(scorer).__name__}) it would be ignored. Leave it out, or leave out scorer=…."
        )
