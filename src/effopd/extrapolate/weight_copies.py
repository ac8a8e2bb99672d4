"""Copies of the weights that an optimizer keeps: a jump moves all of them, or is refused.

Schedule-free optimizers keep the base sequence z, and train at a point between z and the average x
of all z. Prodigy, some D-Adaptation optimizers and DoG keep the initial weights, to measure the
distance from them. A jump that moves only the parameters breaks these relations: the next step
moves part of the way back, or counts the jump as distance walked by the optimizer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effopd.common.distributed import local_shard
from effopd.common.zero import base_optimizer, reset_adam, zero_optimizer
from effopd.errors import ConfigError

#: A state tensor is a copy of the weights W if ‖tensor − W‖ < _NEAR · ‖W‖.
_NEAR = 0.5
#: Packages whose optimizers keep no copies of the weights.
_WITHOUT = frozenset({"torch", "transformers", "bitsandbytes", "torchao", "deepspeed"})
#: Attributes of every `torch.optim.Optimizer`.
_OWN = frozenset(vars(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)))


@dataclass(frozen=True)
class Family:
    """Where optimizers of one package keep copies of the weights.

    Args:
        state: keys of a parameter's state that hold a copy.
        groups: keys of a parameter group that hold a list of copies.
        counters: keys of a parameter group that start again when the state is cleared. Step-size
            estimates are not among them.
        sizes_steps: whether the optimizers estimate the length of their steps. Their learning rate
            multiplies that estimate.
    """

    state: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    sizes_steps: bool = False


#: Package of an optimizer class → its family.
FAMILIES: Mapping[str, Family] = {
    "schedulefree": Family(state=("z", "x", "y"), counters=("k", "weight_sum", "lr_max")),
    "prodigyopt": Family(state=("p0",), counters=("k", "d_numerator"), sizes_steps=True),
    "dadaptation": Family(
        state=("x0", "z"),
        counters=("k", "numerator_weighted", "gsq_weighted", "sksq_weighted", "skl1"),
        sizes_steps=True,
    ),
    "dog": Family(groups=("init_buffer",), sizes_steps=True),
    "effopd": Family(state=("slow_weights",)),
}


class Movable(Protocol):
    """Copies of the weights outside the optimizer, such as a running average."""

    def translate(self, parameter: Tensor, change: Tensor) -> None:
        """Add `change` to the copies of one parameter, if there are any."""


def has_modes(optimizer: Any) -> bool:
    """Whether the weights to evaluate differ from those that are trained: schedule-free.

    Such an optimizer has the methods `train` and `eval`, which switch the parameters.
    """
    inner = base_optimizer(optimizer)
    return all(callable(getattr(inner, name, None)) for name in ("train", "eval"))


def _families(optimizer: Any) -> Iterator[Family]:
    for kind in type(optimizer).__mro__:
        if (family := FAMILIES.get(kind.__module__.partition(".")[0])) is not None:
            yield family
    for part in getattr(optimizer, "optimizers", ()):  # a combination of optimizers
        yield from _families(part)


def sizes_steps(optimizer: Any) -> bool:
    """Whether an optimizer estimates the length of its steps: Prodigy, D-Adaptation, DoG, and those
    without a learning rate, such as transformers' Adafactor by default.
    """
    inner = base_optimizer(optimizer)
    without = any(group.get("lr") is None for group in getattr(inner, "param_groups", ()))
    return without or any(family.sizes_steps for family in _families(inner))


def _keys(optimizer: Any) -> Family:
    families = list(_families(optimizer))

    def every(part: str) -> tuple[str, ...]:
        return tuple({key: None for family in families for key in getattr(family, part)})

    return Family(every("state"), every("groups"), every("counters"))


def parameters_of(optimizer: Any) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# -- unknown copies --------------------------------------------------------------------------------


def unknown_copies(optimizer: Any) -> list[str]:
    """Names of state entries that look like copies of the weights and that `FAMILIES` lacks.

    Call it after an optimizer step: most optimizers create their state there.
    """
    inner = base_optimizer(optimizer)
    known, found = _keys(inner), dict[str, None]()
    if type(inner).__module__.partition(".")[0] in _WITHOUT:
        return []
    for parameter in parameters_of(inner):
        for key, value in inner.state.get(parameter, {}).items():
            if key not in known.state and _is_copy(value, parameter):
                found[key] = None
    for group in inner.param_groups:
        for key, value in group.items():
            if key not in ("params", *known.groups) and _holds_copy(value, group["params"]):
                found[key] = None
    for key, value in vars(inner).items():
        if key not in _OWN and not key.startswith("_optimizer_") and _holds_copy(value, parameters_of(inner)):
            found[key] = None
    return list(found)


def _holds_copy(value: Any, parameters: Sequence[Tensor]) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple) or len(value) != len(parameters):
        return False
    return any(_is_copy(each, parameter) for each, parameter in zip(value, parameters, strict=True))


@torch.no_grad()
def _is_copy(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value is parameter or not value.is_floating_point():
        return False
    if value.dim() == 0 or value.numel() < 2 or value.numel() != parameter.numel():
        return False
    weight = parameter.detach().flatten().float()
    norm = torch.linalg.vector_norm(weight)
    distance = torch.linalg.vector_norm(value.detach().flatten().to(weight.device).float() - weight)
    return bool(norm > 0) and bool(distance < _NEAR * norm)


def known_copies(optimizer: Any) -> list[str]:
    """Names of the entries of `FAMILIES` that this optimizer has at present."""
    inner = base_optimizer(optimizer)
    keys = _keys(inner)
    states = [inner.state.get(each, {}) for each in parameters_of(inner)] if keys.state else []
    found = [key for key in keys.state if any(key in state for state in states)]
    return found + [key for key in keys.groups if any(key in group for group in inner.param_groups)]


def lora_refused() -> ConfigError:
    """The error for copies of LoRA factors that a jump cannot move."""
    return ConfigError(
        "a look-ahead on LoRA adapters cannot move the copies of the weights that the optimizer or average_weights "
        "keeps, because a jump changes the basis of the factors. Train the full weights, use an optimizer without "
        "copies, or train without a look-ahead."
    )


def refuse_unknown_copies(optimizer: Any) -> None:
    """Check that a jump can move all copies of the weights.

    Raises:
        ConfigError: the optimizer keeps copies under names that `FAMILIES` lacks.
    """
    if names := unknown_copies(optimizer):
        kind = type(base_optimizer(optimizer))
        raise ConfigError(
            f"the optimizer {kind.__module__}.{kind.__qualname__} keeps copies of the weights "
            f"({', '.join(names)}), and the look-ahead does not know how a jump must move them. Expected an optimizer "
            f"without copies, or one of the packages {', '.join(sorted(set(FAMILIES) - {'effopd'}))}. Choose another "
            "optimizer, or train without a look-ahead."
        )


@torch.no_grad()
def refuse_masters(optimizer: Any, model: nn.Module) -> None:
    """Check that the optimizer steps the model's parameters, not copies of them.

    Optimizers of DeepSpeed are not checked: their masters move (`effopd.common.zero`).

    Raises:
        ConfigError: a parameter of the optimizer equals one of the model that it does not have.
    """
    inner = base_optimizer(optimizer)
    if zero_optimizer(optimizer) is not None or not isinstance(inner, torch.optim.Optimizer):
        return
    held, own = {id(each) for each in parameters_of(inner)}, {id(each) for each in model.parameters()}
    others = [each for each in parameters_of(inner) if id(each) not in own]
    for name, parameter in model.named_parameters() if others else ():
        if id(parameter) not in held and any(_holds(each, parameter) for each in others):
            raise ConfigError(
                f"optimizer={type(inner).__name__}: it steps a copy of the parameter '{name}', for example an fp32 "
                "master, and the next step would copy it over a jump. Expected an optimizer of the parameters of this "
                "model. Keep the trained weights in float32 and use torch.autocast, or train without a look-ahead."
            )


def _holds(copy: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor has the values of a parameter, up to its precision; not if all are equal."""
    if copy.shape != parameter.shape or parameter.numel() < 2:
        return False
    varies = bool((parameter != parameter.flatten()[0]).any())
    return varies and torch.equal(copy.to(parameter.device, parameter.dtype), parameter)


