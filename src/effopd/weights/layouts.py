"""Row layouts of fused query/key/value and gate/up tensors, by model type.

The modeling code of each architecture defines its layout: q, k and v one after the other (Phi-3,
GPT-2), per head (GPT-NeoX, BLOOM), or in groups (Falcon, CodeGen). A tensor without a rule, or
whose size contradicts the configuration, stays whole under its own name. `benchmarks/layouts.py`
checks every rule against the model's forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

#: q, k, v one after the other.
_IN_TURN = ("phi3", "phi4_multimodal", "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "mpt", "dbrx")
#: q, k, v of the first head, then of the second, and so on.
_BY_HEAD = ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon", "minimax")
#: Number of blocks in which CodeGen stores q, v and k, for any number of heads.
_CODEGEN_BLOCKS = 4
#: Model types with weights stored as [in, out] (Conv1D), used if the shape is ambiguous.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: Model types with experts stored as [experts, in, out], used if the shapes are ambiguous.
EXPERTS_IN_BY_OUT = ("gpt_oss", "llama4_text", "llama4")
_SETTINGS = {
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key heads": ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_head_kv"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}


@dataclass(frozen=True)
class Piece:
    """Some rows of a fused tensor.

    Attributes:
        name: name of the matrix in these rows, such as `q`.
        rows: start, stop, step inside each block; `None`: all rows.
        blocks: number of equal blocks along the output dimension.
    """

    name: str
    rows: tuple[int, int, int] | None = None
    blocks: int = 1


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    return config.get("text_config") or config


def model_type(config: Mapping[str, Any]) -> str:
    """The model type of the language model."""
    return str(text_config(config).get("model_type", config.get("model_type", "")))


def setting(config: Mapping[str, Any], *names: str) -> Any:
    """First of these settings in the text configuration, otherwise the model type's default.

    `None`: neither exists.
    """
    text = text_config(config)
    value = next((text[name] for name in names if text.get(name) is not None), None)
    if value is not None:
        return value
    defaults = _defaults(model_type(config))
    return next((default for name in names if (default := getattr(defaults, name, None)) is not None), None)


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Width of the residual stream; `None`: not in the configuration."""
    text = text_config(config)
    return next((int(text[name]) for name in _SETTINGS["hidden"] if text.get(name)), None)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the installed transformers supports this model type."""
    return any(_defaults(str(kind)) is not None for kind in (model_type(config), config.get("model_type")))


@cache
def _defaults(kind: str) -> Any:
    """Default configuration of a model type; `None`: transformers does not have it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(kind)
    except (ValueError, KeyError):
        return None


def pieces_of(matrix: str, size: int, config: Mapping[str, Any]) -> list[Piece] | None:
    """Pieces of a tensor along its output dimension of `size`; `None`: fused, layout unknown."""
    if matrix in ("qkv", "gqkv", "kv"):
        return _attention(matrix, size, config)
    if matrix.endswith("gate_up"):
        stem = matrix.removesuffix("gate_up")
        if size % 2 or not is_known(config):
            return None
        if model_type(config) == "gpt_oss":  # columns alternate: gate, up, gate, up, …
            return [Piece(f"{stem}gate", (0, size, 2)), Piece(f"{stem}up", (1, size, 2))]
        return [Piece(f"{stem}gate", (0, size // 2, 1)), Piece(f"{stem}up", (size // 2, size, 1))]
    return [Piece(matrix)]


def _attention(matrix: str, size: int, config: Mapping[str, Any]) -> list[Piece] | None:
    kind = model_type(config)
    if matrix == "kv":
        return _consecutive("kv", [size // 2] * 2, size) if kind == "jetmoe" else None
    if matrix == "gqkv":
        return _consecutive(("gate", "q", "k", "v"), [size // 4] * 4, size) if kind == "hrm_text" else None
    heads = setting(config, *_SETTINGS["heads"])
    if not heads:
        return None
    if kind == "codegen":
        return _consecutive("qvk", [size // 3 // _CODEGEN_BLOCKS] * 3, size, _CODEGEN_BLOCKS)
    if kind == "falcon":
        return _falcon(size, heads, config)
    if kind == "gpt_bigcode":
        head = setting(config, *_SETTINGS["hidden"]) // heads
        one = setting(config, "multi_query") is not False
        return _consecutive("qkv", [heads * head, head, head] if one else [head] * 3, size, 1 if one else heads)
    if kind in _BY_HEAD:
        return _consecutive("qkv", [size // 3 // heads] * 3, size, heads)
    if kind in _IN_TURN:
        return _in_turn(size, heads, config)
    return None


def _in_turn(size: int, heads: int, config: Mapping[str, Any]) -> list[Piece] | None:
    hidden = setting(config, *_SETTINGS["hidden"])
    head = text_config(config).get("head_dim") or (hidden // heads if hidden else 0)
    nested = text_config(config).get("attn_config") or {}  # MPT, DBRX
    keys = nested.get("kv_n_heads") or text_config(config).get("num_key_value_heads") or heads
    return _consecutive("qkv", [heads * head, keys * head, keys * head], size)


def _falcon(size: int, heads: int, config: Mapping[str, Any]) -> list[Piece] | None:
    if setting(config, "new_decoder_architecture"):
        groups = setting(config, *_SETTINGS["key heads"]) or heads
        head = size // (heads + 2 * groups)
        return _consecutive("qkv", [heads // groups * head, head, head], size, groups)
    if setting(config, "multi_query") is not False:
        head = size // (heads + 2)
        return _consecutive("qkv", [heads * head, head, head], size)
    return _consecutive("qkv", [size // 3 // heads] * 3, size, heads)


def _consecutive(names: str | tuple[str, ...], sizes: list[int], size: int, blocks: int = 1) -> list[Piece] | None:
    """Consecutive pieces of these sizes in each block; `None` unless they add up to `size`."""
    if sum(sizes) * blocks != size or min(sizes) < 1:
        return None
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Piece(name, (start, start + length, 1), blocks)
        for name, start, length in zip(names, starts, sizes, strict=True)
    ]
