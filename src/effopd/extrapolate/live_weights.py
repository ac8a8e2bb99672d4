"""`LiveWeights`: move the full weights of a model in training, and restore them bit for bit.

Each candidate is computed as W + s·Δ from the origin, never from the previous candidate, so
rounding errors do not accumulate. The origin keeps the parameters' dtype, so it is restored
exactly.

LoRA adapters are in `lora_weights`, because B·A is not linear in A and B. Under DeepSpeed ZeRO, the
fp32 masters in the optimizer move, and the model's copies follow (`effopd.common.zero`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effopd.common.distributed import ShardSpec, all_gather_object, local_shard, reshard, world_size
from effopd.common.float64 import for_float64
from effopd.common.zero import is_zero, shape_of
from effopd.errors import WeightsError
from effopd.extrapolate.anchored import AnchoredParameters, HoldsAnchored, usable_device
from effopd.extrapolate.movable import Direction, displacement
from effopd.extrapolate.parameter_rules import compile_rule, inside, select, trained_parameters

logger = logging.getLogger(__name__)


def on_host(values: Iterable[Tensor]) -> list[float]:
    """Scalar tensors as Python numbers, with one synchronization per device."""
    values = list(values)
    numbers: dict[int, float] = {}
    for device in {value.device for value in values}:
        places = [i for i, value in enumerate(values) if value.device == device]
        numbers |= zip(places, torch.stack([values[i] for i in places]).tolist(), strict=True)
    return [numbers[i] for i in range(len(values))]


class LiveWeights(HoldsAnchored):
    """Selected trained parameters of a live model: `MovableWeights` for full matrices.

    Memory: that of `AnchoredParameters`, plus fp32 temporaries of the largest tensor unless an fp32
    model moves along Δ. Directions are recomputed for every candidate, not stored.

    Args:
        model: the model; parameter names do not depend on DDP, `torch.compile` and other wrappers.
        parameters: a rule of `PARAMETER_RULES` or a regular expression.
        anchor_device: device of the anchor; `None`: the device of each parameter.
        optimizer: the optimizer; required under DeepSpeed.

    Raises:
        ConfigError: nothing matches the rule, the device cannot hold the anchor, or DeepSpeed holds
            masters that cannot be moved (`effopd.common.zero.masters`).
        WeightsError: a selected parameter is not floating point.
    """

    #: Full matrices can represent every point.
    lost_share: float | None = None

    def __init__(
        self,
        model: nn.Module,
        parameters: str = "attention+mlp",
        anchor_device: str | None = None,
        optimizer: Any = None,
    ):
        device = usable_device(anchor_device)
        reshard(model)  # after a forward pass, FSDP2 can still hold gathered parameters
        trained = trained_parameters(model)
        moved = {name: trained[name] for name in select(trained, parameters, type(inside(model)).__name__)}
        stay = [name for name in trained if name not in moved]
        logger.info(
            "EffOPD moves %.1f %% of the trained weights; %d parameters stay%s.",
            100
            * sum(shape_of(p).numel() for p in moved.values())
            / sum(shape_of(p).numel() for p in trained.values()),
            len(stay),
            f", such as {', '.join(stay[:3])}" if stay else "",
        )
        for name, parameter in moved.items():
            if not parameter.is_floating_point():
                raise WeightsError(
                    f"parameter '{name}' has dtype {parameter.dtype}: expected floating point. Quantized weights "
                    "cannot be moved; exclude them with EffOPDConfig.parameters."
                )
        self._anchored = AnchoredParameters(model, moved, device, local_shard, optimizer)
        held = self._anchored.parameters.values()
        low = sorted({str(p.dtype) for p in held if p.dtype not in (torch.float32, torch.float64)})
        if low:
            logger.warning(
                "EffOPD moves %s weights. At small learning rates, rounding loses most of an update, and all "
                "candidates are nearly the same model. Keep the trained weights in float32 (TRL's default).",
                ", ".join(low),
            )
        self._direction: Direction = displacement
        self._model, self._rule = model, compile_rule(parameters)

    def unfrozen(self) -> dict[str, nn.Parameter]:
        """Parameters that the rule selects and that are trained only since the construction."""
        held = set(self.names)
        return {
            name: p for name, p in trained_parameters(self._model).items() if name not in held and self._moves(name, p)
        }

    def _moves(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether an unfrozen parameter can move; optimizers of DeepSpeed do not train it."""
        return bool(self._rule.search(name)) and parameter.is_floating_point() and not is_zero(parameter)

    def take_unfrozen(self, only: Collection[str] | None = None) -> tuple[str, ...]:
        """Move the unfrozen parameters from now on, with their present values as the anchor.

        Args:
            only: names of the parameters; `None`: all.
        """
        if not self.unfrozen():
            return ()
        reshard(self._model)  # it can replace the objects
        new = {name: p for name, p in self.unfrozen().items() if only is None or name in only}
        self._anchored.add(new)
        return tuple(new)

    @property
    def sharded(self) -> dict[str, ShardSpec]:
        """This rank's shard of every sharded parameter."""
        return self._anchored.shares

    @torch.no_grad()
    def displacement_norm(self) -> float:
        """‖W − anchor‖ (Frobenius, in float64) over the selected parameters, all ranks together."""
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
    def displacements(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, W − anchor in fp32), one parameter at a time; this rank's shard if sharded, which
        is flat under DeepSpeed.
        """
        for name, parameter in self._anchored.parameters.items():
            if only is not None and name not in only:
                continue
            shard = local_shard(parameter.detach())
            yield name, shard.float() - self._anchored.anchor[name].to(shard.device, non_blocking=True)

    def begin(self, direction: Direction = displacement) -> None:
        """Copy the current weights as the origin of a search along `direction`."""
        self._direction = direction
        self._anchored.begin()

    @torch.no_grad()
    def move_to(self, scale: float) -> None:
        """Set the weights to origin + scale · direction, computed in fp32.

        Scale 0 is the origin, bit for bit.

        Raises:
            NonFiniteWeightsError: the point contains NaN or infinity; the origin is restored.
        """
        anchored, origin = self._anchored, self._anchored.origin
        if scale == 0.0:
            self.restore()
            return
        spread: dict[str, Tensor] = {}
        for name, parameter in anchored.parameters.items():
            shard, start = local_shard(parameter), local_shard(origin[name])
            anchor = anchored.anchor[name].to(shard.device, non_blocking=True)
            if self._direction is displacement and shard.dtype == torch.float32:
                torch.lerp(anchor, start, 1.0 + scale, out=shard)  # W + s(W − A) in one pass, without a temporary
            else:
                shard.copy_(torch.add(start.float(), self._direction(name, start.float(), anchor), alpha=scale))
            if shard.numel():  # a shard can be empty
                low, high = torch.aminmax(shard)  # NaN propagates, so a finite difference means finite elements
                spread[name] = high - low
        bad = next(
            (n for n, value in zip(spread, on_host(spread.values()), strict=True) if not math.isfinite(value)), None
        )
        anchored.restore_unless(bad is None, f"W + {scale}·D", f"parameter '{bad}'")
