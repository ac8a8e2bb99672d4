"""Where a tensor belongs: from its name and the model's configuration to (layer, module, matrix).

Covers the names of the causal language models in transformers (docs/layouts.md lists them), with one tensor per expert or
all experts stacked. A fused or stacked tensor has several parts, which together cover it exactly once; `layouts` says how
it is cut, and one whose layout is not known stays whole. Whatever is not recognised becomes module `other` under its own
name: listed and analysed, never skipped. Left out: vision and audio towers have no naming of their own (`other`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from effopd.weights.layouts import (
    CONV1D,
    EXPERTS_IN_BY_OUT,
    hidden_size,
    is_known,
    model_type,
    pieces_of,
    setting,
    text_config,
)

MODULES = ("embedding", "attention", "mlp", "norm", "head", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech|multi_modal|mm_projector)")
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|self_attention|attention|attn)\.(.+)$")
_MLP = re.compile(r"(?:^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe)\.(.+)$")
#: MLPs without a module of their own (OPT), and shared experts beside the routed ones (Granite).
_BARE_MLP = re.compile(r"(?:shared_mlp\.)?(fc1|fc2|input_linear|output_linear)$")
#: A norm and what is inside it; `norm_attn_norm` is DBRX's attention block.
_NORM = re.compile(r"(?:^|\.)(?!norm_attn_norm)(?:\w*norm\d?|(?:\w+_)?ln_\w+)(?:$|[._])")
_FINAL_NORM = re.compile(r"(?:^|\.)(?:\w*norm\d?|(?:\w+_)?ln_\w+)(?:_\w+)?$")
_EMBEDDING = re.compile(
    r"(?:^|\.)(embed_tokens|embed_in|tokens_embed|wte|tok_embeddings|word_embeddings|embeddings|wpe|embed_positions|"
    r"positions_embed)$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)$|^(?:output_projection|proj_out|decoder|head)$")
_EXPERT = re.compile(r"experts\.(\d+)\.(\w+)$")
_SHARED = re.compile(r"shared_experts?\.(\w+)$")
_QKV = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "dense": "o", "c_proj": "o",
    "q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b",
    "c_attn": "qkv", "qkv_proj": "qkv", "query_key_value": "qkv", "Wqkv": "qkv", "W_pack": "qkv", "wqkv": "qkv",
    "gqkv_proj": "gqkv", "kv_proj": "kv", "gate_proj": "gate", "sinks": "sinks",
}  # fmt: skip
_MATRICES = {
    "gate_proj": "gate", "linear_gate": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
_MLP_ONLY = {
    "c_fc": "up", "fc1": "up", "fc_in": "up", "dense_h_to_4h": "up",
    "c_proj": "down", "fc2": "down", "fc_out": "down", "dense_4h_to_h": "down",
    "gate": "router", "router": "router", "router.weight": "router", "router.gate": "router", "router.layer": "router",
    "shared_expert_gate": "shared_expert_gate",
    "experts.gate_up_proj": "experts.gate_up", "experts.down_proj": "experts.down", "experts.up_proj": "experts.up",
    "experts.gate_proj": "experts.gate", "input_linear": "experts.gate_up", "output_linear": "experts.down",
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


#: The token embedding, and the output head that may be tied to it.
TOKENS, HEAD = Place(None, "embedding", "tokens"), Place(None, "head", "head")


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
        blocks: how many equal blocks the output dimension consists of; `rows` are taken of each.
    """

    tensor: str
    place: Place
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None
    blocks: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions, and numbers in it."""
        return len(self.shape) == 2 and 0 not in self.shape

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.expert is None and self.rows is None

    def view(self, tensor: Tensor) -> Tensor:
        """This part of the stored tensor, oriented out × in: a view, or a copy where its rows are spread over several
        blocks. Edit with `put`."""
        return self._region(tensor).flatten(0, 1) if self.blocks > 1 else self._region(tensor)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write `value`, of this part's shape, into the stored tensor, in place."""
        region = self._region(tensor)
        region.copy_(value.reshape(region.shape))

    def rows_of(self, factor: Tensor) -> Tensor:
        """The rows of this part out of a matrix [out, …] whose rows are those of the whole oriented tensor."""
        part = Part(self.tensor, self.place, self.shape, rows=self.rows, blocks=self.blocks)
        return part.view(factor)

    def _region(self, tensor: Tensor) -> Tensor:
        """A view: [rows, …], or [blocks, rows of a block, …]."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        if self.rows is None:
            return tensor
        if self.blocks == 1:
            return tensor[slice(*self.rows)]
        return tensor.unflatten(0, (self.blocks, -1))[:, slice(*self.rows)]


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the token embedding; a configuration that does not say has its model type's default."""
    for part in (config, text_config(config)):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return bool(setting({"model_type": config.get("model_type", "")}, "tie_word_embeddings"))


def parts_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], own_head: bool | None = None
) -> list[Part]:
    """Every matrix and vector of a checkpoint: embeddings, then the layers in order, then the rest.

    A head that is tied to the embedding is left out, so it counts once. Two parts never share a place.

    Args:
        config: the checkpoint's `config.json`.
        shapes: name → shape of the stored tensors.
        own_head: whether a stored head is one of its own; default: where the configuration says so, or there is no
            embedding to tie it to.
    """
    if own_head is None:
        own_head = not is_tied(config) or not any(is_token_embedding(name) for name in shapes)
    found: list[Part] = []
    for name, shape in shapes.items():
        place = place_of(name)
        if is_head(name) and not own_head:
            continue
        found += _split(name, tuple(shape), place, config, shapes)
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
            found[i] = replace(part, place=place)
        seen.add(found[i].place)
    return found