# -- the weights to evaluate -----------------------------------------------------------------------

#: Optimizers whose parameters are at present the weights to evaluate.
_EVALUATED: weakref.WeakSet[Any] = weakref.WeakSet()


@contextmanager
def evaluated(optimizer: Any) -> Iterator[None]:
    """In this block, the parameters are the weights to evaluate; afterwards the trained weights.

    The trained weights return bit for bit. Without modes (`has_modes`) nothing happens. Memory: one
    copy of the parameters.
    """
    inner = base_optimizer(optimizer)
    if not has_modes(inner) or inner in _EVALUATED:
        yield
        return
    with kept(parameters_of(inner)), _at_average(inner):
        yield


@contextmanager
def kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """In this block, the parameters can change; afterwards they return bit for bit."""
    copies = _copies(parameters)
    try:
        yield
    finally:
        _restore(copies)


@contextmanager
def _at_average(inner: Any) -> Iterator[None]:
    """In this block, the parameters are the average; afterwards the optimizer's mode returns."""
    trains = all(group.get("train_mode", True) for group in inner.param_groups)
    inner.eval()
    _EVALUATED.add(inner)
    try:
        yield
    finally:
        _EVALUATED.discard(inner)
        if trains:
            inner.train()


@contextmanager
def carried(optimizer: Any, averages: Sequence[Movable] = (), *, lora: bool = False) -> Iterator[int]:
    """In this block, a look-ahead moves the parameters, and all copies follow.

    Yields the memory of its own copies of the parameters, in bytes.

    The block starts at the weights to evaluate. At its end, every copy is translated by the change
    of its parameter. If no parameter changed, the trained weights return bit for bit.

    Args:
        optimizer: the optimizer, or `None`.
        averages: other copies of the weights.
        lora: whether the parameters are LoRA factors. A jump changes their basis, so that
            translated copies are meaningless.

    Raises:
        ConfigError: the optimizer keeps copies that cannot follow.
    """
    inner = base_optimizer(optimizer)
    if inner is not None:
        refuse_unknown_copies(inner)
    if not (averages or (inner is not None and (has_modes(inner) or known_copies(inner)))):
        yield 0
        return
    if lora:
        raise lora_refused()
    assert inner is not None, "averages belong to a training loop with an optimizer"
    keys = _keys(inner)
    trained = _copies(parameters_of(inner))
    size = sum(local_shard(copy).nbytes for _, copy in trained)
    try:
        if has_modes(inner):
            with _at_average(inner):
                origin = _copies(parameters_of(inner))
                yield 2 * size
                moved = _follow(inner, keys, averages, origin)
        else:
            yield size
            moved = _follow(inner, keys, averages, trained)
    except BaseException:
        _restore(trained)
        raise
    if not moved:
        _restore(trained)


