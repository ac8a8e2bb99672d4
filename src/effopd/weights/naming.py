"""The place of a tensor, (layer, module, matrix), from its name.

Covers the causal language models of transformers listed in docs/layouts.md, with one tensor per
expert or stacked experts. Unknown names get module `other` and keep their name: they are analyzed,
never skipped. Vision and audio towers are also `other`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effopd.weights.layouts import setting, text_config

MODULES = ("embedding", "attention", "mlp", "norm", "head", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech|multi_modal|mm_projector)")
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|self_attention|attention|attn)\.(.+)$")
_MLP = re.compile(r"(?:^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe)\.(.+)$")
#: MLPs outside an MLP module (OPT), and shared experts next to routed ones (Granite).
_BARE_MLP = re.compile(r"(?:shared_mlp\.)?(fc1|fc2|input_linear|output_linear)$")
#: A norm and its parameters; `norm_attn_norm` is DBRX's attention block.
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
    """Place of a matrix or vector in a model.

    Attributes:
        layer: index of the transformer layer; `None`: outside the layers.
        module: one of `MODULES`.
        matrix: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, `router`, `experts.3.gate`, `q_bias`,
            `input_layernorm`, `tokens`, …; for module `other`, the tensor's name.
    """

    layer: int | None
    module: str
    matrix: str

    def __str__(self) -> str:
        inside = f"layers.{self.layer}." if self.layer is not None else ""
        return f"{inside}{self.module}.{self.matrix}"


#: The token embedding, and the output head that can be tied to it.
TOKENS, HEAD = Place(None, "embedding", "tokens"), Place(None, "head", "head")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the configuration, or its model type's default, ties the head to the embedding."""
    for part in (config, text_config(config)):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return bool(setting({"model_type": config.get("model_type", "")}, "tie_word_embeddings"))


def is_head(name: str) -> bool:
    """Whether this is the weight, not the bias, of the output head."""
    return place_of(name) == HEAD


def is_token_embedding(name: str) -> bool:
    """Whether this is the token embedding."""
    return place_of(name) == TOKENS


def place_of(name: str) -> Place:
    """Place of a stored tensor by its name; fused and stacked ones as `qkv`, `experts.gate_up`."""
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
    """The name without its weight or bias suffix, and `_bias` for a bias."""
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
