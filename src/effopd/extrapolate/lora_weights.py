r"""`LoraWeights`: move LoRA factors to the best rank-r approximation of W + s·ΔW.

The update of one matrix is scaling · B A, which is not linear in (B, A). With factors (B, A) now
and (B_a, A_a) at the anchor, the point on the ray is

$$ P(s) = (1+s) B A - s B_a A_a = [B, B_a] \begin{bmatrix} (1+s) A \\ -s A_a \end{bmatrix}, $$

of rank at most 2r. Two thin QRs and the SVD of a 2r × 2r core give its best rank-r approximation
(Eckart–Young) without forming an m × n matrix. The part that is lost is reported as a share of the
jump. The base weights, quantized or not, are never changed.

Among all factorizations of the approximation U S Vᵀ, the one with A' nearest to the current A is
used, so that the optimizer's moments stay meaningful: A' = M Vᵀ + (I − M M⁺) A and B' = U S M⁺ with
M = A V. At s = 0 this gives (B, A) again. Directions of A that the point does not use remain
available to training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from effopd.common.distributed import ShardSpec, copy_full_, full_tensor, reshard
from effopd.errors import ConfigError
from effopd.extrapolate.anchored import AnchoredParameters, HoldsAnchored, usable_device
from effopd.extrapolate.movable import Direction, displacement
from effopd.extrapolate.parameter_rules import inside, plain_name, select

logger = logging.getLogger(__name__)

#: Singular values below this share of the largest are rounding.
_ROUNDING = 1e-6
#: Balanced factors replace the nearest ones if σ_min(A V) / ‖A‖₂ is below this: the new row space
#: is then nearly orthogonal to a direction of A.
_TOO_FAR = 1e-4


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is a PEFT model."""
    return bool(getattr(inside(model), "peft_config", None))


