"""Parameters of a live model with an fp32 anchor, and an origin to come back to bit for bit."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from effopd.common.distributed import all_gather_object, local_shard, reshard, shard_specs, world_size
from effopd.errors import ConfigError, NonFiniteWeightsError, WeightsError
from effopd.extrapolate.parameter_rules import plain_name


def bit_sum(tensor: Tensor) -> int:
    """The bits of a floating-point tensor, read as integers and added up; NaN and infinity too."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def named_device(name: str | None) -> torch.device | None:
    """The device that a name says, whether or not this machine has it; `None`: with the parameters.

    Raises:
        ConfigError: no name of a device, or one that holds no numbers (`meta`).
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
    """As `named_device`, and this machine has it.

    Raises:
        ConfigError: as `named_device`; or the device is not there.
    """
    device = named_device(name)
    if device is not None:
        try:
            torch.empty(1, device=device)
        except Exception as error:  # each backend raises its own
            raise _no_device(name, error) from error
    return device


def _no_device(name: str | None, error: Exception) -> ConfigError:
    return ConfigError(
        f"EffOPDConfig.anchor_device={name!r} cannot hold the anchor "
        f"({str(error).splitlines()[0]}). Use 'cpu', a device of this "
        "machine such as 'cuda:0', or leave it out: the anchor is then beside the parameters."
    )


class AnchoredParameters:
    """Parameters, their anchor, and during a search their origin.

    Memory: the anchor (fp32) for the whole run, plus one copy in the parameters' dtype between
    `begin` and `commit`.

    Args:
        model: the model that holds them.
        parameters: by name.
        device: of the anchor; `None` keeps each tensor beside its parameter.
        hold: what of a parameter the anchor has on this rank.

    Attributes:
        parameters: by name.
        anchor: fp32, by name.
        shares: this rank's share of every sharded parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device | None,
        hold: Callable[[Tensor], Tensor],
    ):
        self._model, self._device, self._hold = model, device, hold
        self.parameters = dict(parameters)
        self.shares = shard_specs(self.parameters)
        self._origin: dict[str, Tensor] | None = None
        self.anchor = {name: self._anchored(p) for name, p in self.parameters.items()}

    def _anchored(self, parameter: Tensor) -> Tensor:
        held = self._hold(parameter.detach())
        if held.is_cuda and self._device == torch.device("cpu"):
            # page-locked, so that it comes back at the link's speed
            return torch.empty(held.shape, dtype=torch.float32, pin_memory=True).copy_(held)
        return held.to(device=self._device, dtype=torch.float32, copy=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.parameters)

    @property
    def numel(self) -> int:
        """How many numbers they have."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank: the fp32 anchor and, during a search, the
        origin.
        """
        return sum(local_shard(t).nbytes for tensors in (self.anchor, self._origin or {}) for t in tensors.values())

    @property
    def origin(self) -> dict[str, Tensor]:
        """The weights that the search started from."""
        assert self._origin is not None, "begin() must come before move_to/restore/commit"
        return self._origin

    @torch.no_grad()
    def checksum(self) -> int:
        """CRC-32 over the sums of bits of the parameters that every rank should hold alike; of
        sharded ones over those of all shards of this rank's replica, if there are several, and 0 if
        all are sharded once (a shard is nobody's copy).

        Sums of integers do not depend on the order in which a device adds them up, so equal weights
        always agree.
        """

        def crc(parameters: Iterable[Tensor]) -> int:
            return functools.reduce(lambda so_far, p: zlib.crc32(str(bit_sum(p)).encode(), so_far), parameters, 0)

        whole = crc(p.detach() for name, p in self.parameters.items() if name not in self.shares)
        if not self.shares or next(iter(self.shares.values())).parts == world_size():
            return whole
        mine = next(iter(self.shares.values()))
        everybody = all_gather_object(
            (mine.replica, mine.part, crc(local_shard(self.parameters[name].detach()) for name in self.shares))
        )
        shards = sorted((part, value) for replica, part, value in everybody if replica == mine.replica)
        return zlib.crc32(str([whole, *shards]).encode())

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the present weights as the origin."""
        self._origin = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the origin back, bit for bit."""
        for name, tensor in self.origin.items():
            local_shard(self.parameters[name]).copy_(local_shard(tensor))
        self.edited()

    def edited(self) -> None:
        """After every edit of the parameters in place."""
        if self.shares:
            reshard(self._model)

    def restore_unless(self, finite: bool, point: str, where: str) -> None:
        """Keep the edits if they are finite on every rank.

        Args:
            finite: whether this rank's are.
            point, where: for the message.

        Raises:
            NonFiniteWeightsError: they are not on some rank. The origin is back then.
        """
        if not all(all_gather_object(finite)):
            self.restore()
            raise NonFiniteWeightsError(
                f"{point} is not finite in "
                f"{'a parameter of another rank' if finite else where}; the candidate is "
                "rejected "
                "and the weights are restored."
            )
        self.edited()

    def abort(self) -> None:
        """Restore the origin, if there is one, and forget it; the anchor stays."""
        if self._origin is not None:
            self.restore()
            self._origin = None

    @torch.no_grad()
    def commit(self) -> None:
        """Forget the origin; the present weights become the anchor."""
        assert self.origin is not None
        self._origin = None
        for name, parameter in self.parameters.items():
            self.anchor[name].copy_(self._hold(parameter.detach()))

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor, fp32, by parameter name; of sharded parameters what `hold` keeps of them."""
        return dict(self.anchor)

    @torch.no_grad()
    def load_state_dict(self, anchor: Mapping[str, Tensor]) -> None:
        """Take over a saved anchor. All names and shapes are checked before anything is touched.

        Raises:
            WeightsError: a tensor is missing, unexpected, mis-shaped or non-finite.
        """
        anchor = {plain_name(name): tensor for name, tensor in anchor.items()}  # saved with a wrapper's names
        missing, extra = set(self.anchor) - set(anchor), set(anchor) - set(self.anchor)
        if missing or extra:
            raise WeightsError(
                f"the saved anchor does not fit the selected parameters: missing {sorted(missing)[:3]} "
                f"({len(missing)} in all), unexpected {sorted(extra)[:3]} ({len(extra)} in all). Resume with the same "
                "model and the same `parameters` rule."
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
