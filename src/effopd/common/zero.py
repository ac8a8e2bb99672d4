"""DeepSpeed ZeRO: this rank's fp32 master weights, gradients and moments, without gathering them.

Stages 1 and 2 lay the masters of all parameters end to end and give each rank one range of them, so
a rank holds a fragment of a parameter, or none. Stage 3 gives each rank ⌈numel / ranks⌉ elements of
every parameter; the last ranks hold padding too. All masters here are flat views without padding:
writing to one changes the master itself, and `Masters.refresh` copies the masters to the model.

Needs the package deepspeed only if a model is sharded by it. `tests/helpers/zero_double.py` has
doubles of all parts of DeepSpeed that are used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effopd.common.distributed import ShardSpec, rank, rows_of, world_size
from effopd.errors import ConfigError

#: Optimizers whose state is cleared by setting all of it to zero.
_ADAM = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")


def zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO optimizer, bare or wrapped by accelerate; `None` for any other optimizer."""
    for each in (optimizer, getattr(optimizer, "optimizer", None)):
        inner = getattr(each, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer) and not isinstance(each, torch.optim.Optimizer):
            return each
    return None


def base_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed, which takes the steps."""
    zero = zero_optimizer(optimizer)
    return getattr(optimizer, "optimizer", optimizer) if zero is None else zero.optimizer


def is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed holds the master weights of a parameter."""
    return is_zero3(parameter) or hasattr(parameter, "_hp_mapping")


def is_zero3(parameter: Tensor) -> bool:
    """Whether a parameter is sharded by ZeRO-3, so that it is whole only inside a forward pass."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; a ZeRO-3 parameter itself is empty outside a forward pass."""
    return torch.Size(parameter.ds_shape) if is_zero3(parameter) else parameter.shape  # type: ignore[attr-defined]


