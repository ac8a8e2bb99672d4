"""Parameters moved by `parameters=attention+mlp` and `released-code` in every decoder type.

    python benchmarks/parameter_rules.py               # all types; one to two minutes on one core
    python benchmarks/parameter_rules.py llama mllama  # these types

Models are built from the default configuration of each type of transformers on the meta device,
which needs no memory, network or weights. The table lists the parts of blocks that do not move,
without norms and biases. `EXPECTED` gives the reason for each. The exit status is 1 if a part is
not in `EXPECTED`, or if a type has no attention or no MLP that moves.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Mapping

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from effopd.errors import ConfigError
from effopd.extrapolate.parameter_rules import select

#: Settings for types whose default configuration builds no model.
SETTINGS: Mapping[str, dict] = {
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64, "num_experts": 2, "moe_topk": 1},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 48},
    "reformer": {"is_decoder": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
}
#: Parts of a block that are not moved: they act on, or feed, the residual stream between attention
#: and MLP.
EXPECTED: Mapping[str, str] = {
    "attn_hc": "hyper-connections",
    "ffn_hc": "hyper-connections",
    "altup": "AltUp: a wider residual stream",
    "laurel": "LAuReL: a learned residual",
    "per_layer_input_gate": "an embedding per layer",
    "per_layer_projection": "an embedding per layer",
    "attn_sconv": "a convolution of the residual stream",
    "mlp_sconv": "a convolution of the residual stream",
    "post_attention_convolution": "a convolution of the residual stream",
    "post_mlp_convolution": "a convolution of the residual stream",
    "attention_input": "a mixture of earlier layers",
    "mlp_input": "a mixture of earlier layers",
    "linear": "Zamba: the way from the shared block to Mamba",
    "output.adapter_modules": "language adapters",
    "input_residual": "a residual scale",
    "post_attention_residual": "a residual scale",
    "post_attention_residual_scale": "a residual scale",
    "post_mlp_residual_scale": "a residual scale",
    "cross_attn_attn_gate": "a residual scale",
    "cross_attn_mlp_gate": "a residual scale",
    "weight": "lists of projections and norms beside the blocks",
}
NORM = re.compile(r"(?i)norm|(?:^|[._])ln(?:[_\d.]|$)")
ATTENTION = re.compile(r"(?i)attn|attention|mamba|mixer|conv|mlstm|temporal_block|[qkv]_(?:proj|lin)|self_att\.")
MLP = re.compile(r"(?i)mlp|ffn|feed_forward|\.ff\.|moe|experts|fc\d|\.lin\d|intermediate|mixer|mamba")


def model_of(kind: str) -> torch.nn.Module:
    """The causal language model of a type, on the meta device."""
    config = transformers.CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def staying(names: list[str], moved: set[str]) -> list[str]:
    """Parts of the numbered blocks that do not move, without norms and biases."""
    parts = set()
    for name in names:
        inside = re.search(r"\.\d+\.(.+)$", name) if name not in moved else None
        if inside and not NORM.search(name) and not name.endswith("bias"):
            tail = re.match(r"^(?:.*?\.\d+\.)(.*)$", name)
            parts.add(re.sub(r"\d+", "*", tail.group(1)) if tail else name)
    return sorted(parts)


def main() -> int:
    """Print the table; return 1 if an unexpected part does not move."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    unexpected = built = 0
    print(
        "| type | parameters | attention+mlp moves | released-code moves | parts of blocks "
        "that stay |\n|---|---|---|---|---|"
    )
    for kind in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            sizes = {name: p.numel() for name, p in model_of(kind).named_parameters()}
        except Exception as error:  # some default configurations build no model
            print(f"| {kind} | not built: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]} | | | |")
            continue
        built += 1
        shares, total = [], max(1, sum(sizes.values()))
        moved: set[str] = set()
        for rule in ("attention+mlp", "released-code"):
            try:
                chosen = select(sizes, rule, kind)
            except ConfigError:
                chosen = []
            moved = set(chosen) if rule == "attention+mlp" else moved
            shares.append(
                f"{100 * sum(sizes[name] for name in chosen) / total:.1f} %" if chosen else "nothing: refused"
            )
        stays = staying(list(sizes), moved)
        bad = [part for part in stays if not any(part == e or part.startswith(f"{e}.") for e in EXPECTED)]
        missing = [
            what for what, pattern in (("attention", ATTENTION), ("MLP", MLP)) if not any(map(pattern.search, moved))
        ]
        unexpected += bool(bad or missing)
        note = ", ".join([f"**{part}**" if part in bad else part for part in stays] + [f"**no {m}**" for m in missing])
        print(f"| {kind} | {total:,} | {shares[0]} | {shares[1]} | {note} |")
    print(f"\n{built} types built; {unexpected} with a part that should move and does not.", file=sys.stderr)
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
