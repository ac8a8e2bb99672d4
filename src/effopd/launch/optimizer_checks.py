"""Early checks of optimizer and schedule: both are built for a small model."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.optimization import get_scheduler

from effopd.common.host_values import name_of
from effopd.common.schedules import reads_settings, reads_warm_up
from effopd.distill.optimizers.build import build_optimizer, tried
from effopd.distill.optimizers.mixin import average_refused
from effopd.distill.optimizers.settings import default_of
from effopd.errors import ConfigError, MissingDependencyError
from effopd.extrapolate.weight_copies import FAMILIES, has_modes, known_copies, lora_refused, refuse_unknown_copies

logger = logging.getLogger(__name__)

#: Prefix of an `--optim` → the package that provides it.
OPTIMIZER_PACKAGES = {
    "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao", "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu", "adamw_anyprecision": "torchdistx", "galore_": "galore_torch",
    "apollo_": "apollo_torch",
    "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw", "schedule_free_": "schedulefree",
    "stable_adamw": "optimi", "adamw_bnb_": "bitsandbytes", "adamw_8bit": "bitsandbytes", "ademamix": "bitsandbytes",
    "lion_": "bitsandbytes", "paged_": "bitsandbytes", "rmsprop_bnb": "bitsandbytes",
}  # fmt: skip
#: Optimizers that need the loaded model, so only their flags are checked.
_OF_A_MODEL = ("galore_", "apollo_", "lomo", "adalomo")
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def check_optimizer(args: Any) -> None:
    """Build the optimizer and its schedule for a small model, and take two steps with some.

    Raises:
        MissingDependencyError: a package is missing.
        ConfigError: the optimizer or the schedule rejects a setting.
    """
    optim = name_of(args.optim)
    if args.optimizer_class is None and optim.startswith(_OF_A_MODEL):
        if optim.startswith(("galore_", "apollo_")) and not args.optim_target_modules:
            raise ConfigError(f"--optim {optim} needs --optim_target_modules: names of modules, or all-linear.")
        optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    elif _is_tried(args):
        optimizer = tried(args, _builder(args))
        _check_rate(args)
        if has_modes(optimizer) and args.average_weights != "none":
            raise average_refused(args.average_weights, type(optimizer).__name__)
    else:
        optimizer = _builder(args)(nn.Linear(1, 1, bias=False))
    _check_schedule(args, optimizer)


def check_copies(args: Any, *, lora: bool) -> None:
    """Check that a look-ahead can move all copies of the weights.

    Args:
        lora: whether LoRA adapters are trained.

    Raises:
        ConfigError: the optimizer keeps unknown copies, or copies of LoRA factors.
    """
    copies = args.average_weights != "none"
    if _is_tried(args):
        optimizer = tried(args, _builder(args))
        refuse_unknown_copies(optimizer)
        copies = copies or has_modes(optimizer) or bool(known_copies(optimizer))
    if copies and lora:
        raise lora_refused()


def _is_tried(args: Any) -> bool:
    optim = name_of(args.optim)
    return args.optimizer_class is not None or args.k_step_lookahead > 0 or optim.startswith("schedule_free_")


def _builder(args: Any) -> Callable[[nn.Module], Optimizer]:
    if args.optimizer_class is not None:
        return lambda model: build_optimizer(args, model, {"layer.weight"})
    return lambda model: _host_optimizer(args, model)


def _host_optimizer(args: Any, model: nn.Module) -> Optimizer:
    """The optimizer of `--optim`."""
    optim = name_of(args.optim)
    if optim.startswith("schedule_free_") and 0 < args.warmup_steps < 1:
        raise ConfigError(
            f"warmup_steps={args.warmup_steps}: --optim {optim} warms up by itself, over a whole number of steps. Set "
            "--warmup_steps to the number of steps."
        )
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        _check_adam(args, optim, settings)
        return kind(list(model.parameters()), **settings)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        given = f"--optim {optim}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
        hint = " Expected --optim_args NAME=VALUE,…." if args.optim_args else ""
        raise ConfigError(f"{given}: {error}.{hint}") from error
    except ImportError as error:
        raise MissingDependencyError(f"--optim {optim}: {error}") from error


def _check_adam(args: Any, optim: str, settings: dict[str, Any]) -> None:
    """Refuse a coefficient of Adam that does not reach the optimizer of `--optim`.

    Args:
        settings: keyword arguments of the optimizer.
    """
    for name in _ADAM:
        if getattr(args, name) != default_of(name):
            other = copy.copy(args)
            setattr(other, name, default_of(name))
            if Trainer.get_optimizer_cls_and_kwargs(other)[1] == settings:
                raise ConfigError(f"--{name} {getattr(args, name):g}: --optim {optim} does not read it. Leave it out.")


def _check_rate(args: Any) -> None:
    package = str(args.optimizer_class).partition(":")[0].partition(".")[0]
    if package in FAMILIES and FAMILIES[package].sizes_steps and args.learning_rate < 0.01:
        logger.warning(
            "learning_rate=%g: %s estimates the step size itself and multiplies it by the learning rate. Its authors "
            "use --learning_rate 1.",
            args.learning_rate,
            args.optimizer_class,
        )


def _check_schedule(args: Any, optimizer: Any) -> None:
    steps = args.max_steps if args.max_steps > 0 else 100
    name = name_of(args.lr_scheduler_type)
    if args.warmup_steps and not reads_warm_up(args):
        raise _no_warm_up(args, name, optimizer)
    if args.lr_scheduler_kwargs and not reads_settings(args):
        raise ConfigError(
            f"--lr_scheduler_kwargs {json.dumps(args.lr_scheduler_kwargs)}: the schedule {name!r} has no settings. "
            "Set another --lr_scheduler_type, or leave it out."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_scheduler(
                args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
            )
    except (ValueError, TypeError, KeyError) as error:
        given = f"--lr_scheduler_type {name}" + (
            f" --lr_scheduler_kwargs {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        )
        raise ConfigError(f"{given}: {error}. Pass its settings as --lr_scheduler_kwargs '{{…}}'.") from error


def _no_warm_up(args: Any, schedule: str, optimizer: Any) -> ConfigError:
    steps = f"{args.warmup_steps:g}"
    if args.optimizer_class is not None and "warmup_steps" in getattr(optimizer, "defaults", {}):
        remedy = f"{type(optimizer).__name__} warms up by itself. Set --optimizer_args '{{\"warmup_steps\": {steps}}}'"
    else:
        remedy = "Set --lr_scheduler_type constant_with_warmup"
    return ConfigError(f"--warmup_steps {steps}: the schedule {schedule!r} has no warm-up. {remedy}, or leave it out.")
