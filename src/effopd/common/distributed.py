"""Collectives that make all ranks take the same decision, and helpers for FSDP2 shards.

Collectives carry small Python objects over the default process group. Parameters leave their rank
only in `full_tensor` and `copy_full_`. In a single process nothing is communicated.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from effopd.errors import ConfigError, DivergenceError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 in a single process."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def assert_same_on_ranks(what: str, value: T) -> T:
    """Return `value` if it is the same on every rank; values are compared by `repr`.

    Raises:
        DivergenceError: the values differ. It is raised on every rank and names the ranks that
            differ from rank 0.
    """
    values = all_gather_object(value)
    apart = [i for i, other in enumerate(values) if repr(other) != repr(values[0])]
    if apart:
        raise DivergenceError(
            f"the processes have diverged: {what} is {values[0]} on rank 0 but "
            f"{values[apart[0]]} on rank {apart[0]} (ranks that "
            f"differ: {', '.join(map(str, apart))}). All ranks must take the same steps: resume "
            "from the last checkpoint, and look for random numbers, data or code that depend on the rank."
        )
    return value


def broadcast_from_rank0(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() > 1:
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def all_gather_or_raise(work: Callable[[], T]) -> list[T]:
    """Results of `work` on all ranks, in rank order; raises on all ranks if `work` raises on one.

    Results and failures share one collective, so a rank that failed does not leave the others
    waiting.

    Raises:
        The original exception on the rank that failed, `DivergenceError` on the others.
    """
    error: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    if world_size() > 1:
        parts = all_gather_object((value, f"{type(error).__name__}: {error}" if error else None))
        failed = [i for i, (_, message) in enumerate(parts) if message]
        if failed and error is None:
            raise DivergenceError(
                f"rank {failed[0]} failed: {parts[failed[0]][1]} (ranks that failed: {', '.join(map(str, failed))})."
            )
        values = [part for part, _ in parts]
    else:
        values = [value]
    if error is not None:
        raise error
    return values


def raise_on_all_ranks(run: Callable[[], T]) -> T:
    """This rank's result of `run`; raises on all ranks if `run` raises on one.

    See `all_gather_or_raise`.
    """
    box: list[T] = []
    all_gather_or_raise(lambda: box.append(run()))
    return box[0]


def split_between_ranks(items: Sequence[T]) -> list[T]:
    """This rank's part of `items`: every `world_size()`-th item, starting at `rank()`.

    Items wrap around to the first if they do not divide evenly, so all parts have the same length.
    """
    each = -(-len(items) // world_size())
    return [items[(rank() + i * world_size()) % len(items)] for i in range(each)]


def merge_from_ranks(parts: Sequence[Sequence[T]], count: int) -> list[T]:
    """Invert `split_between_ranks`: the `count` items, from the parts of all ranks."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def exit_gloo(status: int = 0) -> None:
    """Exit a finished multi-process gloo run without destroying its process group.

    Does nothing in a single process or on another backend. Destroying the group can hang under
    DDP: torch 2.13's ~ProcessGroupGloo joins its thread while it holds the interpreter's lock,
    and that thread may need the lock to release the last all-reduce.
    """
    if world_size() > 1 and dist.get_backend() == "gloo":
        dist.barrier()
        time.sleep(0.3)  # lets the other ranks leave the barrier
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# -- sharded parameters (FSDP2) --------------------------------------------------------------------


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded. All ranks must call this for a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Copy the full `value` into a tensor in place.

    If the tensor is sharded, all ranks must call this: each rank writes its shard of rank 0's
    `value`, so the shards cannot come from different values.
    """
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.dtype), tensor.device_mesh, tensor.placements)
    local_shard(tensor).copy_(local_shard(value))


@dataclass(frozen=True)
class ShardSpec:
    """The shard of a parameter that a rank holds.

    Attributes:
        rows: rows of the full parameter.
        part: index of the shard, from 0.
        parts: number of shards.
        replica: index of the replica under HSDP; otherwise 0.
        span: first and last row (exclusive) of the shard; `None`: as FSDP2 divides rows.
    """

    rows: int
    part: int
    parts: int
    replica: int = 0
    span: tuple[int, int] | None = None


def rows_of(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First and last row (exclusive) of a part, as `torch.chunk` and FSDP2 divide rows.

    An empty part is (rows, rows).
    """
    each = -(-rows // parts)
    return min(part * each, rows), min((part + 1) * each, rows)


def assemble(shard: Tensor, share: ShardSpec, shape: Sequence[int]) -> Tensor:
    """The whole of a flat tensor from the shards of all ranks; all ranks must call this."""
    whole = torch.zeros(share.rows, dtype=shard.dtype, device=shard.device)
    first, last = share.span or rows_of(share.rows, share.part, share.parts)
    whole[first:last] = shard
    if world_size() > 1:
        dist.all_reduce(whole)
    return whole.view(*shape)


def shard_spec(tensor: Tensor) -> ShardSpec | None:
    """This rank's shard of a tensor; `None` if the tensor is not sharded.

    Raises:
        ConfigError: the tensor is not sharded along dimension 0 over exactly one mesh dimension.
    """
    if not isinstance(tensor, DTensor):
        return None
    if tensor.placements.count(Shard(0)) != 1 or tensor.placements.count(Replicate()) != len(tensor.placements) - 1:
        raise ConfigError(
            f"placements={tensor.placements}: the look-ahead supports FSDP2 parameters that are sharded along "
            "dimension 0 over one mesh dimension and replicated over the others (HSDP). Change the mesh."
        )
    mesh, over = tensor.device_mesh, tensor.placements.index(Shard(0))
    place = mesh.get_coordinate()
    assert place is not None, "every rank that trains is part of the mesh"
    replica = 0
    for dim in range(mesh.ndim):
        replica = replica if dim == over else replica * mesh.size(dim) + place[dim]
    return ShardSpec(tensor.shape[0], place[over], mesh.size(over), replica)


def shard_specs(parameters: Mapping[str, Tensor]) -> dict[str, ShardSpec]:
    """Name → this rank's shard, for the sharded tensors among `parameters`.

    Raises:
        ConfigError: as `shard_spec`, or the tensors have different numbers of shards.
    """
    specs = {name: spec for name, tensor in parameters.items() if (spec := shard_spec(tensor)) is not None}
    if len({spec.parts for spec in specs.values()}) > 1:
        raise ConfigError(
            "the look-ahead needs all parameters sharded over the same ranks; got "
            + ", ".join(f"{name} over {spec.parts}" for name, spec in list(specs.items())[:3])
            + ", …"
        )
    return specs


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are whole only inside its forward pass: FSDP2 or ZeRO-3."""
    return isinstance(model, FSDPModule) or any(hasattr(each, "ds_id") for each in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that FSDP2 can keep after a forward pass.

    They do not reflect later edits of the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