def whole_parameters(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """In this block, ZeRO-3 parameters are whole; all ranks must enter it."""
    sharded = [each for each in parameters if each is not None and is_zero3(each)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


# -- master weights --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masters:
    """Master weights of a model under ZeRO.

    Attributes:
        tensors: this rank's part of every master, flat fp32 views, by parameter name.
        shares: the range of elements of each part.
        refresh: copies the masters to the model; all ranks must call it.
    """

    tensors: dict[str, Tensor]
    shares: dict[str, ShardSpec]
    refresh: Callable[[], None]


def masters(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> Masters:
    """Master weights of trained parameters under ZeRO 1, 2 or 3.

    Args:
        parameters: parameters by name.
        optimizer: the ZeRO optimizer, bare or wrapped by accelerate.

    Raises:
        ConfigError: the optimizer is missing or not Adam, the masters are not fp32 or are not in
            memory, or a parameter is not sharded over all processes.
    """
    zero = zero_optimizer(optimizer)
    if zero is None:
        raise ConfigError(
            "optimizer=None: the model is sharded by DeepSpeed, whose optimizer holds the master weights. Pass "
            "optimizer=engine.optimizer."
        )
    kind = type(zero.optimizer).__name__
    if kind not in _ADAM:
        raise ConfigError(
            f"optimizer={kind}: the look-ahead under DeepSpeed needs Adam or AdamW. Use --optim adamw_torch."
        )
    tensors, shares = {}, {}
    for name, parameter in parameters.items():
        _check_ranks(name, parameter)
        first, tensor = _local(parameter)
        if tensor.dtype != torch.float32:
            raise ConfigError(
                f"the master weights of '{name}' are {tensor.dtype}: the look-ahead needs float32 master weights. "
                "Leave out fp16_master_weights_and_grads and bf16_master_weights_and_grads in the DeepSpeed config."
            )
        tensors[name] = tensor
        span = (first, first + tensor.numel())
        shares[name] = ShardSpec(shape_of(parameter).numel(), rank(), world_size(), span=span)
    sharded = [parameter for parameter in parameters.values() if is_zero3(parameter)]
    refresh = (lambda: _refresh3(zero, parameters, tensors)) if sharded else zero.update_lp_params
    return Masters(tensors, shares, refresh)


def _check_ranks(name: str, parameter: Any) -> None:
    group = getattr(parameter, "ds_process_group", None) if is_zero3(parameter) else parameter._dp_group
    ranks = dist.get_world_size(group) if world_size() > 1 else 1
    if ranks != world_size():
        raise ConfigError(
            f"'{name}' is sharded over {ranks} of {world_size()} processes: the look-ahead needs every parameter "
            "sharded over all of them. Leave out tensor, sequence, expert and pipeline parallelism, MiCS and hpZ."
        )


def _local(parameter: Any) -> tuple[int, Tensor]:
    """(first element, this rank's part of the master as a flat view)."""
    if not is_zero3(parameter):
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks hold all of it
            return 0, torch.empty(0, device=parameter.device)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()
    from deepspeed.utils import safe_get_local_fp32_param

    held, again = (safe_get_local_fp32_param(parameter) for _ in range(2))
    if held.data_ptr() != again.data_ptr():
        raise ConfigError(
            "the master weights are not in the memory of the accelerator: the look-ahead under ZeRO-3 needs them "
            "there. Leave out offload_optimizer and offload_param in the DeepSpeed config."
        )
    first, last = _span3(parameter)
    return first, held.detach()[: last - first]


def _span3(parameter: Any) -> tuple[int, int]:
    return rows_of(shape_of(parameter).numel(), rank(), world_size())


@torch.no_grad()
def _refresh3(zero: Any, parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Copy ZeRO-3 masters to this rank's shards, and drop whole copies of the old weights."""
    for name, parameter in parameters.items():
        parameter.ds_tensor.data[: tensors[name].numel()].copy_(tensors[name])
    zero.empty_partition_cache()
    if persistent := zero.persistent_parameters:  # small ones stay whole between forward passes
        persistent[0].all_gather(persistent)


# -- gradients and moments -------------------------------------------------------------------------


def zero_steps(zero: Any) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """(gradient, Adam's state, parameter group) of every part on this rank, flat.

    Call it after the backward pass and before the step. Gradients are neither clipped nor divided
    by the loss scale. Nothing is yielded before the first step.
    """
    states = list(zero.optimizer.state.values())
    if not states or "exp_avg" not in states[0]:
        return
    groups = next(
        each for name in ("bit16_groups", "bf16_groups", "fp16_groups") if (each := getattr(zero, name, None))
    )
    group, step = zero.optimizer.param_groups[0], states[0]["step"]
    for parameter in (parameter for parameters in groups for parameter in parameters):
        if (found := _gradient_and_moments(parameter)) is not None:
            gradient, first, second = found
            yield gradient, {"exp_avg": first, "exp_avg_sq": second, "step": step}, group


def _gradient_and_moments(parameter: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    if is_zero3(parameter):
        from deepspeed.utils import safe_get_local_grad, safe_get_local_optimizer_state

        first, last = _span3(parameter)
        moments = (safe_get_local_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
        parts = [each.flatten()[: last - first] for each in (safe_get_local_grad(parameter), *moments)]
        return parts[0], parts[1], parts[2]
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    if gradient.numel() != mapping.lp_fragment_address.numel:  # of the whole parameter
        gradient = gradient.narrow(0, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
    return gradient, mapping.get_hp_fragment("exp_avg"), mapping.get_hp_fragment("exp_avg_sq")


@torch.no_grad()
def reset_adam(optimizer: torch.optim.Optimizer) -> None:
    """Set Adam's moments and step count to zero in place: DeepSpeed holds views of the tensors."""
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else 0


class BeforeStep:
    """Calls a function before every step of a ZeRO optimizer, until `remove`.

    ZeRO steps the optimizer inside it once per parameter group, so hooks of that optimizer cannot
    see all gradients.
    """

    def __init__(self, zero: Any, call: Callable[[], None]):
        step = zero.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            call()
            return step(*args, **kwargs)

        self._zero, self._stepped = zero, stepped
        zero.step = stepped

    def remove(self) -> None:
        """Restore the step. Safe to call twice."""
        if vars(self._zero).get("step") is self._stepped:
            del self._zero.step
