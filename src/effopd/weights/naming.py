"""Where a tensor belongs: from its name and the model's configuration to (layer, module, matrix).

Covers the layouts of Llama, Qwen2 and 3, Mistral, Gemma, Phi-3 (fused q/k/v and gate/up), GPT-2 (stored transposed, fused
q/k/v) and Mixture-of-Experts models, with one tensor an expert or all experts stacked. A fused or stacked tensor has
several parts, which together cover it exactly once. Whatever is not recognised becomes module `other` under its own
name: listed and analysed, never skipped. Left out: vision and audio towers have no naming of their own (`other`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MODULES = ("embedding", "attention", "mlp", "norm", "head", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech|multi_modal|mm_projector)")
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|self_attention|attention|attn)\.(.+)$")
_MLP = re.compile(r"(?:^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe)\.(.+)$")
_NORM = re.compile(r"(?:^|[._])(?:\w*norm\d?|ln_\w+|layernorm)(?:$|[._])")
_EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|wpe|embed_positions)$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)$")
_EXPERT = re.compile(r"experts\.(\d+)\.(\w+)$")
_SHARED = re.compile(r"shared_experts?\.(\w+)$")
_MATRICES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "dense": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
    "gate": "router", "router": "router", "router.weight": "router",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a matrix or vector sits.

    Attributes:
        layer: number of the transformer layer, `None` outside the layers.
        module: one of `MODULES`.
        matrix: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, `router`, `experts.3.gate`, `q_bias`, `input_layernorm`, `tokens`, …;
            for module `other`, the tensor's name.
    """

    layer: int | None
    module: str
    matrix: str

    def __str__(self) -> str:
        inside = f"layers.{self.layer}." if self.layer is not None else ""
        return f"{inside}{self.module}.{self.matrix}"


@dataclass(frozen=True)
class Part:
    """One matrix or vector inside one stored tensor.

    Attributes:
        tensor: name of the stored tensor.
        place: where it belongs.
        shape: of the view: (M, N) = (out, in) for matrices.
        expert: index into a stack of experts, if the tensor is one.
        transposed: stored as [in, out].
        rows: start, stop, step along the output dimension, for fused tensors.
    """

    tensor: str
    place: Place
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions."""
        return len(self.shape) == 2

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.expert is None and self.rows is None

    def view(self, tensor: Tensor) -> Tensor:
        """This part of the stored tensor, oriented out × in: a view, so `part.view(p).copy_(x)` edits `p`."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        return tensor if self.rows is None else tensor[slice(*self.rows)]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    return config.get("text_config") or config


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the token embedding; a configuration that does not say has its model type's default."""
    for part in (config, text_config(config)):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        return bool(getattr(AutoConfig.for_model(config.get("model_type")), "tie_word_embeddings", False))
    except (ValueError, KeyError):
        return False


def parts_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """Every matrix and vector of a checkpoint: embeddings, then the layers in order, then the rest.

    A head that is tied to the embedding is left out, so it counts once. Two parts never share a place.

    Args:
        config: the checkpoint's `config.json`.
        shapes: name → shape of the stored tensors.
    """
    embedded = any(place_of(name).module == "embedding" for name in shapes)
    found: list[Part] = []
    for name, shape in shapes.items():
        place = place_of(name)
        if place.module == "head" and embedded and is_tied(config):
            continue
        found += _split(name, tuple(shape), place, config)
    order = {"embedding": -1, "other": 1, "norm": 2, "head": 3}
    found.sort(
        key=lambda part: (
            0 if part.place.layer is not None else order.get(part.place.module, 1),
            part.place.layer or 0,
        )
    )
    seen: set[Place] = set()
    for i, part in enumerate(found):
        if part.place in seen:
            place = Place(part.place.layer, "other", f"{part.tensor}:{part.place.matrix}")
            found[i] = Part(part.tensor, place, part.shape, part.expert, part.transposed, part.rows)
        seen.add(found[i].place)
    return found


def place_of(name: str) -> Place:
    """Place of a stored tensor by its name alone; fused and stacked ones as a whole (`qkv`, `experts.gate_up`)."""
    stem, kind = _stem(name)
    inside = _LAYER.search(stem)
    if _TOWER.search(stem):
        return Place(None, "other", name)
    if inside is None:
        return _outside(stem, kind, name)
    layer, rest = int(inside[1]), inside[2]
    attention, mlp = _ATTENTION.search(rest), _MLP.search(rest)
    if _NORM.search(rest):
        return Place(layer, "norm", rest.split(".")[-1] + kind)
    if attention is not None:
        matrix = _MATRICES.get(attention[1]) or {"c_attn": "qkv", "qkv_proj": "qkv", "c_proj": "o"}.get(attention[1])
        if matrix is None and attention[1] == "sinks":
            matrix = "sinks"
        return Place(layer, "attention", matrix + kind) if matrix else Place(layer, "other", name)
    if mlp is not None:
        matrix = _mlp_matrix(mlp[1])
        return Place(layer, "mlp", matrix + kind) if matrix else Place(layer, "other", name)
    return Place(layer, "other", name)


