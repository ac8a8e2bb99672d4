"""Check of the matrices that `effopd analyze` finds in every model type, by its forward pass.

    python benchmarks/layouts.py              # all types; writes the tables of docs/layouts.md
    python benchmarks/layouts.py TYPE …       # these types; prints their rows

Each causal-LM type of transformers is built tiny with random weights and saved. Then one kind of
matrix at a time is changed *in the file* through `Part.put`, and the model is loaded again. The
change in the output of the attention or MLP of a layer identifies the matrix, for any name and
storage layout. With x the input of the last token and d ⟂ x:

    attention   one token, any change       last of four tokens, change along d
    q           nothing                     nothing (q is that of the last token alone)
    k           nothing                     moves
    v           moves                       moves
    gate        moves                       nothing

    MLP         change along d              twice the change, any direction
    gate        nothing                     not twice the effect (it goes through the activation)
    up          nothing                     twice the effect where there is a gate
    down        one row moves one coordinate of the output

Attention with sinks or without a softmax does not follow the first column. Matrices that are stored
unfused are therefore compared by the second column alone.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from pages import DOCS, rewrite
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from effopd.errors import EffOPDError
from effopd.weights import Checkpoint, Part

#: Set where a configuration has them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "mamba_n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff", "n_inner"), 48),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "moe_layer_freq", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_d_conv"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "encoder_layers": 1, "decoder_layers": 2, "mamba_n_groups": 1, "vocab_size": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Further settings of single model types; `None`: the type lacks the setting.
SPECIAL: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "falcon": {"head_dim": None},
    "bamba": {"layer_types": None},
    "falcon_h1": {"layer_types": None, "mamba_d_ssm": 64},
    **{kind: {"layer_types": None} for kind in ("jamba", "mamba", "falcon_mamba", "recurrent_gemma")},
    "mamba2": {"layer_types": None, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "xlstm": {"v_head_dim": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e9, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
#: Further settings of one model type that change how tensors are fused.
VARIANTS: dict[str, dict[str, Any]] = {
    "falcon (new decoder)": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon (one query per key)": {"multi_query": False},
    "gpt_bigcode (one query per key)": {"multi_query": False},
}
#: Larger models are left out.
_PARAMETERS = 3e7
_ATTENTION = re.compile(r"(?:self_attn|self_attention|attention|attn)$")
_MLP = re.compile(r"(?:mlp|feed_forward|ffn|block_sparse_moe|moe)$")
#: matrix → (moves with one token, moves along d ⟂ x of the last token).
_SIGNS = {"q": (False, False), "k": (False, True), "v": (True, True), "gate": (True, False)}


def configuration(kind: str) -> Any:
    """A tiny configuration of a model type (or one of `VARIANTS`)."""
    name = kind.partition(" ")[0]
    probe = AutoConfig.for_model(name)
    text = getattr(probe, "text_config", None)
    target = probe if text is None else text
    settings = {key: value for key, value in SIZES.items() if _has(target, key)}
    types = list(dict.fromkeys(getattr(target, "layer_types", None) or []))
    settings |= {"layer_types": (types * 4)[:4]} if types else {}
    settings |= SPECIAL.get(name, {}) | VARIANTS.get(kind, {})
    settings = {key: value for key, value in settings.items() if value is not None}
    return AutoConfig.for_model(name, **(settings if text is None else {"text_config": settings}))


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except ValueError:  # per-layer settings
        return True


@dataclass
class Finding:
    """Results for one model type."""

    kind: str
    attention: list[str] = field(default_factory=list)
    mlp: list[str] = field(default_factory=list)
    other: set[str] = field(default_factory=set)
    confirmed: list[str] = field(default_factory=list)
    contradicted: list[str] = field(default_factory=list)
    problem: str = ""


class Model:
    """A saved tiny model, with the outputs of its layers for an edited file."""

    def __init__(self, kind: str, folder: Path):
        self.folder = folder
        config = configuration(kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > _PARAMETERS:
            raise EffOPDError(f"{size / 1e6:.0f} million parameters at the smallest setting tried")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / "base")
        self.checkpoint = Checkpoint(folder / "base")
        self.parts = self.checkpoint.parts()
        self.base = self.outputs({})

    def outputs(self, edited: dict[str, Tensor]) -> dict[tuple[str, int, int], tuple[Tensor, Tensor]]:
        """(module, layer, tokens) → its input and output, float64, with `edited` tensors."""
        names = (*self.checkpoint.shapes, *self.checkpoint.tables)
        tensors = {n: self.checkpoint.load(n) if n in self.checkpoint.shapes else self.checkpoint.load_table(n)
                   for n in names} | edited  # fmt: skip
        target = self.folder / "edited"
        target.mkdir(exist_ok=True)
        for path in (self.folder / "base").glob("*.json"):
            (target / path.name).write_bytes(path.read_bytes())
        save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            target, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        found: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        for tokens in (1, 4):
            handles = [m.register_forward_hook(_recorder(found, (*where, tokens)), with_kwargs=True)
                       for where, m in _blocks(model)]  # fmt: skip
            with torch.no_grad():
                model(input_ids=torch.arange(3, 3 + tokens)[None], use_cache=False)
            for handle in handles:
                handle.remove()
        return found


def _blocks(model: torch.nn.Module) -> Iterator[tuple[tuple[str, int], torch.nn.Module]]:
    """((attention or mlp, layer), module) of every layer."""
    for name, module in model.named_modules():
        place = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:\w+\.)?(\w+)$", name)
        if place is not None and "encoder." not in name.replace("decoder.", ""):
            for kind, pattern in (("attention", _ATTENTION), ("mlp", _MLP)):
                if pattern.match(place[2]):
                    yield (kind, int(place[1])), module


def _recorder(found: dict, key: tuple[str, int, int]) -> Callable:
    def hook(module, args, kwargs, output) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        outputs = output if isinstance(output, tuple | list) else (output,)
        first = next((x for x in outputs if isinstance(x, Tensor)), None)
        if inputs and first is not None and key not in found:
            found[key] = (inputs[0].reshape(-1, inputs[0].shape[-1]), first.reshape(-1, first.shape[-1]))

    return hook


def label(part: Part) -> str:
    """`attention.q`, or `mlp.experts.gate` for all experts of a layer."""
    return f"{part.place.module}.{re.sub(r'experts[.][0-9]+[.]', 'experts.', part.place.matrix)}"


def edited(model: Model, parts: list[Part], change: Callable[[Part], Tensor]) -> dict[str, Tensor]:
    """The tensors of these parts with `change(part)` added."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensor = tensors.setdefault(part.tensor, model.checkpoint.load(part.tensor).double())
        part.put(tensor, part.view(tensor).clone() + change(part).reshape(part.shape))
    return tensors


