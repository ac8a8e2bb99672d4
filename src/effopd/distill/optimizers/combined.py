"""Optimizers made of optimizers: Muon for hidden matrices with AdamW, and k-step Lookahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

from effopd.errors import ConfigError
from effopd.extrapolate.weight_copies import has_modes, parameters_of


class CombinedOptimizer(Optimizer):
    """Optimizers that step one after the other, as one optimizer.

    The parameter groups and the state are those of its parts. Schedules, hooks and checkpoints
    therefore need to know only this optimizer.

    Args:
        optimizers: the parts, with disjoint parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers: list[Optimizer] = []
        super().__init__([{"params": parameters_of(each)} for each in optimizers], {})
        self.optimizers = list(optimizers)
        self.param_groups = [group for each in optimizers for group in each.param_groups]
        self._share()

    def _share(self) -> None:
        """Make the parts work on this optimizer's groups and state."""
        place = 0
        for each in self.optimizers:
            count = len(each.param_groups)
            each.param_groups = self.param_groups[place : place + count]
            each.state = self.state
            if isinstance(each, CombinedOptimizer):
                each._share()
            place += count

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of all parts."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss


class KStepLookahead(CombinedOptimizer):
    r"""Lookahead: every k steps, φ ← φ + α (θ − φ) and θ ← φ, with slow weights φ.

    Between these steps, the weights θ are those of the inner optimizer. φ starts at the first θ.
    Memory: one copy of the parameters. Evaluate after a multiple of k steps: θ equals φ there.

    Args:
        inner: the optimizer of θ.
        k: steps between two moves of φ, ≥ 2.
        alpha: share α of the way, in (0, 1].

    Raises:
        ConfigError: the inner optimizer is schedule-free and keeps an average itself.

    Source: arXiv 1907.08610. The inner moments are kept, the default of its authors' code.
    """

    def __init__(self, inner: Optimizer, k: int, alpha: float):
        if has_modes(inner):
            raise ConfigError(
                f"k_step_lookahead={k}: {type(inner).__name__} evaluates an average of its own weights. Leave out "
                "one of the two."
            )
        if type(inner).load_state_dict not in (Optimizer.load_state_dict, CombinedOptimizer.load_state_dict):
            raise ConfigError(
                f"k_step_lookahead={k}: {type(inner).__name__} saves its state in its own way, which this wrapper "
                "does not support. Leave out one of the two."
            )
        super().__init__([inner])
        self.k, self.alpha = k, alpha
        for group in self.param_groups:
            group["lookahead_steps"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; every k-th also moves the slow weights."""
        before: dict[Tensor, Tensor] = {
            each: each.detach().clone()
            for each in parameters_of(self)
            if each.grad is not None and "slow_weights" not in self.state.get(each, {})
        }
        loss = super().step(closure)
        for parameter, copy in before.items():  # later than the inner optimizer, which tests for an empty state
            self.state[parameter]["slow_weights"] = copy
        for group in self.param_groups:
            group["lookahead_steps"] += 1
            if group["lookahead_steps"] % self.k:
                continue
            for parameter in group["params"]:
                if (slow := self.state.get(parameter, {}).get("slow_weights")) is not None:
                    slow.lerp_(parameter, self.alpha)
                    parameter.copy_(slow)
        return loss


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the trainable matrices of linear layers, without the output head.

    LoRA factors are among them. Embeddings, convolutions, norms, biases and stacked experts are
    not.
    """
    heads = {id(each.weight) for each in _outputs(model)}
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad and id(module.weight) not in heads
    }


def _outputs(model: nn.Module) -> list[Any]:
    getters = (getattr(model, name, None) for name in ("get_output_embeddings", "get_input_embeddings"))
    found = [get() for get in getters if get is not None]
    return [each for each in found if getattr(each, "weight", None) is not None]


def muon_with_adamw(
    model: nn.Module,
    decayed: set[str],
    weight_decay: float,
    lr: float,
    arguments: Mapping[str, Any],
    adamw: Mapping[str, Any],
    muon: Callable[..., Optimizer] = torch.optim.Muon,
) -> CombinedOptimizer:
    """Muon on the matrices of hidden layers, AdamW on all other parameters.

    Args:
        decayed: names of the parameters with weight decay.
        lr: learning rate of both.
        arguments: keyword arguments of Muon; `adamw_lr_ratio` (default 1) is AdamW's learning rate
            as a multiple of Muon's.
        adamw: keyword arguments of AdamW.

    Raises:
        ConfigError: the model has no matrix of a hidden layer, or the ratio is not positive.
    """
    arguments = dict(arguments)
    ratio = arguments.pop("adamw_lr_ratio", 1.0)
    if not isinstance(ratio, int | float) or not ratio > 0:
        raise ConfigError(f"optimizer_args: adamw_lr_ratio={ratio!r}: expected a number above 0.")
    matrices = hidden_matrices(model)
    if not matrices:
        raise ConfigError("torch.optim:Muon: the model has no trainable matrix of a hidden layer.")
    split: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            split.setdefault((name in matrices, name in decayed), []).append(parameter)
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (is_matrix, decays), parameters in split.items():
        groups[is_matrix].append({"params": parameters, "weight_decay": weight_decay if decays else 0.0})
    parts: list[Optimizer] = [muon(groups[True], lr=lr, **arguments)]
    if groups[False]:
        parts.append(AdamW(groups[False], lr=lr * ratio, **adamw))
    return CombinedOptimizer(parts)