def _core(b_mk: Tensor, a_kn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B A from thin QRs: U [m, k], S [k], V [n, k]."""
    q_left, r_left = torch.linalg.qr(b_mk)
    q_right, r_right = torch.linalg.qr(a_kn.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    k = len(s)
    return q_left @ u[:, :k], s, q_right @ vh[:k].T


def move_factors(
    a_rn: Tensor, b_mr: Tensor, anchor_a_rn: Tensor, anchor_b_mr: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-r factors of (1+s) B A − s B_a A_a with A' nearest to A, see the module.

    Args:
        a_rn, b_mr: current factors, fp32.
        anchor_a_rn, anchor_b_mr: factors at the anchor, fp32.
        scale: s.

    Returns:
        A' [r, n], B' [m, r], and the Frobenius norm of the part that rank r cannot represent.
    """
    rank = a_rn.shape[0]
    left = torch.cat([b_mr, anchor_b_mr], dim=1)
    right = torch.cat([(1 + scale) * a_rn, -scale * anchor_a_rn], dim=0)
    u, s, v = _core(left, right)
    lost = s[rank:].norm()
    used = min(rank, int((s > _ROUNDING * s[0]).sum())) if s[0] > 0 else 0
    us, v = u[:, :used] * s[:used], v[:, :used]
    m = a_rn @ v
    if used and float(torch.linalg.matrix_norm(m, -2)) < _TOO_FAR * float(torch.linalg.matrix_norm(a_rn, 2)):
        root = s[:used].sqrt()
        a, b = a_rn.clone(), torch.zeros_like(b_mr)
        a[:used], b[:, :used] = root[:, None] * v.T, us / root
        return a, b, lost
    inverse = torch.linalg.pinv(m)
    a = m @ v.T + a_rn - m @ (inverse @ a_rn)
    return a, us @ inverse, lost


class LoraWeights(HoldsAnchored):
    """LoRA factors of a PEFT model, moved along the update of every matrix: `MovableWeights`.

    Sharded factors (FSDP2) are gathered one matrix at a time. Their anchor is whole on every rank,
    because factors are small. The base weights do not change.

    Args:
        model: a PEFT model with one active LoRA adapter.
        parameters: a rule for the names of the adapted weights in the base model, such as
            `model.layers.0.mlp.up_proj.weight`.
        anchor_device: device of the anchor; `None`: the device of each factor.

    Attributes:
        lost_share: largest share of a matrix's last jump that rank r cannot represent (0–1).

    Raises:
        ConfigError: the adapter is not LoRA or its update is not scaling · B A, several adapters
            are active, or nothing is selected.
    """

    def __init__(self, model: nn.Module, parameters: str = "attention+mlp", anchor_device: str | None = None):
        device = usable_device(anchor_device)
        reshard(model)
        adapters = selected_adapters(model, parameters)
        self._scaling = {name: scaling for name, (_, scaling) in adapters.items()}
        factors_by_name: dict[str, nn.Parameter] = {}
        for name, (factors, _) in adapters.items():
            factors_by_name |= {f"{name}.A": factors[0], f"{name}.B": factors[1]}
        others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
        if others:
            logger.warning(
                "EffOPD moves only the LoRA factors; these trained parameters stay: %s%s.",
                ", ".join(others[:3]), ", …" if len(others) > 3 else "",
            )  # fmt: skip
        self.lost_share: float | None = 0.0
        self._lengths: dict[str, float] = {}
        self._anchored = AnchoredParameters(model, factors_by_name, device, full_tensor)

    @property
    def sharded(self) -> dict[str, ShardSpec]:
        """Empty: the anchor of the factors is whole on every rank."""
        return {}

    def unfrozen(self) -> dict[str, nn.Parameter]:
        """Empty: all factors move, frozen or not, and nothing else does."""
        return {}

    def take_unfrozen(self, only: Collection[str] | None = None) -> tuple[str, ...]:
        """Empty, see `unfrozen`."""
        return ()

    def _factors(self, source: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        device = self._anchored.parameters[f"{name}.A"].device
        a, b = (full_tensor(source[f"{name}.{factor}"].detach()).to(device, torch.float32) for factor in "AB")
        return a, b

    def _length(self, name: str) -> float:
        """‖B A − B_a A_a‖ (Frobenius, without scaling) of the current factors."""
        (a, b), (anchor_a, anchor_b) = (
            self._factors(at, name) for at in (self._anchored.parameters, self._anchored.anchor)
        )
        if torch.equal(a, anchor_a) and torch.equal(b, anchor_b):
            return 0.0  # exactly, without rounding error
        try:
            return float(_core(torch.cat([b, -anchor_b], dim=1), torch.cat([a, anchor_a], dim=0))[1].norm())
        except torch.linalg.LinAlgError:  # raised for NaN and infinity
            return math.nan

    @torch.no_grad()
    def displacement_norm(self) -> float:
        """‖ΔW − ΔW_anchor‖ (Frobenius, with scaling) over the selected matrices."""
        return math.hypot(*(scaling * self._length(name) for name, scaling in self._scaling.items()))

    def displacements(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Not supported: an adapter has no full matrices.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this strategy needs full matrices, but the model trains LoRA adapters. Choose another strategy, or train "
            "the full weights."
        )

    @torch.no_grad()
    def begin(self, direction: Direction = displacement) -> None:
        """Copy the current factors as the origin of a search along ΔW.

        Other directions are not supported, because rank r cannot represent them.
        """
        assert direction is displacement, "strategies that need full matrices are refused"
        self._anchored.begin()
        self._lengths = {name: self._length(name) for name in self._scaling}

    @torch.no_grad()
    def move_to(self, scale: float) -> None:
        """Set every adapted matrix to the rank-r approximation of W + s·ΔW.

        Scale 0 is the origin, bit for bit.

        Raises:
            NonFiniteWeightsError: the point contains NaN or infinity; the origin is restored.
        """
        origin, anchor = self._anchored.origin, self._anchored.anchor
        self.lost_share = lost_share = 0.0
        if scale == 0.0:
            self.restore()
            return
        finite = True
        for name, length in self._lengths.items():
            if length == 0.0:
                continue
            try:
                a, b, lost = move_factors(*self._factors(origin, name), *self._factors(anchor, name), scale)
                finite = bool(torch.isfinite(a).all() & torch.isfinite(b).all())
            except torch.linalg.LinAlgError:
                finite = False
            if not finite:
                break
            self.lost_share = lost_share = max(lost_share, float(lost) / (abs(scale) * length))
            copy_full_(self._anchored.parameters[f"{name}.A"], a)
            copy_full_(self._anchored.parameters[f"{name}.B"], b)
        self._anchored.restore_unless(finite, f"W + {scale}·ΔW", f"the adapter of '{name}'")


def selected_adapters(model: nn.Module, rule: str) -> dict[str, tuple[tuple[nn.Parameter, nn.Parameter], float]]:
    """(A, B) and scaling of the adapted weights that a rule selects, by name.

    Raises:
        ConfigError: see `adapted` and `select`.
    """
    adapters = {name: (factors, scaling) for name, factors, scaling in adapted(model)}
    return {name: adapters[name] for name in select(adapters, rule, type(inside(model)).__name__, "adapted weight")}


def adapted(model: Any) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Parameter], float]]:
    """(name of the adapted weight in the base model, (A, B), scaling) per matrix with an adapter.

    Raises:
        ConfigError: the adapter is not LoRA or its update is not scaling · B A, or several adapters
            are active.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    inner: Any = inside(model)
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in inner.peft_config.values()}
    if kinds != {"LORA"}:
        raise ConfigError(
            f"the look-ahead moves LoRA adapters only, got {', '.join(sorted(kinds))}. Use LoRA, or train the full "
            "weights."
        )
    for module_name, module in inner.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name, layer = plain_name(module_name).removeprefix("base_model.model."), cast(Any, module)
        active = [each for each in layer.active_adapters if each in layer.lora_A or each in layer.lora_embedding_A]
        if not active:  # it has inactive adapters only
            continue
        if len(active) > 1:
            raise ConfigError(
                f"expected one active LoRA adapter, '{name}' has {len(active)}: {', '.join(active)}. Activate the one "
                "that is trained: model.set_adapter(…)."
            )
        (adapter,) = active
        if adapter not in layer.lora_A:
            raise ConfigError(
                f"'{name}' adapts an embedding, whose factors have another layout. Remove it from the LoRA "
                "configuration."
            )
        variant = (
            isinstance(layer, ParamWrapper) or adapter in layer.lora_magnitude_vector or adapter in layer.lora_variant
        )
        if variant or layer.lora_A[adapter].weight.dim() != 2:
            raise ConfigError(
                f"'{name}' uses a variant of LoRA (DoRA, …) or adapts stacked experts or a convolution, so its update "
                "is not scaling · B A. Use plain LoRA on linear layers."
            )
        factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        yield f"{name}.weight", factors, float(layer.scaling[adapter])