def rank_one(part: Part, along: Tensor | None, size: float = 1.0) -> Tensor:
    """Random rank-one change of a part, with a row space orthogonal to `along`, if given."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(part.shape[0], 1, generator=generator, dtype=torch.float64)
    columns = torch.randn(1, part.shape[1], generator=generator, dtype=torch.float64)
    if along is not None:
        x = along / along.norm()
        columns = columns - (columns @ x) * x
    return size * rows @ columns


def moved(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 outputs differ by more than rounding."""
    return float((a - b).abs().max()) > 1e-7 * float(a.abs().max().clamp(min=1e-30))


def attention_sign(model: Model, parts: list[Part], layer: int) -> tuple[bool, bool] | None:
    """(one token, last of four tokens): whether changes of the matrix move the attention's output.

    `None`: the layer was not found, or its input has another width.
    """
    if ("attention", layer, 4) not in model.base:
        return None
    x, out = model.base["attention", layer, 4]
    if parts[0].shape[1] != x.shape[1]:
        return None
    any_change = model.outputs(edited(model, parts, lambda part: rank_one(part, None)))
    along = model.outputs(edited(model, parts, lambda part: rank_one(part, x[-1])))
    one = ("attention", layer, 1)
    return moved(model.base[one][1], any_change[one][1]), moved(out[-1], along["attention", layer, 4][1][-1])