def _stem(name: str) -> tuple[str, str]:
    """The name without its last component, and `_bias` where that is what it was."""
    for suffix, kind in ((".weight", ""), (".bias", "_bias"), ("_bias", "_bias")):
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return name, ""


def _outside(stem: str, kind: str, name: str) -> Place:
    embedding = _EMBEDDING.search(stem)
    if embedding is not None:
        return Place(None, "embedding", "positions" if embedding[1] in ("wpe", "embed_positions") else "tokens")
    if _HEAD.search(stem):
        return Place(None, "head", "head" + kind)
    if _NORM.search(stem):
        return Place(None, "norm", "final" + kind)
    return Place(None, "other", name)


def _mlp_matrix(rest: str) -> str | None:
    rest = rest.removeprefix("moe.")
    expert, shared = _EXPERT.search(rest), _SHARED.search(rest)
    if expert is not None:
        matrix = _MATRICES.get(expert[2])
        return f"experts.{expert[1]}.{matrix}" if matrix else None
    if shared is not None:
        matrix = {"gate_up_proj": "gate_up"}.get(shared[1]) or _MATRICES.get(shared[1])
        return f"shared_expert.{matrix}" if matrix else None
    names = {
        "gate_up_proj": "gate_up", "c_fc": "up", "c_proj": "down", "shared_expert_gate": "shared_expert_gate",
        "experts.gate_up_proj": "experts.gate_up", "experts.down_proj": "experts.down", "experts.up_proj": "experts.up",
        "experts.gate_proj": "experts.gate",
    }  # fmt: skip
    return _MATRICES.get(rest) or names.get(rest)


def _split(name: str, shape: tuple[int, ...], place: Place, config: Mapping[str, Any]) -> list[Part]:
    """The parts of one stored tensor."""
    if place.module == "other":
        return [Part(name, place, shape)]
    matrix, kind = (
        (place.matrix.removesuffix("_bias"), "_bias") if place.matrix.endswith("_bias") else (place.matrix, "")
    )
    stacked = bool(re.match(r"experts\.[a-z]", matrix))
    dimensions = len(shape) - stacked
    if dimensions not in (1, 2) or (stacked and not shape[0]):
        return [Part(name, Place(place.layer, "other", name), shape)]
    transposed = dimensions == 2 and _is_transposed(name, shape, matrix, config)
    inner = shape[1:] if stacked else shape
    inner = inner[::-1] if transposed else inner
    pieces = _rows(matrix, inner[0], config)
    if pieces is None:
        return [Part(name, Place(place.layer, "other", name), shape)]
    parts = []
    for expert in range(shape[0]) if stacked else (None,):
        for piece, rows in pieces:
            label = piece if expert is None else piece.replace("experts.", f"experts.{expert}.", 1)
            size = inner[0] if rows is None else len(range(*rows))
            where = Place(place.layer, place.module, label + kind)
            parts.append(Part(name, where, (size, *inner[1:]), expert, transposed, rows))
    return parts


def _is_transposed(name: str, shape: tuple[int, ...], matrix: str, config: Mapping[str, Any]) -> bool:
    """Whether a matrix is stored as [in, out]: GPT-2's Conv1D, and stacked experts multiplied from the right."""
    if re.search(r"\.(?:c_attn|c_proj|c_fc)\.weight$", name) and _model_type(config) in (
        "gpt2",
        "decision_transformer",
    ):
        return True
    if not matrix.startswith("experts.") or len(shape) != 3:
        return False
    return _model_type(config) in ("gpt_oss", "llama4_text", "llama4")


def _model_type(config: Mapping[str, Any]) -> str:
    return str(text_config(config).get("model_type", config.get("model_type", "")))


def _rows(matrix: str, size: int, config: Mapping[str, Any]) -> list[tuple[str, tuple[int, int, int] | None]] | None:
    """Pieces of a fused tensor along its output dimension; `None` when the configuration does not explain its size."""
    if matrix == "qkv":
        text = text_config(config)
        heads = text.get("num_attention_heads") or text.get("n_head")
        hidden = text.get("hidden_size") or text.get("n_embd")
        if not heads or not hidden:
            return None
        head = text.get("head_dim") or hidden // heads
        keys = (text.get("num_key_value_heads") or heads) * head
        if heads * head + 2 * keys != size:
            return None
        first, second = heads * head, heads * head + keys
        return [("q", (0, first, 1)), ("k", (first, second, 1)), ("v", (second, size, 1))]
    if matrix.endswith("gate_up"):
        stem = matrix.removesuffix("gate_up")
        if size % 2:
            return None
        if _model_type(config) == "gpt_oss":  # columns alternate: gate, up, gate, up, …
            return [(f"{stem}gate", (0, size, 2)), (f"{stem}up", (1, size, 2))]
        return [(f"{stem}gate", (0, size // 2, 1)), (f"{stem}up", (size // 2, size, 1))]
    return [(matrix, None)]
