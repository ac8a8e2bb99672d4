"""Optimizer flags beyond the host's: any class, k-step Lookahead, averages of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from effopd.common.host_values import name_of
from effopd.errors import ConfigError

AVERAGES = ("none", "ema", "bema")
#: Setting → (setting that reads it, values of that setting with which it is read).
_READERS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "average_decay": ("average_weights", ("ema", "bema")),
    "average_power": ("average_weights", ("bema",)),
    "average_bias_power": ("average_weights", ("bema",)),
    "average_lag": ("average_weights", ("bema",)),
    "save_average": ("average_weights", ("ema", "bema")),
}


@dataclass
class OptimizerArguments:
    """Settings of the optimizer and of weight averages, shared by all trainers."""

    optimizer_class: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer as MODULE:CLASS, in place of --optim: for example prodigyopt:Prodigy, "
            "schedulefree:AdamWScheduleFree, dog:DoG. torch.optim:Muon trains the matrices of hidden layers with "
            "Muon and all other parameters with AdamW."
        },
    )
    optimizer_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of the optimizer_class, as JSON. Its learning rate and weight decay are "
            "--learning_rate and --weight_decay."
        },
    )
    k_step_lookahead: int = field(
        default=0,
        metadata={
            "help": "Period k, in steps, of the Lookahead optimizer (arXiv 1907.08610) around the optimizer: every k "
            "steps, slow weights move toward the weights and replace them. 0: off. Its authors use 5."
        },
    )
    k_step_lookahead_alpha: float = field(
        default=0.5, metadata={"help": "Share of the way that the slow weights of k_step_lookahead move."}
    )
    average_weights: str = field(
        default="none",
        metadata={
            "help": "Average of the weights that is evaluated and saved in place of the trained weights. 'ema': "
            "exponential moving average. 'bema': its bias-corrected form (arXiv 2508.00180).",
            "choices": list(AVERAGES),
        },
    )
    average_decay: float = field(
        default=0.99,
        metadata={"help": "Decay of the average per optimizer step; bema: its largest decay, reached late."},
    )
    average_power: float = field(
        default=0.5, metadata={"help": "bema: step t has weight (lag + t)^-average_power in the average."}
    )
    average_bias_power: float = field(
        default=0.2, metadata={"help": "bema: the bias correction has weight (lag + t)^-average_bias_power."}
    )
    average_lag: int = field(default=10, metadata={"help": "bema: lag of average_power and average_bias_power."})
    save_average: bool = field(
        default=True,
        metadata={
            "help": "Whether the final model is the average. false: the trained weights of the last step; not with "
            "--load_best_model_at_end, which loads an average."
        },
    )


def default_of(name: str) -> Any:
    """The host's default of a setting."""
    return next(each.default for each in fields(TrainingArguments) if each.name == name)


def check_optimizer_settings(args: Any) -> None:
    """Check the settings against each other, and parse `optimizer_args`; imports no optimizer.

    Args:
        args: an `OptimizerArguments` and `TrainingArguments`, before the host's own checks.

    Raises:
        ConfigError: a setting has an invalid value or would not be read.
    """
    if args.average_weights not in AVERAGES:
        raise ConfigError(f"average_weights={args.average_weights!r}: expected one of {', '.join(AVERAGES)}.")
    defaults = {each.name: each.default for each in fields(OptimizerArguments)}
    for name, (reader, values) in _READERS.items():
        if getattr(args, name) != defaults[name] and getattr(args, reader) not in values:
            raise ConfigError(
                f"{name}={getattr(args, name)!r} is read only with {reader}={' or '.join(values)}, got "
                f"{reader}={getattr(args, reader)!r}. Leave it out, or set --{reader}."
            )
    if not args.save_average and args.load_best_model_at_end:
        raise ConfigError(
            "save_average=False with load_best_model_at_end=True: the first ends with the trained weights of the last "
            "step, the second with the weights of the best evaluation, which are an average. Leave one out."
        )
    if args.k_step_lookahead < 0 or args.k_step_lookahead == 1:
        raise ConfigError(f"k_step_lookahead={args.k_step_lookahead}: expected at least 2 steps, or 0 for off.")
    if args.k_step_lookahead_alpha != defaults["k_step_lookahead_alpha"] and not args.k_step_lookahead:
        raise ConfigError(
            f"k_step_lookahead_alpha={args.k_step_lookahead_alpha} is read only with k_step_lookahead. Set "
            "--k_step_lookahead 5, or leave it out."
        )
    if args.optimizer_args is not None and args.optimizer_class is None:
        raise ConfigError(
            f"optimizer_args={args.optimizer_args!r} is read only with optimizer_class. Set --optimizer_class "
            "MODULE:CLASS, or use --optim_args for --optim."
        )
    if isinstance(args.optimizer_args, str):
        args.optimizer_args = json.loads(args.optimizer_args)  # `check_values` has checked it
    if args.optimizer_class is not None:
        _check_class(args)


def _check_class(args: Any) -> None:
    module, colon, name = str(args.optimizer_class).partition(":")
    if not (colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ConfigError(
            f"optimizer_class={args.optimizer_class!r}: expected MODULE:CLASS, for example prodigyopt:Prodigy."
        )
    for other in ("optim", "optim_args"):
        value = getattr(args, other)
        if name_of(value) != name_of(default_of(other)):
            raise ConfigError(
                f"{other}={name_of(value)!r} has no effect with optimizer_class="
                f"{args.optimizer_class!r}. Leave out one of the two."
            )
    for key, flag in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("params", None)):
        if key in (args.optimizer_args or {}):
            raise ConfigError(
                f"optimizer_args sets {key!r}: " + (f"use --{flag}." if flag else "the trainer sets the parameters.")
            )


def saved_copies(args: Any) -> int:
    """fp32 copies of the trained weights in a checkpoint beside its model file: the trained weights
    themselves if the model file holds their average, and that average's state.
    """
    state = not args.save_only_model
    if args.average_weights == "none":
        named = args.optimizer_class or name_of(args.optim)
        return int(state and named.startswith(("schedulefree:", "schedule_free_")))
    trained = state or not args.save_average
    return trained + state * (2 if args.average_weights == "bema" else 1)
