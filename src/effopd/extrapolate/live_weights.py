"""Moving a model that is being trained, and putting it back bit for bit.

One class owns every edit of full parameters. Candidates come from the closed form W + s·Δ, never
from the previous candidate, so rounding does not accumulate; the origin is kept in the parameters'
own dtype, so a rejected search leaves no trace. LoRA adapters, whose update B·A is not linear in A
and B, are moved by `lora_weights`. Left out on purpose: DeepSpeed ZeRO (the masters live in the
optimizer), refused with a typed error rather than moved wrongly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from effopd.common.distributed import ShardSpec, all_gather_object, local_shard, reshard, world_size
from effopd.common.float64 import for_float64
from effopd.errors import WeightsError
from effopd.extrapolate.anchored import AnchoredParameters, usable_device
from effopd.extrapolate.movable import Direction, displacement
from effopd.extrapolate.parameter_rules import inside, select, trained_parameters

logger = logging.getLogger(__name__)


def on_host(values: Iterable[Tensor]) -> list[float]:
    """Scalars of one or several devices as numbers, with one wait for each device instead of one
    for each scalar.
    """
    values = list(values)
    found: dict[int, float] = {}
    for device in {value.device for value in values}:
        places = [i for i, value in enumerate(values) if value.device == device]
        found |= zip(places, torch.stack([values[i] for i in places]).tolist(), strict=True)
    return [found[i] for i in range(len(values))]


class LiveWeights:
    """The selected trained parameters of a live model: `MovableWeights` for full matrices.

    Memory: that of `AnchoredParameters`, plus, unless everything is fp32 along Δ, fp32 temporaries
    of the largest tensor. Directions are recomputed for every candidate, never stored.

    Args:
        model: any module; parameters have the same names inside DDP, `torch.compile` and other
            wrappers.
        parameters: a rule of `PARAMETER_RULES` or a regular expression.
        anchor_device: device of the anchor; `None` keeps each tensor beside its parameter.

    Raises:
        ConfigError: nothing matches the rule, or the anchor cannot live on that device.
        WeightsError: a selected parameter is not floating point.
    """

    #: Every point can be held.
    lost_share: float | None = None

    def __init__(self, model: nn.Module, parameters: str = "attention+mlp", anchor_device: str | None = None):
        device = usable_device(anchor_device)
        reshard(model)  # after a forward, FSDP2 may still have its gathered copies in the parameters' place
        trained = trained_parameters(model)
        moved = {name: trained[name] for name in select(trained, parameters, type(inside(model)).__name__)}
        stay = [name for name in trained if name not in moved]
        logger.info(
            "EffOPD moves %.1f %% of the trained numbers; %d parameters stay%s.",
            100 * sum(p.numel() for p in moved.values()) / sum(p.numel() for p in trained.values()),
            len(stay),
            f", such as {', '.join(stay[:3])}" if stay else "",
        )
        for name, parameter in moved.items():
            if not parameter.is_floating_point():
                raise WeightsError(
                    f"parameter '{name}' has dtype {parameter.dtype}: expected floating point. Quantised weights "
                    "cannot be moved; exclude them with `parameters`."
                )
        low = sorted({str(p.dtype) for p in moved.values() if p.dtype not in (torch.float32, torch.float64)})
        if low:
            logger.warning(
                "EffOPD moves %s weights: at small learning rates most of an update is lost in their rounding, and "
                "candidates are nearly the same model. Keep the trained weights in float32 (TRL's default).",
                ", ".join(low),
            )
        self._anchored = AnchoredParameters(model, moved, device, local_shard)
        self._direction: Direction = displacement

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that move."""
        return self._anchored.names

    @property
    def numel(self) -> int:
        """How many numbers move."""
        return self._anchored.numel

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank: the fp32 anchor and, during a search, one copy
        of the weights.
        """
        return self._anchored.nbytes

    def checksum(self) -> int:
        """As `AnchoredParameters.checksum`."""
        return self._anchored.checksum()

    def restore(self) -> None:
        """Put the origin back, bit for bit."""
        self._anchored.restore()

    def abort(self) -> None:
        """Leave a search without a trace: restore the origin and forget it; the anchor stays. Safe
        to call twice.
        """
        self._anchored.abort()

    def commit(self) -> None:
        """End the search where the model stands now; these weights become the anchor of the next
        search.
        """
        self._anchored.commit()

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor, fp32, by parameter name; of sharded parameters this rank's part."""
        return self._anchored.state_dict()

    def load_state_dict(self, anchor: Mapping[str, Tensor]) -> None:
        """Take over a saved anchor; see `AnchoredParameters.load_state_dict`."""
        self._anchored.load_state_dict(anchor)

    @property
    def sharded(self) -> dict[str, ShardSpec]:
        """This rank's share of every parameter of whose anchor it holds a part only."""
        return self._anchored.shares

    @torch.no_grad()
    def displacement_norm(self) -> float:
        """‖W − anchor‖ over all selected parameters (Frobenius, accumulated in float64), over all
        ranks.
        """
        norms = {
            name: torch.linalg.vector_norm(for_float64(delta), dtype=torch.float64)
            for name, delta in self.displacements()
        }
        squares = {True: 0.0, False: 0.0}
        for name, norm in zip(norms, on_host(norms.values()), strict=True):
            squares[name in self.sharded] += norm**2
        if self.sharded:
            replicas = world_size() // next(iter(self.sharded.values())).parts
            squares[True] = math.fsum(all_gather_object(squares[True])) / replicas
        return (squares[True] + squares[False]) ** 0.5

    @torch.no_grad()
    def displacements(self) -> Iterator[tuple[str, Tensor]]:
        """(name, W − anchor in fp32), one parameter at a time; of sharded parameters this rank's
        part.
        """
        for name, parameter in self._anchored.parameters.items():
            here = local_shard(parameter.detach())
            yield name, here.float() - self._anchored.anchor[name].to(here.device, non_blocking=True)

    def begin(self, direction: Direction = displacement) -> None:
        """Remember the present weights as the origin of a search along `direction`."""
        self._direction = direction
        self._anchored.begin()

    @torch.no_grad()
    def move_to(self, scale: float) -> None:
        """Put the model at origin + scale · direction, computed in fp32; scale 0 is the origin, bit
        for bit.

        Raises:
            NonFiniteWeightsError: the point contains NaN or infinity. The model is back at the
                origin then.
        """
        anchored, origin = self._anchored, self._anchored.origin
        if scale == 0.0:
            self.restore()
            return
        spread: dict[str, Tensor] = {}
        for name, parameter in anchored.parameters.items():
            here, start = local_shard(parameter), local_shard(origin[name])
            anchor = anchored.anchor[name].to(here.device, non_blocking=True)
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
        anchored.restore_unless(bad is None, f"W + {scale}·D", f"parameter '{bad}'")