def _copies(parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(parameter, parameter.detach().clone()) for parameter in parameters]


@torch.no_grad()
def _restore(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    for parameter, copy in copies:
        parameter.copy_(copy)


@torch.no_grad()
def _follow(inner: Any, keys: Family, averages: Sequence[Movable], before: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Translate all copies by the change of their parameters; whether any parameter changed."""
    moved = False
    places = {
        parameter: (group.get("slice_p", 1), [group[key][i] for key in keys.groups if key in group])
        for group in inner.param_groups
        for i, parameter in enumerate(group["params"])
    }
    for parameter, origin in before:
        every, lists = places[parameter]
        if torch.equal(parameter, origin):
            continue
        moved = True
        change = parameter.detach() - origin
        state = inner.state.get(parameter, {})
        for key in keys.state:
            if key in state:
                state[key] = _translated(state[key], change, every)
        for copy in lists:
            copy.add_(change.to(copy))
        for average in averages:
            average.translate(parameter, change)
    return moved


def _translated(copy: Tensor, change: Tensor, every: int) -> Tensor:
    """`copy` + `change`; Prodigy keeps every n-th element, and a scalar for weights that are 0."""
    if copy.shape == change.shape:
        return copy.add_(change.to(copy))
    return copy + change.flatten()[::every].to(copy)


def clear_state(optimizer: Any) -> None:
    """Clear all moments, and start the counters of the optimizer's family again.

    The next step copies the present weights again. Step-size estimates are kept. A warm-up of a
    schedule-free optimizer that is over does not start again.
    """
    inner = base_optimizer(optimizer)
    if zero_optimizer(optimizer) is not None:
        reset_adam(inner)
        return
    counters = _keys(inner).counters
    inner.state.clear()
    for part in (inner, *getattr(inner, "optimizers", ())):
        for group in part.param_groups:
            if group.get("k", 0) >= group.get("warmup_steps", math.inf):
                group["warmup_steps"] = 0
            group.update({key: part.defaults[key] for key in counters if key in part.defaults})
