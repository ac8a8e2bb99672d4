"""From tokens to logits: what a causal LM's own forward computes, in the two pieces that losses and
scores need.

    h = hidden_states(model, ids, mask)                    [B, L, H], the input of the output layer
    logits = softcap · tanh(scale · (h Wᵀ + b) / softcap)  [B, L, V]; without a soft cap scale · (h
    Wᵀ + b)

`scale`, `softcap` and where h is taken are measured on the model, once, not read from its
configuration: families name these fields differently, and some (ModernBERT's decoder) have layers
between backbone and output layer. The same measurement refuses a model whose logits have another
form, or depend on later tokens.

Batches of unequal length are right-padded: a causal model then gives every row what it gives the
row alone, whatever its positions are (a table, rotary, none) and whether or not it reads the
padding mask (recurrent models).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from transformers import PreTrainedModel

from effopd.common import float64 as precision
from effopd.common.isolation import evaluating
from effopd.errors import CompatibilityError, NonFiniteLossError

#: Tokens of the measurement: a row, and the part of it that a shorter row has.
LENGTH, SHORT = 12, 5

#: Inputs per token that a multimodal forward may have besides `input_ids`.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class LogitPath:
    """How a model's logits follow from its hidden states.

    Attributes:
        scale: factor on the output layer's result.
        softcap: c of c · tanh(x / c), `None` without one.
        inner: h is what the output layer is given; the backbone's last hidden states are something
            else.
        error: largest |Δ log p| between the model's own logits and these, in nats.
    """

    scale: float = 1.0
    softcap: float | None = None
    inner: bool = False
    error: float = 0.0


_PATHS: WeakKeyDictionary[nn.Module, LogitPath] = WeakKeyDictionary()


def core_of(model: Any) -> PreTrainedModel:
    """The causal LM itself, without the wrappers of torch.compile and PEFT (adapters stay active,
    they live in layers).
    """
    model = getattr(model, "_orig_mod", model)
    model = model.base_model.model if is_peft_model(model) else model
    return getattr(model, "_orig_mod", model)


def logit_path(model: Any) -> LogitPath:
    """How the logits of `model` are made; measured at the first call (under FSDP2 every rank must
    make it, within the model's forward).

    Raises:
        CompatibilityError: the logits have another form, or depend on later tokens.
        NonFiniteLossError: the model predicts NaN or infinity.
    """
    core = core_of(model)
    if core not in _PATHS:
        _PATHS[core] = _measured(core)
    return _PATHS[core]


def remember(model: Any, path: LogitPath) -> None:
    """Take `path` for that of `model`: another rank has measured it."""
    _PATHS[core_of(model)] = path


def is_whole(model: Any) -> bool:
    """Whether this process holds all weights, so that it can run the model on its own."""
    return not any(
        p.is_meta or hasattr(p, "ds_id") or isinstance(p, torch.distributed.tensor.DTensor)
        for p in core_of(model).parameters()
    )


# -- forwards --------------------------------------------------------------------------------------


def hidden_states(model: Any, input_ids_BL: Tensor, mask_BL: Tensor, **multimodal: Any) -> Tensor:
    """The input of the output layer [B, L, H], for rows that are padded on the right (if at all).

    Args:
        mask_BL: 1 at tokens, 0 at padding.
        multimodal: what the forward is given besides.
    """
    core = core_of(model)
    return _hidden(core, logit_path(core).inner, input_ids_BL, mask_BL, multimodal)


def completion_hidden_states(
    model: Any, input_ids_BL: Tensor, mask_BL: Tensor, keep: int, *, multiple_of: int | None = None, **multimodal: Any
) -> Tensor:
    """The hidden states [B, keep, H] that predict the last `keep` tokens of each row, wherever rows
    are padded.

    Rows are shifted to the left for the forward; without padding on the left that is nothing. Where
    there is padding among the last `keep` tokens, the result is some hidden state of the row, to be
    masked.

    Args:
        multiple_of: round the width of the forward up to a multiple.
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
    # a token in column c of the padded row stands at `place`, and is predicted one before it
    place_BK = (mask_BL.cumsum(1)[:, -keep:] - 2).clamp(min=0).to(hidden.device)
    return hidden.gather(1, place_BK[..., None].expand(-1, -1, hidden.shape[-1]))


def _hidden(core: PreTrainedModel, inner: bool, ids_BL: Tensor, mask_BL: Tensor, extra: dict[str, Any]) -> Tensor:
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "use_cache": False, **extra}
    if inner:
        return _OutputLayer(core).input(inputs)
    backbone = core.base_model
    return backbone(**_accepted(backbone.forward, inputs)).last_hidden_state


