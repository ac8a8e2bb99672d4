"""Moving a model that is being trained, and putting it back bit for bit.

One class owns every edit of live parameters. Candidates come from the closed form W + s·Δ, never from the previous
candidate, so rounding does not accumulate; the origin is kept in the parameters' own dtype, so a rejected search
leaves no trace. LoRA adapters, whose update B·A is not linear in A and B, are moved by `lora_weights`. Left out on purpose:
DeepSpeed ZeRO (the masters live in the optimizer), refused with a typed error rather than moved wrongly.
"""

from __future__ import annotations

import functools
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from effopd.common.distributed import ShardSpec, all_gather_object, local_shard, reshard, shard_specs, world_size
from effopd.common.float64 import for_float64
from effopd.errors import ConfigError, NonFiniteWeightsError, WeightsError
from effopd.extrapolate.parameter_rules import inside, plain_name, select, trained_parameters

logger = logging.getLogger(__name__)

#: (parameter name, origin W, anchor), both fp32 on the parameter's device → direction D of its shape, fp32.
Direction = Callable[[str, Tensor, Tensor], Tensor]


def displacement(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
    """Δ = W − anchor, the paper's direction."""
    return origin - anchor


def bit_sum(tensor: Tensor) -> int:
    """The bits of a floating-point tensor, read as integers and added up; NaN and infinity too."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def on_host(values: Iterable[Tensor]) -> list[float]:
    """Scalars of one or several devices as numbers, with one wait for each device instead of one for each scalar."""
    values = list(values)
    found: dict[int, float] = {}
    for device in {value.device for value in values}:
        places = [i for i, value in enumerate(values) if value.device == device]
        found |= zip(places, torch.stack([values[i] for i in places]).tolist(), strict=True)
    return [found[i] for i in range(len(values))]


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
        f"EffOPDConfig.anchor_device={name!r} cannot hold the anchor ({str(error).splitlines()[0]}). Use 'cpu', a device of this "
        "machine such as 'cuda:0', or leave it out: the anchor is then beside the parameters."
    )


class LiveWeights:
    """The selected trained parameters of a live model, with an fp32 anchor and a movable position.

    Life of a search: `begin()` remembers the origin W; `move_to(s)` puts the model at W + s·D, any number of times, with
    D = W − anchor unless `begin` was given another direction; `restore()` puts W back; `commit()` ends the search where
    the model stands and makes that the new anchor.

    Memory: the anchor (fp32) for the whole run, plus one copy in the parameters' dtype between `begin` and `commit`,
    plus, unless everything is fp32 along Δ, fp32 temporaries of the largest tensor. Directions are recomputed for every
    candidate, never stored.

    Args:
        model: any module; parameters have the same names inside DDP, `torch.compile` and other wrappers.
        parameters: a rule of `PARAMETER_RULES` or a regular expression.
        anchor_device: device of the anchor; `None` keeps each tensor beside its parameter.

    Raises:
        ConfigError: nothing matches the rule, or the anchor cannot live on that device.
        WeightsError: a selected parameter is not floating point.
    """

    def __init__(self, model: nn.Module, parameters: str = "attention+mlp", anchor_device: str | None = None):
        device = usable_device(anchor_device)
        reshard(model)  # after a forward, FSDP2 may still have its gathered copies in the parameters' place
        trained = trained_parameters(model)
        self._parameters = {name: trained[name] for name in select(trained, parameters, type(inside(model)).__name__)}
        stay = [name for name in trained if name not in self._parameters]
        logger.info(
            "EffOPD moves %.1f %% of the trained numbers; %d parameters stay%s.",
            100 * self.numel / sum(p.numel() for p in trained.values()), len(stay), f", such as {', '.join(stay[:3])}" if stay else "",
        )  # fmt: skip
        self._model = model
        self._shares = shard_specs(self._parameters)
        for name, parameter in self._parameters.items():
            if not parameter.is_floating_point():
                raise WeightsError(
                    f"parameter '{name}' has dtype {parameter.dtype}: expected floating point. Quantised weights "
                    "cannot be moved; exclude them with `parameters`."
                )
        low = sorted(
            {str(p.dtype) for p in self._parameters.values() if p.dtype not in (torch.float32, torch.float64)}
        )
        if low:
            logger.warning(
                "EffOPD moves %s weights: at small learning rates most of an update is lost in their rounding, and "
                "candidates are nearly the same model. Keep the trained weights in float32 (TRL's default).",
                ", ".join(low),
            )
        self._anchor_device = device
        self._origin: dict[str, torch.Tensor] | None = None
        self._direction: Direction = displacement
        self._anchor = {name: self._to_anchor(p) for name, p in self._parameters.items()}

    def _to_anchor(self, parameter: torch.Tensor) -> torch.Tensor:
        held = self._held(parameter)
        if held.is_cuda and self._anchor_device == torch.device("cpu"):
            # page-locked, so that it comes back at the link's speed
            return torch.empty(held.shape, dtype=torch.float32, pin_memory=True).copy_(held)
        return held.to(device=self._anchor_device, dtype=torch.float32, copy=True)

    def _held(self, parameter: torch.Tensor) -> torch.Tensor:
        """What of a parameter the anchor has on this rank."""
        return local_shard(parameter.detach())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that move."""
        return tuple(self._parameters)

    @property
    def numel(self) -> int:
        """How many numbers move."""
        return sum(p.numel() for p in self._parameters.values())

    @property
    def sharded(self) -> dict[str, ShardSpec]:
        """This rank's share of every parameter of whose anchor it holds a part only."""
        return self._shares

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank: the fp32 anchor and, during a search, the copy that it comes back to."""
        return sum(local_shard(t).nbytes for tensors in (self._anchor, self._origin or {}) for t in tensors.values())

    @torch.no_grad()
    def displacement_norm(self) -> float:
        """‖W − anchor‖ over all selected parameters (Frobenius, accumulated in float64), over all ranks."""
        norms = {
            name: torch.linalg.vector_norm(for_float64(delta), dtype=torch.float64)
            for name, delta in self.displacements()
        }
        squares = {True: 0.0, False: 0.0}
        for name, norm in zip(norms, on_host(norms.values()), strict=True):
            squares[name in self._shares] += norm**2
        if self._shares:
            replicas = world_size() // next(iter(self._shares.values())).parts
            squares[True] = math.fsum(all_gather_object(squares[True])) / replicas
        return (squares[True] + squares[False]) ** 0.5

    @torch.no_grad()
    def displacements(self) -> Iterator[tuple[str, Tensor]]:
        """(name, W − anchor in fp32), one parameter at a time; of sharded parameters this rank's part."""
        for name, parameter in self._parameters.items():
            here = local_shard(parameter.detach())
            yield name, here.float() - self._anchor[name].to(here.device, non_blocking=True)

    @torch.no_grad()
    def checksum(self) -> int:
        """CRC-32 over the sums of bits of the parameters that every rank should hold alike; of sharded ones over those of all
        shards of this rank's replica, if there are several, and 0 if all are sharded once (a shard is nobody's copy).

        Sums of integers do not depend on the order in which a device adds them up, so equal weights always agree.
        """

        def crc(parameters: Iterable[Tensor]) -> int:
            return functools.reduce(lambda so_far, p: zlib.crc32(str(bit_sum(p)).encode(), so_far), parameters, 0)

        found = crc(p.detach() for name, p in self._parameters.items() if name not in self._shares)
        if not self._shares or next(iter(self._shares.values())).parts == world_size():
            return found
        mine = next(iter(self._shares.values()))
        everybody = all_gather_object(
            (mine.replica, mine.part, crc(local_shard(self._parameters[name].detach()) for name in self._shares))
        )
        shards = sorted((part, value) for replica, part, value in everybody if replica == mine.replica)
        return zlib.crc32(str([found, *shards]).encode())

    @torch.no_grad()
    def begin(self, direction: Direction = displacement) -> None:
        """Remember the present weights as the origin of a search along `direction`."""
        self._direction = direction
        self._origin = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def move_to(self, scale: float) -> None:
        """Put the model at origin + scale · direction, computed in fp32; scale 0 is the origin, bit for bit.

        Raises:
            NonFiniteWeightsError: the point contains NaN or infinity. The model is back at the origin then.
        """
        origin = self._require_origin()
        if scale == 0.0:
            self.restore()
            return
        spread: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            here, start = local_shard(parameter), local_shard(origin[name])
            anchor = self._anchor[name].to(here.device, non_blocking=True)
            if self._direction is displacement and here.dtype == torch.float32:
                torch.lerp(anchor, start, 1.0 + scale, out=here)  # W + s(W − A) in one pass, without a temporary
            else:
                here.copy_(torch.add(start.float(), self._direction(name, start.float(), anchor), alpha=scale))
            if here.numel():  # a shard may be empty
                low, high = torch.aminmax(here)  # both pass NaN on; their difference is finite where all between is
                spread[name] = high - low
        bad = next(
            (n for n, value in zip(spread, on_host(spread.values()), strict=True) if not math.isfinite(value)), None
        )
        self._reject_unless(bad is None, f"W + {scale}·D", f"parameter '{bad}'")
        self._edited()

    def _reject_unless(self, finite: bool, point: str, where: str) -> None:
        """A point that is not finite on one rank is no point on any."""
        if not all(all_gather_object(finite)):
            self.restore()
            raise NonFiniteWeightsError(
                f"{point} is not finite in {'a parameter of another rank' if finite else where}; the candidate is rejected "
                "and the weights are restored."
            )

    def _edited(self) -> None:
        if self._shares:
            reshard(self._model)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the origin back, bit for bit."""
        for name, tensor in self._require_origin().items():
            local_shard(self._parameters[name]).copy_(local_shard(tensor))
        self._edited()

    def abort(self) -> None:
        """Leave a search without a trace: restore the origin and forget it; the anchor stays. Safe to call twice."""
        if self._origin is not None:
            self.restore()
            self._origin = None

    @torch.no_grad()
    def commit(self) -> None:
        """End the search where the model stands now; these weights become the anchor of the next search."""
        self._require_origin()
        self._origin = None
        for name, parameter in self._parameters.items():
            self._anchor[name].copy_(self._held(parameter))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The anchor, fp32, by parameter name; of sharded parameters this rank's part."""
        return dict(self._anchor)

    @torch.no_grad()
    def load_state_dict(self, anchor: Mapping[str, torch.Tensor]) -> None:
        """Take over a saved anchor. All names and shapes are checked before anything is touched.

        Raises:
            WeightsError: a tensor is missing, unexpected, mis-shaped or non-finite.
        """
        anchor = {plain_name(name): tensor for name, tensor in anchor.items()}  # saved with a wrapper's names
        missing, extra = set(self._anchor) - set(anchor), set(anchor) - set(self._anchor)
        if missing or extra:
            raise WeightsError(
                f"the saved anchor does not fit the selected parameters: missing {sorted(missing)[:3]} "
                f"({len(missing)} in all), unexpected {sorted(extra)[:3]} ({len(extra)} in all). Resume with the same "
                "model and the same `parameters` rule."
            )
        for name, tensor in anchor.items():
            if tensor.shape != self._anchor[name].shape:
                raise WeightsError(
                    f"saved anchor of '{name}' has shape {tuple(tensor.shape)}, expected "
                    f"{tuple(self._anchor[name].shape)}. Resume with the same model."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise WeightsError(f"saved anchor of '{name}' is not finite; the checkpoint is damaged.")
        for name, tensor in anchor.items():
            self._anchor[name].copy_(tensor)

    def _require_origin(self) -> dict[str, torch.Tensor]:
        assert self._origin is not None, "begin() must come before move_to/restore/commit"
        return self._origin
