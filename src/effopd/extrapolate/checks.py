"""Checks of model, scorer and settings before training; nothing is copied or moved."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from effopd.common.zero import zero_optimizer
from effopd.errors import ConfigError
from effopd.extrapolate.anchored import usable_device
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.lora_weights import LoraWeights, has_adapters, selected_adapters
from effopd.extrapolate.movable import MovableWeights
from effopd.extrapolate.parameter_rules import inside, select, trained_parameters
from effopd.extrapolate.scorers.base import OF_SCORERS
from effopd.extrapolate.strategy import STRATEGIES


def check_model(model: nn.Module, config: EffOPDConfig, *, target: bool) -> None:
    """Check that the strategy can work on the model.

    Args:
        model: the unwrapped model to be trained.
        config: settings of the look-ahead.
        target: whether the target accuracy of a fit can be measured.

    Raises:
        ConfigError: the strategy is 'none', the fit has no target accuracy, the anchor's device is
            unusable, `parameters` matches nothing, or the strategy cannot move LoRA adapters.
    """
    rules = config.rules
    if not config.enabled:
        raise ConfigError("strategy 'none' is plain training: leave the look-ahead out, or choose a strategy.")
    if rules.fit and rules.fit.target and rules.fit.target(config.strategy_args) is None and not target:
        raise ConfigError(
            f"strategy '{config.strategy}' needs a target accuracy, and there is no teacher to measure. Set "
            "EffOPDConfig(args={'target': …})."
        )
    usable_device(config.anchor_device)
    if not has_adapters(model):
        select(trained_parameters(model), str(config.parameters), type(inside(model)).__name__)
        return
    if rules.needs_full_matrices:
        raise ConfigError(
            f"strategy '{config.strategy}' needs full matrices, but the student trains LoRA adapters. Use "
            f"{_strategies_for_parts()}, or train the full weights."
        )
    selected_adapters(model, str(config.parameters))


def check_scorer(scorer: Any, config: EffOPDConfig, timeout: float | None) -> None:
    """Check the scorer and its time limit.

    Raises:
        ConfigError: the scorer is not callable, or missing although the strategy scores; or the
            timeout is not positive and finite.
    """
    if not callable(scorer) and (scorer is not None or config.scorer is not None):
        raise ConfigError(f"scorer must be a callable model → number (larger is better), got {type(scorer).__name__}.")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"score_timeout must be positive and finite or None, got {timeout}.")


def movable_weights(model: nn.Module, config: EffOPDConfig, optimizer: Any = None) -> MovableWeights:
    """LoRA factors if the model is a PEFT model, otherwise the full weights.

    Args:
        optimizer: the optimizer; required under DeepSpeed, whose optimizer holds the weights.

    Raises:
        ConfigError: the strategy needs full matrices, but this process holds shards; or LoRA
            adapters are trained under DeepSpeed.
    """
    weights: MovableWeights
    if not has_adapters(model):
        weights = LiveWeights(model, str(config.parameters), config.anchor_device, optimizer)
    elif zero_optimizer(optimizer) is None:
        weights = LoraWeights(model, str(config.parameters), config.anchor_device)
    else:
        raise lora_under_deepspeed()
    if weights.sharded and config.rules.needs_full_matrices:
        raise ConfigError(
            f"strategy '{config.strategy}' needs full matrices, but this process holds shards of them (FSDP2 or "
            f"DeepSpeed). Use {_strategies_for_parts()}, or train with DDP."
        )
    return weights


def lora_under_deepspeed() -> ConfigError:
    """The error for LoRA adapters under DeepSpeed, whose factors are not whole on any process."""
    return ConfigError(
        "use_peft=True: a look-ahead on LoRA adapters needs whole factors, but DeepSpeed shards them. Train the full "
        "weights, or launch with DDP or FSDP2."
    )


def _strategies_for_parts() -> str:
    return ", ".join(name for name, rules in STRATEGIES.items() if not rules.needs_full_matrices)


def refuse_unread(config: EffOPDConfig, scorer: Any, reads: Collection[str] | None = None) -> None:
    """Refuse settings of the built-in scorers that a custom scorer does not read.

    Args:
        scorer: the scorer in use.
        reads: names of the settings that it was built from; `None`: `scorer.reads`, if it has one.

    Raises:
        ConfigError: a setting would be ignored.
    """
    if scorer is None or config.scorer is None:
        return
    reads = getattr(scorer, "reads", ()) if reads is None else reads
    unread = sorted((config.changed & OF_SCORERS) - set(reads))
    if unread:
        raise ConfigError(
            f"EffOPDConfig.{unread[0]} is read by the built-in scorers only; a scorer of your own "
            f"({type(scorer).__name__}) does not read it. Leave out the setting, or scorer=…."
        )
