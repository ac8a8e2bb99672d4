"""A causal LM's forward pass in two pieces, hidden states and logits, for losses and scores.

    h = hidden_states(model, ids, mask)                    [B, L, H], the input of the output layer
    logits = softcap · tanh(scale · (h Wᵀ + b) / softcap)  [B, L, V]
    logits = scale · (h Wᵀ + b)                            without a soft cap

`scale`, `softcap` and the source of h are measured once per model, not read from its configuration:
families name these fields differently, and some (ModernBERT's decoder) have layers between backbone
and output layer. Models whose logits have another form or depend on later tokens are refused.

Batches of unequal length are right-padded. A causal model then computes the same for each row as
for the row alone, for any kind of positions and even if it ignores the padding mask (recurrent
models).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from transformers import PreTrainedModel

from effopd.common import float64 as precision
from effopd.common.distributed import full_tensor
from effopd.common.isolation import evaluating
from effopd.errors import CompatibilityError, NonFiniteLossError

#: Length of the row that is measured, and of its shorter prefix, in tokens.
LENGTH, SHORT = 12, 5

#: Per-token inputs of multimodal models besides `input_ids`.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class LogitPath:
    """Parameters of the map from a model's hidden states to its logits.

    Attributes:
        scale: factor on the output layer's result.
        softcap: c of c · tanh(x / c); `None`: no soft cap.
        inner: whether h must be captured at the output layer, because it differs from the
            backbone's last hidden states.
        error: largest |Δ log p| from the model's own logits, in nats.
    """

    scale: float = 1.0
    softcap: float | None = None
    inner: bool = False
    error: float = 0.0


_PATHS: WeakKeyDictionary[nn.Module, LogitPath] = WeakKeyDictionary()


def core_of(model: Any) -> PreTrainedModel:
    """The causal LM without the wrappers of DeepSpeed, torch.compile and PEFT; adapters stay
    active.
    """
    if type(model).__module__.startswith("deepspeed."):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    peft = sys.modules.get("peft")  # accelerate's `is_peft_model` parses PEFT's metadata at each call
    model = model.base_model.model if peft and isinstance(model, peft.PeftModel) else model
    return getattr(model, "_orig_mod", model)


def logit_path(model: Any) -> LogitPath:
    """`LogitPath` of a model, measured at the first call.

    Under FSDP2 all ranks must make that call, within the model's forward pass.

    Raises:
        CompatibilityError: the logits have another form, or depend on later tokens.
        NonFiniteLossError: hidden states are not finite.
    """
    core = core_of(model)
    if core not in _PATHS:
        _PATHS[core] = _measured(core)
    return _PATHS[core]


def remember(model: Any, path: LogitPath) -> None:
    """Set the `LogitPath` of `model` to the result of another rank."""
    _PATHS[core_of(model)] = path


def is_whole(model: Any) -> bool:
    """Whether this process holds all weights and can run the model alone."""
    return not any(
        p.is_meta or hasattr(p, "ds_id") or isinstance(p, torch.distributed.tensor.DTensor)
        for p in core_of(model).parameters()
    )


# -- forwards --------------------------------------------------------------------------------------


def hidden_states(model: Any, input_ids_BL: Tensor, mask_BL: Tensor, **multimodal: Any) -> Tensor:
    """Input of the output layer [B, L, H]; rows must be right-padded or unpadded.

    Args:
        model: causal LM, possibly wrapped.
        input_ids_BL: token ids.
        mask_BL: 1 at tokens, 0 at padding.
        multimodal: further inputs of the forward pass.
    """
    core = core_of(model)
    return _hidden(core, logit_path(core).inner, input_ids_BL, mask_BL, multimodal)


def completion_hidden_states(
    model: Any, input_ids_BL: Tensor, mask_BL: Tensor, keep: int, *, multiple_of: int | None = None, **multimodal: Any
) -> Tensor:
    """Hidden states [B, keep, H] that predict the last `keep` columns of each row.

    Rows can be padded on either side: left padding is removed before the forward pass. At padding
    among the last `keep` columns, the result is an arbitrary hidden state of the row; mask it.

    Args:
        model: causal LM, possibly wrapped.
        input_ids_BL: token ids.
        mask_BL: 1 at tokens, 0 at padding.
        keep: number of columns.
        multiple_of: round the width of the forward pass up to a multiple of this number.
        multimodal: further inputs of the forward pass.
    """
    if bool(mask_BL[:, 0].all()):
        return hidden_states(model, input_ids_BL, mask_BL, **multimodal)[:, :-1][:, -keep:]
    order_BL = mask_BL.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    width = int(mask_BL.sum(1).max())
    if multiple_of:
        width = min(-(-width // multiple_of) * multiple_of, mask_BL.shape[1])
    order_BL = order_BL[:, :width]
    moved = {
        name: value.gather(1, order_BL) if name in _PER_TOKEN and value is not None else value
        for name, value in multimodal.items()
    }
    hidden = hidden_states(model, input_ids_BL.gather(1, order_BL), mask_BL.gather(1, order_BL), **moved)
    # `place`: position before the token in the shifted row, whose hidden state predicts it
    place_BK = (mask_BL.cumsum(1)[:, -keep:] - 2).clamp(min=0).to(hidden.device)
    return hidden.gather(1, place_BK[..., None].expand(-1, -1, hidden.shape[-1]))


def _hidden(core: PreTrainedModel, inner: bool, ids_BL: Tensor, mask_BL: Tensor, extra: dict[str, Any]) -> Tensor:
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "use_cache": False, **extra}
    if inner:
        return _OutputLayer(core).input(inputs)
    backbone = core.base_model
    return backbone(**_accepted(backbone.forward, inputs)).last_hidden_state


def _accepted(forward: Callable, inputs: dict[str, Any]) -> dict[str, Any]:
    """The entries of `inputs` that `forward` has a parameter for."""
    parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return inputs
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in inputs.items() if name in names}


class _OutputLayer:
    """The output layer of a model, and forward passes that observe or replace its result."""

    def __init__(self, core: PreTrainedModel):
        self._core, self.layer = core, core.get_output_embeddings()
        weight = getattr(self.layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            kind = "none" if self.layer is None else f"{type(self.layer).__name__}"
            raise CompatibilityError(
                f"{type(core).__name__}: expected an output layer with a floating-point weight [vocabulary, hidden], "
                f"got {kind}. Its KL cannot be computed. Use another model, or do not quantize its output layer."
            )
        adapted = hasattr(self.layer, "base_layer")  # a PEFT layer; its `weight` is the frozen one
        if adapted and any(p.requires_grad for p in self.layer.parameters()):
            raise CompatibilityError(
                f"{type(core).__name__}: got a trainable adapter on its output layer, which losses and scores do not "
                "include. Remove the output layer from the adapter's target_modules."
            )

    @contextmanager
    def _replaced(self, forward: Callable) -> Iterator[None]:
        previous = self.layer.__dict__.get("forward")
        self.layer.forward = forward
        try:
            yield
        finally:
            if previous is None:
                del self.layer.forward
            else:
                self.layer.forward = previous

    def _run(self, inputs: dict[str, Any]) -> Any:
        return self._core.forward(**_accepted(self._core.forward, inputs))

    def input(self, inputs: dict[str, Any]) -> Tensor:
        """The layer's input; no logits are formed."""
        seen: list[Tensor] = []

        def catch(hidden, *args, **kwargs):
            seen.append(hidden)
            return hidden

        with self._replaced(catch):
            self._run(inputs)
        return seen[-1]

    def watched(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input and result, and the model's own logits."""
        seen: list[tuple[Tensor, Tensor]] = []
        real = self.layer.forward

        def watch(hidden, *args, **kwargs):
            result = real(hidden, *args, **kwargs)
            seen.append((hidden, result))
            return result

        with self._replaced(watch):
            logits = self._run(inputs).logits
        if len(seen) != 1:
            raise CompatibilityError(
                f"{type(self._core).__name__}: expected a forward pass that calls its output layer once, got "
                f"{len(seen)} calls. Its logits are not output layer · hidden states, so its KL cannot be computed. "
                "Use another model."
            )
        return *seen[0], logits

    def answer_to(self, inputs: dict[str, Any], result: Tensor) -> Tensor:
        """The model's logits with the layer's result replaced by `result`."""
        with self._replaced(lambda *args, **kwargs: result):
            return self._run(inputs).logits


@contextmanager
def at_rest(core: Any) -> Iterator[None]:
    """Eval mode in the weights' own precision, without accelerate's autocast."""
    wrapped, plain = vars(core).get("forward"), forward_without_autocast(core)
    if plain is not None:
        core.forward = plain
    try:
        with evaluating(core), torch.autocast(core.device.type, enabled=False):
            yield
    finally:
        if plain is not None:
            core.forward = wrapped


def forward_without_autocast(core: Any) -> Callable | None:
    """The forward method inside accelerate's autocast wrapper; `None`: not wrapped."""
    forward = vars(core).get("forward")
    to_float32 = getattr(forward, "__wrapped__", None)
    if not isinstance(to_float32, ConvertOutputsToFp32):
        return None
    plain = to_float32.model_forward.__wrapped__
    return MethodType(plain, core) if isinstance(forward, MethodType) else plain


@contextmanager
def typed(core: Any, what: str) -> Iterator[None]:
    """Turn the model's exceptions during `what`, except out of memory, into typed errors."""
    try:
        yield
    except (CompatibilityError, NonFiniteLossError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CompatibilityError(
            f"{type(core).__name__}: expected {what} to work, got {type(error).__name__}: {error} Use a model that "
            "transformers can run."
        ) from error


# -- measurement -----------------------------------------------------------------------------------


@torch.no_grad()
def _measured(core: PreTrainedModel) -> LogitPath:
    with at_rest(core), typed(core, "a forward pass of a few tokens"):
        layer, row = _OutputLayer(core), usual_tokens(core, LENGTH)
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "use_cache": False}
        hidden, result, logits = layer.watched(inputs)
        if not bool(torch.isfinite(hidden).all()):
            raise NonFiniteLossError(
                f"{type(core).__name__}: hidden states of a few tokens are not finite. Check its weights and its "
                "dtype (float16 overflows at values that bfloat16 can hold)."
            )
        scale, softcap = _after_layer(core, layer, inputs, result)
        backbone: Any = core.base_model
        inner = backbone is core
        if not inner:
            last = getattr(backbone(**_accepted(backbone.forward, inputs)), "last_hidden_state", None)
            inner = last is None or last.shape != hidden.shape or not last.any() or _apart(last, hidden) > _noise(core)
        path = LogitPath(scale, softcap, inner)
        _check_causal(core, path, row, hidden)
        error = _error(layer.layer, path, hidden, logits)
    allowed = 1e-4 + 2 * rounding(core) * float(logits.abs().max())
    if not error <= allowed:
        raise CompatibilityError(
            f"{type(core).__name__}: log-probabilities from output layer and hidden states differ from those of the "
            f"model's own forward by {error:.3g} nats (expected at most {allowed:.2g}), so loss and KL would be "
            "wrong. Use another model, or report its model type."
        )
    return replace(path, error=error)


def usual_tokens(core: PreTrainedModel, length: int) -> Tensor:
    """A row [1, length] of distinct, non-special tokens."""
    config = core.config.get_text_config()
    special = {
        value
        for source in (core.config, config)
        for name, value in source.to_dict().items()
        if isinstance(value, int) and ("token_id" in name or "token_index" in name)
    }
    rows = min(config.vocab_size, core.get_input_embeddings().weight.shape[0])
    usual = [token for token in range(rows) if token not in special]
    chosen = [usual[(i + 1) * len(usual) // (length + 2)] for i in range(length)]
    return torch.tensor([chosen], device=core.device)


def _after_layer(core: Any, layer: _OutputLayer, inputs: dict[str, Any], result: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap after the output layer, from the model's logits for known results."""
    dtype = torch.float64 if precision.has_float64(result.device) else torch.float32
    ramp = torch.linspace(-50, 50, result.numel(), dtype=dtype, device=result.device).view(result.shape)
    ramp[..., 0] = 1.0
    answer = layer.answer_to(inputs, ramp).to(dtype)
    one = float(answer.flatten()[0])
    if _same(answer, one * ramp):
        return one, None
    top = float(layer.answer_to(inputs, torch.full_like(ramp, 1e9)).to(dtype).flatten()[0])
    if 0 < abs(one) < top < 1e8:
        scale = top * float(torch.atanh(torch.tensor(one / top, dtype=torch.float64)))
        scale = 1.0 if abs(scale - 1) < 1e-6 else scale
        if _same(answer, top * torch.tanh(scale * ramp / top)):
            return scale, top
    raise CompatibilityError(
        f"{type(core).__name__}: its output layer is followed by neither a factor nor a soft cap c·tanh(x/c): results "
        f"from -50 to 50 become logits from {float(answer.min()):.3g} to {float(answer.max()):.3g}. Loss and KL would "
        "be wrong. Use another model."
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-5 + 1e-5 * b.abs()).all())


def _check_causal(core: PreTrainedModel, path: LogitPath, row: Tensor, hidden: Tensor) -> None:
    """Check that a truncated, right-padded row has the same hidden states as the whole row."""
    both = row.repeat(2, 1)
    mask = torch.ones_like(both)
    mask[0, SHORT:] = 0
    both[0, SHORT:] = row[0, 0]
    padded = _hidden(core, path.inner, both, mask, {})
    apart = max(_apart(padded[0, :SHORT], hidden[0, :SHORT]), _apart(padded[1], hidden[0]))
    if not apart <= _noise(core):
        raise CompatibilityError(
            f"{type(core).__name__}: predictions at a position depend on the tokens after it or on the batch (hidden "
            f"states change by {apart:.2g} of their size). Expected a causal model. Set `is_decoder` in its "
            "configuration if it has that field, or use another model."
        )


def _error(layer: Any, path: LogitPath, hidden: Tensor, logits: Tensor) -> float:
    made = float_logits(layer, path, hidden)
    return float((made.log_softmax(-1) - logits.to(made.device).float().log_softmax(-1)).abs().max())


def float_logits(layer: Any, path: LogitPath, hidden: Tensor) -> Tensor:
    """Logits in float32, as losses and scores compute them."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    bias = None if bias is None else full_tensor(bias).float()
    made = torch.nn.functional.linear(hidden.to(weight.device).float(), full_tensor(weight).float(), bias) * path.scale
    return made if path.softcap is None else path.softcap * torch.tanh(made / path.softcap)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))


def rounding(core: PreTrainedModel) -> float:
    """Machine epsilon of the coarsest type that the forward pass computes in."""
    types = {p.dtype for p in core.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    if not types <= {torch.float32, torch.float64} or getattr(core, "is_quantized", False):
        return torch.finfo(torch.bfloat16).eps
    coarse = core.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return 2.0**-10 if coarse else torch.finfo(torch.float32).eps


def coarse(core: PreTrainedModel) -> bool:
    """Whether the forward pass computes in less than single precision anywhere."""
    return rounding(core) > 1e-6


def _noise(core: PreTrainedModel) -> float:
    """Allowed difference of two computations of hidden states, relative to the largest."""
    return min(0.1, 1e3 * rounding(core))