def _accepted(forward: Callable, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` without what `forward` has no parameter for (some have no `use_cache`, some read no
    mask).
    """
    parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return inputs
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in inputs.items() if name in names}


class _OutputLayer:
    """The output layer of a model, and forwards of the model that look into it or stand in for
    it.
    """

    def __init__(self, core: PreTrainedModel):
        self._core, self.layer = core, core.get_output_embeddings()
        weight = getattr(self.layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            kind = "none" if self.layer is None else f"{type(self.layer).__name__}"
            raise CompatibilityError(
                f"{type(core).__name__}: expected an output layer with a floating-point "
                "weight [vocabulary, hidden], got "
                f"{kind}. Its KL cannot be computed; use another model (or do not quantise its output layer)."
            )
        adapted = hasattr(self.layer, "base_layer")  # PEFT's layers of adapters; their `weight` is the frozen one
        if adapted and any(p.requires_grad for p in self.layer.parameters()):
            raise CompatibilityError(
                f"{type(core).__name__}: expected losses and scores to read all of the output "
                "layer, got a trainable adapter on "
                "its output layer, which they leave out. Take it out of the adapter's target_modules."
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
        """What the layer is given; no logits are formed."""
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
                f"{type(self._core).__name__}: expected a forward that calls its output layer once, got {len(seen)} "
                "calls. Its logits are not output layer · hidden states, so its KL cannot be "
                "computed; use another model."
            )
        return *seen[0], logits

    def answer_to(self, inputs: dict[str, Any], result: Tensor) -> Tensor:
        """The model's logits if the layer's result were `result`."""
        with self._replaced(lambda *args, **kwargs: result):
            return self._run(inputs).logits


@contextmanager
def at_rest(core: Any) -> Iterator[None]:
    """Eval mode, and weights' own precision: without the autocast that accelerate has put around
    the forward.
    """
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
    """The forward that accelerate has put its autocast around; `None` if it has not."""
    forward = vars(core).get("forward")
    to_float32 = getattr(forward, "__wrapped__", None)
    if not isinstance(to_float32, ConvertOutputsToFp32):
        return None
    plain = to_float32.model_forward.__wrapped__
    return MethodType(plain, core) if isinstance(forward, MethodType) else plain


@contextmanager
def typed(core: Any, what: str) -> Iterator[None]:
    """Whatever the model raises at `what` becomes a `CompatibilityError` that says so; running out
    of memory does not.
    """
    try:
        yield
    except (CompatibilityError, NonFiniteLossError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CompatibilityError(
            f"{type(core).__name__}: expected {what} to work, got {type(error).__name__}: "
            f"{error} Use another model, or one "
            "that transformers runs."
        ) from error


# -- measurement -----------------------------------------------------------------------------------


@torch.no_grad()
def _measured(core: PreTrainedModel) -> LogitPath:
    with at_rest(core), typed(core, "a forward of a few tokens"):
        layer, row = _OutputLayer(core), usual_tokens(core, LENGTH)
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "use_cache": False}
        hidden, result, logits = layer.watched(inputs)
        if not bool(torch.isfinite(hidden).all()):
            raise NonFiniteLossError(
                f"{type(core).__name__}: hidden states of a few tokens are not finite. Check "
                "its weights and its dtype (float16 "
                "overflows where bfloat16 does not)."
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
            f"{type(core).__name__}: log-probabilities from output layer and hidden states "
            "differ from those of the model's "
            f"own forward by {error:.3g} nats (expected at most {allowed:.2g}). Loss and KL would be those of another "
            "model; use another one, or report its model type."
        )
    return replace(path, error=error)


def usual_tokens(core: PreTrainedModel, length: int) -> Tensor:
    """A row [1, length] of different tokens, none of them special."""
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
    """Scale and soft cap of what follows the output layer, from the model's answers to known
    results.
    """
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
        f"{type(core).__name__}: what follows its output layer is neither a factor nor a soft "
        "cap c·tanh(x/c) (for results "
        f"from -50 to 50 it gives logits from {float(answer.min()):.3g} to "
        f"{float(answer.max()):.3g}). Loss and KL would be "
        "those of another model; use another one."
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-5 + 1e-5 * b.abs()).all())


def _check_causal(core: PreTrainedModel, path: LogitPath, row: Tensor, hidden: Tensor) -> None:
    """A row that is cut and padded on the right must have the hidden states that the whole row has
    there.
    """
    both = row.repeat(2, 1)
    mask = torch.ones_like(both)
    mask[0, SHORT:] = 0
    both[0, SHORT:] = row[0, 0]
    padded = _hidden(core, path.inner, both, mask, {})
    apart = max(_apart(padded[0, :SHORT], hidden[0, :SHORT]), _apart(padded[1], hidden[0]))
    if not apart <= _noise(core):
        raise CompatibilityError(
            f"{type(core).__name__}: predictions at a position depend on the tokens after it "
            "or on the batch (hidden states "
            f"move by {apart:.2g} of their size). Expected a causal model, whose answers are "
            "sampled and scored with the "
            "same predictions; set `is_decoder` in its configuration where it has that, or use another model."
        )


def _error(layer: Any, path: LogitPath, hidden: Tensor, logits: Tensor) -> float:
    made = float_logits(layer, path, hidden)
    return float((made.log_softmax(-1) - logits.to(made.device).float().log_softmax(-1)).abs().max())


def float_logits(layer: Any, path: LogitPath, hidden: Tensor) -> Tensor:
    """Logits in float32, the way losses and scores make them."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    bias = None if bias is None else whole_tensor(bias).float()
    made = (
        torch.nn.functional.linear(hidden.to(weight.device).float(), whole_tensor(weight).float(), bias) * path.scale
    )
    return made if path.softcap is None else path.softcap * torch.tanh(made / path.softcap)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if FSDP2 shards it (every rank must call this then)."""
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))


def rounding(core: PreTrainedModel) -> float:
    """Unit of the coarsest floating-point type that the forward computes in."""
    types = {p.dtype for p in core.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    if not types <= {torch.float32, torch.float64} or getattr(core, "is_quantized", False):
        return torch.finfo(torch.bfloat16).eps
    coarse = core.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return 2.0**-10 if coarse else torch.finfo(torch.float32).eps


def coarse(core: PreTrainedModel) -> bool:
    """Whether the forward computes in less than single precision somewhere."""
    return rounding(core) > 1e-6


def _noise(core: PreTrainedModel) -> float:
    """What two computations of the same hidden states may differ by, relative to the largest."""
    return min(0.1, 1e3 * rounding(core))
