"""Parameters of a live model, their fp32 anchor, and an origin that is restored bit for bit."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effopd.common.distributed import all_gather_object, local_shard, reshard, shard_specs, world_size
from effopd.common.zero import is_zero, masters, shape_of
from effopd.errors import ConfigError, NonFiniteWeightsError, WeightsError
from effopd.extrapolate.parameter_rules import plain_name


def bit_sum(tensor: Tensor) -> int:
    """Sum of a float tensor's bit patterns read as integers; works for NaN and infinity."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def named_device(name: str | None) -> torch.device | None:
    """Parse a device name, without checking that this machine has the device; `None` for `None`.

    Raises:
        ConfigError: the name is not a device, or is `meta`.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("a 'meta' device holds no numbers")
        return device
    except RuntimeError as error:
        raise _no_device(name, error) from error


def usable_device(name: str | None) -> torch.device | None:
    """Parse a device name and check that this machine can use the device; `None` for `None`.

    Raises:
        ConfigError: the name is not a device, or the device cannot be used.
    """
    device = named_device(name)
    if device is not None:
        try:
            torch.empty(1, device=device)
        except Exception as error:  # backends raise different types
            raise _no_device(name, error) from error
    return device


def _no_device(name: str | None, error: Exception) -> ConfigError:
    return ConfigError(
        f"EffOPDConfig.anchor_device={name!r} cannot hold the anchor "
        f"({str(error).splitlines()[0]}). Use 'cpu' or a device of this machine such as 'cuda:0', or leave it out to "
        "keep the anchor next to the parameters."
    )


class AnchoredParameters:
    """Parameters with their anchor and, during a search, their origin.

    Memory: the fp32 anchor for the whole run, plus one copy in the parameters' dtype between
    `begin` and `commit`.

    Args:
        model: the model that contains the parameters.
        parameters: parameters by name.
        device: device of the anchor; `None`: the device of each parameter.
        hold: parameter → the tensor that this rank keeps in its anchor (a shard or the whole).
        optimizer: the optimizer; required under DeepSpeed, whose optimizer holds the weights.

    Attributes:
        parameters: parameters by name; under DeepSpeed, this rank's fp32 masters, flat.
        numel: number of elements, all ranks together.
        anchor: fp32 tensors by name.
        shares: this rank's shard of every sharded parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device | None,
        hold: Callable[[Tensor], Tensor],
        optimizer: Any = None,
    ):
        self._device, self._hold = device, hold
        self.numel = sum(shape_of(p).numel() for p in parameters.values())
        self.parameters: dict[str, Tensor]
        if any(map(is_zero, parameters.values())):
            held = masters(parameters, optimizer)
            self.parameters, self.shares, self._refresh = held.tensors, held.shares, held.refresh
        else:
            self.parameters, self.shares = dict(parameters), shard_specs(parameters)
            self._refresh = partial(reshard, model)
        self._origin: dict[str, Tensor] | None = None
        self.anchor = {name: self._anchored(p) for name, p in self.parameters.items()}

    def _anchored(self, parameter: Tensor) -> Tensor:
        held = self._hold(parameter.detach())
        if held.is_cuda and self._device == torch.device("cpu"):
            # page-locked memory copies back to the GPU faster
            return torch.empty(held.shape, dtype=torch.float32, pin_memory=True).copy_(held)
        return held.to(device=self._device, dtype=torch.float32, copy=True)

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move further parameters too; their present values become their anchor.

        Not under DeepSpeed, whose masters are fixed.
        """
        self.numel += sum(shape_of(p).numel() for p in parameters.values())
        self.parameters |= parameters
        self.shares |= shard_specs(parameters)
        self.anchor |= {name: self._anchored(p) for name, p in parameters.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank: the anchor and, during a search, the origin."""
        return sum(local_shard(t).nbytes for tensors in (self.anchor, self._origin or {}) for t in tensors.values())

    @property
    def origin(self) -> dict[str, Tensor]:
        """Weights at the start of the search."""
        assert self._origin is not None, "begin() must come before move_to/restore/commit"
        return self._origin

    @torch.no_grad()
    def checksum(self) -> int:
        """CRC-32 over the bit sums of the parameters; equal on ranks with equal weights.

        Sharded parameters enter as the shards of this rank's replica. With only one replica they
        are left out, because no other rank holds a copy to compare with. Integer sums do not
        depend on the order of summation, so equal weights always agree.
        """

        def crc(parameters: Iterable[Tensor]) -> int:
            return functools.reduce(lambda so_far, p: zlib.crc32(str(bit_sum(p)).encode(), so_far), parameters, 0)

        whole = crc(p.detach() for name, p in self.parameters.items() if name not in self.shares)
        if not self.shares or next(iter(self.shares.values())).parts == world_size():
            return whole
        share = next(iter(self.shares.values()))
        gathered = all_gather_object(
            (share.replica, share.part, crc(local_shard(self.parameters[name].detach()) for name in self.shares))
        )
        shards = sorted((part, value) for replica, part, value in gathered if replica == share.replica)
        return zlib.crc32(str([whole, *shards]).encode())

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the current weights as the origin."""
        self._origin = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the origin, bit for bit."""
        for name, tensor in self.origin.items():
            local_shard(self.parameters[name]).copy_(local_shard(tensor))
        self.edited()

    def edited(self) -> None:
        """Show in-place edits to the forward pass. Call after every edit of the parameters."""
        if self.shares:
            self._refresh()

    def restore_unless(self, finite: bool, point: str, where: str) -> None:
        """Keep the edits if they are finite on all ranks, otherwise restore the origin.

        Args:
            finite: whether this rank's edits are finite.
            point, where: terms for the point and the tensor in the error message.

        Raises:
            NonFiniteWeightsError: the edits of some rank are not finite.
        """
        if not all(all_gather_object(finite)):
            self.restore()
            raise NonFiniteWeightsError(
                f"{point} is not finite in {'a parameter of another rank' if finite else where}; the candidate is "
                "rejected and the weights are restored."
            )
        self.edited()

    def abort(self) -> None:
        """Restore and drop the origin, if there is one; the anchor is unchanged."""
        if self._origin is not None:
            self.restore()
            self._origin = None

    @torch.no_grad()
    def commit(self) -> None:
        """Drop the origin and make the current weights the anchor."""
        assert self.origin is not None
        self._origin = None
        for name, parameter in self.parameters.items():
            self.anchor[name].copy_(self._hold(parameter.detach()))

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's anchor, fp32, by parameter name."""
        return dict(self.anchor)

    @torch.no_grad()
    def load_state_dict(self, anchor: Mapping[str, Tensor]) -> None:
        """Load a saved anchor. All tensors are checked before any is copied.

        Raises:
            WeightsError: a tensor is missing or unexpected, has the wrong shape, or is not finite.
        """
        anchor = {plain_name(name): tensor for name, tensor in anchor.items()}  # names can include wrappers
        missing, extra = set(self.anchor) - set(anchor), set(anchor) - set(self.anchor)
        if missing or extra:
            raise WeightsError(
                f"the saved anchor does not fit the selected parameters: missing {sorted(missing)[:3]} "
                f"({len(missing)} in total), unexpected {sorted(extra)[:3]} ({len(extra)} in total). Resume with "
                "the same model and the same `parameters` rule."
            )
        for name, tensor in anchor.items():
            if tensor.shape != self.anchor[name].shape:
                raise WeightsError(
                    f"saved anchor of '{name}' has shape {tuple(tensor.shape)}, expected "
                    f"{tuple(self.anchor[name].shape)}. Resume with the same model."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise WeightsError(f"saved anchor of '{name}' is not finite; the checkpoint is damaged.")
        for name, tensor in anchor.items():
            self.anchor[name].copy_(tensor)


class HoldsAnchored:
    """The part of `MovableWeights` that `AnchoredParameters` answers."""

    _anchored: AnchoredParameters

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that move."""
        return self._anchored.names

    @property
    def numel(self) -> int:
        """Number of elements that move."""
        return self._anchored.numel

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank: the anchor and, during a search, the origin."""
        return self._anchored.nbytes

    def checksum(self) -> int:
        """See `AnchoredParameters.checksum`."""
        return self._anchored.checksum()

    def restore(self) -> None:
        """Restore the origin, bit for bit."""
        self._anchored.restore()

    def abort(self) -> None:
        """End the search and restore the origin; the anchor is unchanged. Safe to call twice."""
        self._anchored.abort()

    def commit(self) -> None:
        """End the search and make the current weights the anchor."""
        self._anchored.commit()

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor, fp32, by parameter name; see `AnchoredParameters.state_dict`."""
        return self._anchored.state_dict()

    def load_state_dict(self, anchor: Mapping[str, Tensor]) -> None:
        """Load a saved anchor; see `AnchoredParameters.load_state_dict`."""
        self._anchored.load_state_dict(anchor)
