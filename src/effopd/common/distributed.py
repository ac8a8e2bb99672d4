"""Several processes, one decision. On one process everything here returns at once.

Collectives carry small Python objects over the default process group; parameters never leave their
rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_object(value: T) -> list[T]:
    """Everybody's value, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def assert_same_on_ranks(what: str, value: T) -> T:
    """`value`, which must be the same on every rank.

    Raises:
        DivergenceError: it is not; on every rank, naming the ranks that differ from rank 0.
    """
    values = all_gather_object(value)
    apart = [i for i, other in enumerate(values) if repr(other) != repr(values[0])]
    if apart:
        raise DivergenceError(
            f"the processes have diverged: {what} is {values[0]} on rank 0 but "
            f"{values[apart[0]]} on rank {apart[0]} (ranks that "
            f"differ: {', '.join(map(str, apart))}). They should train in lock step; resume "
            "from the last checkpoint, and look "
            "for random numbers, data or code that depend on the rank."
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
    """Everybody's result of `work`, by rank, on every rank; if it raises on one rank, it raises on
    all.

    Results and failures travel in one collective: a rank that failed meets the others where they
    wait for its part.

    Raises:
        The rank's own exception where it happened, `DivergenceError` on the others.
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
    """This rank's result of `run`; if it raises on one rank, it raises on all (see
    `all_gather_or_raise`).
    """
    box: list[T] = []
    all_gather_or_raise(lambda: box.append(run()))
    return box[0]


def split_between_ranks(items: Sequence[T]) -> list[T]:
    """This rank's part of `items`: every `world_size()`-th, the first ones again where they do not
    divide, so that all ranks have as many."""
    each = -(-len(items) // world_size())
    return [items[(rank() + i * world_size()) % len(items)] for i in range(each)]


def merge_from_ranks(parts: Sequence[Sequence[T]], count: int) -> list[T]:
    """The inverse of `split_between_ranks`, from everybody's part."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def exit_gloo() -> None:
    """End a finished process of several over gloo without taking the group down; nothing on one
    process or another backend.

    Under DDP that can hang: torch 2.13's ~ProcessGroupGloo joins its thread with the interpreter's
    lock held, which that thread may need to let go of the last all-reduce.
    """
    if world_size() > 1 and dist.get_backend() == "gloo":
        dist.barrier()
        time.sleep(0.3)  # the others are out of the barrier too
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# -- sharded parameters (FSDP2) --------------------------------------------------------------------


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; all of it if it is not
    sharded.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded (every rank must call this then)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Write `value`, the whole, into a tensor; of a sharded one every rank writes its part of rank
    0's value, so that parts of different values never meet (every rank must call this then)."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.dtype), tensor.device_mesh, tensor.placements)
    local_shard(tensor).copy_(local_shard(value))


@dataclass(frozen=True)
class ShardSpec:
    """What a rank holds of a sharded parameter: of `rows` rows the part `part` of `parts`, and
    where shards are replicated (HSDP) in which `replica`."""

    rows: int
    part: int
    parts: int
    replica: int = 0


def shard_spec(tensor: Tensor) -> ShardSpec | None:
    """This rank's share, `None` of a tensor that is whole on every rank.

    Raises:
        ConfigError: it is sharded along another dimension than the first, or over several mesh
            dimensions.
    """
    if not isinstance(tensor, DTensor):
        return None
    if tensor.placements.count(Shard(0)) != 1 or tensor.placements.count(Replicate()) != len(tensor.placements) - 1:
        raise ConfigError(
            "the look-ahead moves parameters that FSDP2 shards along dimension 0 over one "
            "mesh dimension, and may replicate over "
            f"others (HSDP); got {tensor.placements}."
        )
    mesh, over = tensor.device_mesh, tensor.placements.index(Shard(0))
    place = mesh.get_coordinate()
    assert place is not None, "every rank that trains is part of the mesh"
    replica = 0
    for dim in range(mesh.ndim):
        replica = replica if dim == over else replica * mesh.size(dim) + place[dim]
    return ShardSpec(tensor.shape[0], place[over], mesh.size(over), replica)


def shard_specs(parameters: Mapping[str, Tensor]) -> dict[str, ShardSpec]:
    """The shares of the sharded ones among `parameters`.

    Raises:
        ConfigError: as `shard_spec`; or they are sharded over different numbers of ranks.
    """
    found = {name: share for name, tensor in parameters.items() if (share := shard_spec(tensor)) is not None}
    if len({share.parts for share in found.values()}) > 1:
        raise ConfigError(
            "the look-ahead moves parameters that are all sharded over the same ranks; got "
            + ", ".join(f"{name} over {share.parts}" for name, share in list(found.items())[:3])
            + ", …"
        )
    return found


def reshard(model: nn.Module) -> None:
    """Forget gathered copies that FSDP2 may have kept after a forward: they would not see an edit
    of the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
