"""Build the optimizer of `--optimizer_class`, and try any optimizer on two small tensors."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from effopd.common.optional import missing
from effopd.distill.optimizers.combined import KStepLookahead, muon_with_adamw
from effopd.distill.optimizers.settings import default_of
from effopd.errors import ConfigError
from effopd.extrapolate.weight_copies import has_modes

#: Settings of the host for Adam → their names as keyword arguments.
_ADAM = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


def optimizer_class(name: str) -> Any:
    """Import an optimizer class.

    Args:
        name: MODULE:CLASS.

    Raises:
        MissingDependencyError: the module is not installed.
        ConfigError: the module has no such class, or it is not a torch optimizer.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise missing(module_name, f"could not be imported ({error})", purpose=f"--optimizer_class {name}") from error
    kind = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer):
        known = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
        ]
        raise ConfigError(
            f"optimizer_class={name!r}: expected a subclass of torch.optim.Optimizer. {module_name} has "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    return kind


def keyword_arguments(kind: type[Optimizer], args: Any) -> dict[str, Any]:
    """Keyword arguments of an optimizer class, from `optimizer_args` and the host's settings.

    The class keeps its own defaults for all settings that were not given.

    Raises:
        ConfigError: the class does not take an argument or a setting that was given.
    """
    parameters = inspect.signature(kind.__init__).parameters
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in (args.optimizer_args or {}).items()}
    known = set(parameters) - {"self", "params"} | (
        {"adamw_lr_ratio"} if issubclass(kind, torch.optim.Muon) else set()
    )
    unknown = sorted(set(given) - known)
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        raise ConfigError(
            f"optimizer_args: {kind.__name__} has no argument {unknown[0]!r}. Expected "
            f"{', '.join(sorted(known - {'lr', 'weight_decay'}))}."
        )
    if args.weight_decay and "weight_decay" not in parameters:
        raise ConfigError(f"weight_decay={args.weight_decay}: {kind.__name__} has no weight decay. Leave it out.")
    if "lr" not in parameters:
        raise ConfigError(f"optimizer_class: {kind.__name__} has no argument 'lr', which learning_rate sets.")
    return _adam(kind, args, parameters) | given


def _adam(kind: type[Optimizer], args: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Adam's coefficients, if they differ from the host's defaults."""
    changed = [name for name in _ADAM if getattr(args, name) != default_of(name)]
    if issubclass(kind, torch.optim.Muon):
        return {}  # they are AdamW's
    for name in changed:
        parameter = parameters.get(_ADAM[name])
        pair = _ADAM[name] != "betas" or (parameter is not None and len(parameter.default) == 2)
        if parameter is None or not pair:
            raise ConfigError(
                f"{name}={getattr(args, name)}: {kind.__name__} does not take it. Use --optimizer_args for the "
                "arguments of the class."
            )
    values = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {_ADAM[name]: values[_ADAM[name]] for name in changed}


def build_optimizer(args: Any, model: nn.Module, decayed: set[str]) -> Optimizer:
    """The optimizer of `args.optimizer_class` for all trainable parameters of a model.

    Without weight decay all parameters are one group, because DoG measures distances per group.

    Args:
        decayed: names of the parameters with weight decay.

    Raises:
        ConfigError, MissingDependencyError: the class cannot be used with these settings.
    """
    kind = optimizer_class(args.optimizer_class)
    arguments = keyword_arguments(kind, args)
    if issubclass(kind, torch.optim.Muon):
        adamw = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return muon_with_adamw(model, decayed, args.weight_decay, args.learning_rate, arguments, adamw, kind)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups: list[dict[str, Any]] = []
    for decays in (True, False) if args.weight_decay else (None,):
        parameters = [each for name, each in trained if decays is None or (name in decayed) == decays]
        if parameters:
            groups.append({"params": parameters, "weight_decay": args.weight_decay if decays else 0.0})
    if "weight_decay" not in inspect.signature(kind.__init__).parameters:
        groups = [{"params": group["params"]} for group in groups]
    return kind(groups, lr=args.learning_rate, **arguments)


def wrapped(optimizer: Optimizer, args: Any) -> Optimizer:
    """The optimizer inside k-step Lookahead, if it is on."""
    if not args.k_step_lookahead:
        return optimizer
    return KStepLookahead(optimizer, args.k_step_lookahead, args.k_step_lookahead_alpha)


class SmallModel(nn.Module):
    """A linear layer with generic weights of size 100, to try an optimizer on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 100 * torch.randn(parameter.shape, generator=generator)


def tried(args: Any, build: Callable[[nn.Module], Optimizer]) -> Optimizer:
    """An optimizer after two steps on a small model; its state shows where it keeps weights.

    Args:
        build: model → optimizer.

    Raises:
        ConfigError: the optimizer cannot be built, stepped or restored with these settings.
    """
    given = f"--optimizer_class {args.optimizer_class}" if args.optimizer_class else f"--optim {args.optim}"
    if args.optimizer_args:
        given += f" --optimizer_args {args.optimizer_args}"
    model = SmallModel()
    generator = torch.Generator().manual_seed(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = wrapped(build(model), args)
            if has_modes(optimizer):
                optimizer.train()  # type: ignore[attr-defined]
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    except (ConfigError, ImportError):
        raise
    except Exception as error:  # the class is any code
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{given}: {text}. Check its arguments.") from error
    return optimizer