def is_head(name: str) -> bool:
    """Whether this is the weight of the output head (a bias is never tied)."""
    return place_of(name) == HEAD


def is_token_embedding(name: str) -> bool:
    """Whether this is the token embedding."""
    return place_of(name) == TOKENS


def place_of(name: str) -> Place:
    """Place of a stored tensor by its name alone; fused and stacked ones as a whole (`qkv`, `experts.gate_up`)."""
    stem, kind = _stem(name)
    inside = _LAYER.search(stem)
    if _TOWER.search(stem):
        return Place(None, "other", name)
    if inside is None:
        return _outside(stem, kind, name)
    layer, rest = int(inside[1]), inside[2]
    attention, mlp, bare = _ATTENTION.search(rest), _MLP.search(rest), _BARE_MLP.match(rest)
    if _NORM.search(rest):
        return Place(layer, "norm", rest.split(".")[-1] + kind)
    if attention is not None:
        matrix = _QKV.get(attention[1])
        return Place(layer, "attention", matrix + kind) if matrix else Place(layer, "other", name)
    if bare is not None:
        shared = "shared_expert." if rest.startswith("shared_mlp.") else ""
        matrix = _MLP_ONLY[bare[1]].removeprefix("experts.")
        return Place(layer, "mlp", shared + matrix + kind)
    matrix = _mlp_matrix(mlp[1]) if mlp is not None else None
    return Place(layer, "mlp", matrix + kind) if matrix else Place(layer, "other", name)


def _stem(name: str) -> tuple[str, str]:
    """The name without its last component, and `_bias` where that is what it was."""
    for suffix, kind in ((".weight", ""), (".bias", "_bias"), ("_bias", "_bias")):
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return name, ""


def _outside(stem: str, kind: str, name: str) -> Place:
    embedding = _EMBEDDING.search(stem)
    if embedding is not None:
        positions = embedding[1] in ("wpe", "embed_positions", "positions_embed")
        return Place(None, "embedding", "positions" if positions else "tokens")
    if _HEAD.search(stem):
        return Place(None, "head", "head" + kind)
    if _FINAL_NORM.search(stem):
        return Place(None, "norm", "final" + kind)
    return Place(None, "other", name)


def _mlp_matrix(rest: str) -> str | None:
    rest = rest.removeprefix("moe.")
    expert, shared = _EXPERT.search(rest), _SHARED.search(rest)
    if expert is not None:
        matrix = _MATRICES.get(expert[2])
        return f"experts.{expert[1]}.{matrix}" if matrix else None
    if shared is not None:
        matrix = _MATRICES.get(shared[1])
        return f"shared_expert.{matrix}" if matrix else None
    return _MATRICES.get(rest) or _MLP_ONLY.get(rest)


def _split(
    name: str,
    shape: tuple[int, ...],
    place: Place,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Part]:
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
    transposed = dimensions == 2 and _is_transposed(name, shape, matrix, config, shapes)
    inner = shape[1:] if stacked else shape
    inner = inner[::-1] if transposed else inner
    pieces = pieces_of(matrix, inner[0], config)
    if transposed is None or pieces is None:
        return [Part(name, Place(place.layer, "other", name), shape)]
    parts = []
    for expert in range(shape[0]) if stacked else (None,):
        for piece in pieces:
            label = piece.name if expert is None else piece.name.replace("experts.", f"experts.{expert}.", 1)
            size = inner[0] if piece.rows is None else len(range(*piece.rows)) * piece.blocks
            where = Place(place.layer, place.module, label + kind)
            parts.append(Part(name, where, (size, *inner[1:]), expert, transposed, piece.rows, piece.blocks))
    return parts


def _is_transposed(
    name: str,
    shape: tuple[int, ...],
    matrix: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool | None:
    """Whether a matrix is stored as [in, out]: GPT-2's Conv1D, and stacked experts multiplied from the right.

    The shapes decide, the model type where they do not; `None` where neither does.
    """
    hidden = hidden_size(config)
    if len(shape) == 3:
        return _are_experts_transposed(name, shape, matrix, config, shapes)
    conv1d = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
    if conv1d is not None or matrix == "router":
        first, second = (shape[1], shape[0]) if conv1d is not None and conv1d[1] == "c_proj" else shape
        if hidden is not None and first != second and hidden in (first, second):
            return first == hidden
        return conv1d is not None and model_type(config) in CONV1D
    return False


def _are_experts_transposed(
    name: str,
    shape: tuple[int, ...],
    matrix: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool | None:
    """Of gate_up [experts, 2I, H] and down [experts, H, I], always told from gate_up [experts, H, 2I] and down
    [experts, I, H] by the two shapes together, also where H = 2I."""
    for one, other in (("gate_up_proj", "down_proj"), ("input_linear", "output_linear")):
        names = [name, name.replace(one, other)] if one in name else [name.replace(other, one), name]
        if one in names[0] and names[0] in shapes and len(shapes.get(names[1], ())) == 3:
            (_, a, b), (_, c, d) = shapes[names[0]], shapes[names[1]]
            if (a, b) == (2 * d, c):
                return False
            if (a, b) == (d, 2 * c):
                return True
    hidden = hidden_size(config)
    first, second = shape[1:] if not matrix.endswith("down") else shape[:0:-1]
    if hidden is not None and first != second and hidden in (first, second):
        return first == hidden
    if model_type(config) in EXPERTS_IN_BY_OUT:
        return True
    return False if is_known(config) and not matrix.endswith("gate_up") else None