def mlp_sign(model: Model, parts: list[Part], layer: int) -> str | None:
    """`gate`, `up`, `down` or `mixed`, from the MLP's output; `None`: not identified."""
    key = ("mlp", layer, 1)
    if key not in model.base or not parts[0].is_matrix:
        return None
    x, out = model.base[key]
    row = model.outputs(edited(model, parts, _one_row))[key][1] - out
    coordinates = int((row[-1].abs() > 1e-9 * row.abs().max().clamp(min=1e-30)).sum())
    if coordinates == 1 and parts[0].shape[0] == out.shape[1]:
        return "down"
    if parts[0].shape[1] != x.shape[1]:
        return None
    along = model.outputs(edited(model, parts, lambda part: rank_one(part, x[-1])))[key][1]
    if moved(out, along):
        return "mixed"
    once, twice = (model.outputs(edited(model, parts, lambda part, n=n: rank_one(part, None, n)))[key][1] - out
                   for n in (0.1, 0.2))  # fmt: skip
    if not moved(out, out + once):
        return None
    return "gate" if float((twice - 2 * once).abs().max()) > 1e-6 * float(twice.abs().max()) else "up"


def _one_row(part: Part) -> Tensor:
    change = torch.zeros(part.shape, dtype=torch.float64)
    change[1] = torch.randn(part.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return change


def covered(model: Model) -> bool:
    """Whether the parts cover every tensor exactly once."""
    counts = {name: torch.zeros(shape) for name, shape in model.checkpoint.shapes.items()}
    for part in model.parts:
        part.put(counts[part.tensor], part.view(counts[part.tensor]) + 1)
    stored = {part.tensor for part in model.parts}
    return all(bool((count == 1).all()) == (name in stored) for name, count in counts.items())


def examine(kind: str) -> Finding:
    """Build, save, edit and compare one model type."""
    finding = Finding(kind)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = Model(kind, Path(folder))
        except Exception as error:  # for example configurations that cannot be small, missing packages
            finding.problem = " ".join(f"{type(error).__name__}: {error}".split())[:90]
            return finding
        if not covered(model):
            finding.contradicted.append("coverage")
        for part in model.parts:
            if part.place.module == "other":
                finding.other.add(re.sub(r"\.\d+(?=\.)", ".N", part.tensor))
        groups: dict[str, list[Part]] = {}
        for part in model.parts:
            if part.place.module in ("attention", "mlp") and part.is_matrix:
                groups.setdefault(label(part), []).append(part)
        for name, parts in groups.items():
            getattr(finding, parts[0].place.module).append(name.partition(".")[2])
            try:
                compare(finding, model, name, parts)
            except Exception as error:  # a file that the model rejects is a result
                finding.contradicted.append(f"{name}: {type(error).__name__}")
    return finding


def compare(finding: Finding, model: Model, name: str, parts: list[Part]) -> None:
    """Record whether the forward pass confirms a label."""
    matrix, layer = name.rpartition(".")[2], parts[0].place.layer or 0
    of_layer = [part for part in parts if part.place.layer == layer]
    if name.startswith("attention.") and matrix in _SIGNS:
        sign = attention_sign(model, of_layer, layer)
        if sign is not None:
            ok = sign == _SIGNS[matrix] or (not _fused(of_layer[0]) and sign[1] == _SIGNS[matrix][1])
            (finding.confirmed if ok else finding.contradicted).append(name)
    elif name.startswith("mlp.") and matrix in ("gate", "up", "down"):
        identified = mlp_sign(model, of_layer, layer)
        if identified is not None:
            lone = matrix == "up" and name.replace(".up", ".gate") not in {label(p) for p in model.parts}
            ok = identified == matrix or (lone and identified == "gate")
            (finding.confirmed if ok else finding.contradicted).append(name)


def _fused(part: Part) -> bool:
    return part.rows is not None


def main(kinds: list[str]) -> None:
    """Examine the named types and print their rows; examine all types and rewrite the page."""
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    rows, skipped = [], []
    for kind in kinds or sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]):
        finding = examine(kind)
        if finding.problem:
            skipped.append(f"- `{kind}`: {finding.problem}")
            print(skipped[-1], flush=True)
            continue
        cells = (" ".join(finding.attention), " ".join(finding.mlp), str(len(finding.confirmed)),
                 " ".join(finding.contradicted), str(len(finding.other)))  # fmt: skip
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    if not kinds:
        head = ["| model type | attention | MLP | confirmed | contradicted | other |", "|---|---|---|--:|---|--:|"]
        versions = f"transformers {transformers.__version__}"
        rewrite(
            DOCS / "layouts.md",
            {"version": versions, "types": "\n".join([*head, *rows]), "not built": "\n".join(skipped)},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
