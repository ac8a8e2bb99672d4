"""What can be refused before training: nothing is copied and nothing is moved."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from effopd.errors import ConfigError
from effopd.extrapolate.anchored import usable_device
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.lora_weights import LoraWeights, has_adapters, selected_adapters
from effopd.extrapolate.movable import MovableWeights
from effopd.extrapolate.parameter_rules import inside, select, trained_parameters
from effopd.extrapolate.scoring import OF_SCORERS
from effopd.extrapolate.strategy import STRATEGIES


def check_model(model: nn.Module, config: EffOPDConfig, *, target: bool) -> None:
    """Refuse what the model and the settings rule out.

    Args:
        model: the model to be trained, unwrapped.
        config: of the look-ahead.
        target: whether the accuracy that a fit aims at can be measured.

    Raises:
        ConfigError: strategy 'none'; nothing to aim at; an unusable device; `parameters` that match
            nothing; LoRA adapters that the strategy cannot move.
    """
    rules = config.rules
    if not config.enabled:
        raise ConfigError("strategy 'none' is plain training: leave the look-ahead out, or choose a strategy.")
    if rules.fit and rules.fit.target and rules.fit.target(config.strategy_args) is None and not target:
        raise ConfigError(
            f"strategy '{config.strategy}' needs the accuracy it aims at: set its target, "
            f"EffOPDConfig(args={{'target': …}}); there "
            "is no teacher to measure."
        )
    usable_device(config.anchor_device)
    if not has_adapters(model):
        select(trained_parameters(model), str(config.parameters), type(inside(model)).__name__)
        return
    if rules.needs_full_matrices:
        raise ConfigError(
            f"strategy '{config.strategy}' needs whole matrices, but the student trains LoRA adapters. Use "
            f"{_strategies_for_parts()}, or train the full weights."
        )
    selected_adapters(model, str(config.parameters))


def check_scorer(scorer: Any, config: EffOPDConfig, timeout: float | None) -> None:
    """Something scores if the strategy scores, and a limit on it is one.

    Raises:
        ConfigError: it does not, or is not.
    """
    if not callable(scorer) and (scorer is not None or config.scorer is not None):
        raise ConfigError(f"scorer must be a callable model → number (larger is better), got {type(scorer).__name__}.")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"score_timeout must be positive and finite or None, got {timeout}.")


def movable_weights(model: nn.Module, config: EffOPDConfig) -> MovableWeights:
    """All of the weights, or the LoRA factors, whichever is trained.

    Raises:
        ConfigError: the strategy needs whole matrices, and this process holds shards of them.
    """
    kind = LoraWeights if has_adapters(model) else LiveWeights
    weights: MovableWeights = kind(model, str(config.parameters), config.anchor_device)
    if weights.sharded and config.rules.needs_full_matrices:
        raise ConfigError(
            f"strategy '{config.strategy}' needs whole matrices, but this process holds shards of them (FSDP2). Use "
            f"{_strategies_for_parts()}, or train with DDP."
        )
    return weights


def _strategies_for_parts() -> str:
    return ", ".join(name for name, rules in STRATEGIES.items() if not rules.needs_full_matrices)


def refuse_unread(config: EffOPDConfig, scorer: Any, reads: Collection[str] | None = None) -> None:
    """Settings of the built-in scorers mean nothing to another one.

    Args:
        scorer: what scores.
        reads: the settings that it was built from; default: those that `scorer.reads` names, if it
            does.

    Raises:
        ConfigError: a setting would be ignored.
    """
    if scorer is None or config.scorer is None:
        return
    reads = getattr(scorer, "reads", ()) if reads is None else reads
    unread = sorted((config.changed & OF_SCORERS) - set(reads))
    if unread:
        raise ConfigError(
            f"EffOPDConfig.{unread[0]} is read by the built-in scorers only; with a scorer of your own "
            f"({type(scorer).__name__}) it would be ignored. Leave it out, or leave out scorer=…."
        )
