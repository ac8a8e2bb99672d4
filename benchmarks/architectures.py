"""Exactness of distillation for every causal-LM model type of the installed transformers.

    python benchmarks/architectures.py            # all types; docs/architectures.json and its page
    python benchmarks/architectures.py TYPE …     # these types; prints their rows
    python benchmarks/architectures.py --redraw   # the page from the JSON

Every type of `AutoModelForCausalLM` is built tiny in float32 with random weights. Matrices are six
times their usual size, so that positions and padding matter. Measured on two prompts of 4 and 15
tokens with answers of 6 tokens:

- `Δ own`: largest |Δ log p| between the model's own logits, one row at a time, and head · hidden
    states as computed by the loss;
- `Δ KL`: relative difference between `reverse_kl_of_completions` of the batch and the dense KL of
    the model's own logits, per row;
- `Δ sampler`: largest |Δ log p| between the distributions of `generate` and of the loss;
- prompts that `generate` accepts in one batch: any, those of equal length, or only one.

A type is exact if all differences are rounding (below 1e-3). How well a type learns is not tested.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from typing import Any

import torch
import transformers
from pages import DOCS, rewrite
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from effopd.distill.divergence import Head, reverse_kl_of_completions
from effopd.errors import CompatibilityError
from effopd.models.logit_path import hidden_states, logit_path
from effopd.models.sampler_check import batching, check_sampler

VOCABULARY, LARGEST, SECONDS, EXACT = 300, 150_000_000, 60, 1e-3
SIZES = {
    64: ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"),
    2: (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_blocks",
        "decoder_layers",
        "encoder_layers",
        "num_decoder_layers",
        "num_encoder_layers",
        "num_key_value_heads",
        "linear_num_key_heads",
        "num_experts_per_tok",
        "top_k_experts",
        "moe_k",
    ),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "decoder_attention_heads",
        "encoder_attention_heads",
        "num_decoder_attention_heads",
        "num_encoder_attention_heads",
        "linear_num_value_heads",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
    ),
    16: ("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
    96: ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}
#: Added to the sizes, in this order, until a model builds, runs and generates. The value `None`
#: means the type's own default.
VARIANTS: list[dict[str, Any]] = [
    {}, {"num_key_value_heads": 4}, {"head_dim": None}, {"num_key_value_heads": 4, "head_dim": None},
    {"num_hidden_layers": 4}, {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": None},
    {"num_hidden_layers": 8}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 1, "num_hidden_layers": 4},
]  # fmt: skip
RESULTS = ("exact", "refused", "not built", "WRONG", "CRASH")
ROLLOUTS = {"any": "", "length": "by length", "single": "one by one"}
#: Further settings that a type needs, and logit settings other than the default 1.
OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "codegen": {"rotary_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_chunk_size": 16,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "lm_head_multiplier": 0.5,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 0.5},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "mpt": {"logit_scale": 0.5},
    "prophetnet": {"num_hidden_layers": None},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64, "logits_soft_cap": 1.0},
    "xmod": {"default_language": "en_XX"},
}


class TooSlow(BaseException):
    """A type took longer than `SECONDS`."""


def _ring(*_args: Any) -> None:
    raise TooSlow


def _now(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except AttributeError:  # differs between layers
        return None


def configured(kind: str, variant: dict[str, Any]) -> Any:
    """A small configuration of a type: sizes from `SIZES`, special tokens inside the vocabulary."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    text = default.get_text_config()
    small = {name: size for size, names in SIZES.items() for name in names if type(_now(text, name)) is int}
    changed = {**variant, **OF_TYPE.get(kind, {})}
    small |= changed
    for name, value in text.to_dict().items():
        if name.endswith("token_id") and type(value) is int and value >= VOCABULARY:
            small[name] = 3
        elif name == "is_decoder":
            small[name] = True
    small |= {name: VOCABULARY for name in ("vocab_size", "n_vocab") if type(_now(text, name)) is int}
    small = {name: value for name, value in small.items() if value is not None}
    config = type(text)(**small)
    return config if text is default else cls(text_config=config.to_dict())


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a type that runs and generates.

    Raises:
        Exception: no variant could be built; this is the error of the first attempt.
    """
    errors: list[Exception] = []
    ids = torch.arange(4, 12)[None]
    for variant in VARIANTS:
        try:
            config = configured(kind, variant)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > LARGEST:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.data.mul_(6)
            with torch.no_grad():
                model(ids)
                model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
            return model
        except Exception as error:  # types fail in many ways; the table lists the error
            errors.append(error)
    raise errors[0]


@torch.no_grad()
def measure(kind: str) -> dict[str, Any]:
    """One row of the table."""
    try:
        student, teacher = build(kind, 0), build(kind, 1)
    except Exception as error:
        return {"type": kind, "result": "not built", "why": f"{type(error).__name__}: {error}"}
    row: dict[str, Any] = {"type": kind, "class": type(student).__name__}
    generator = torch.Generator().manual_seed(7)
    prompts, answers = (
        [torch.randint(5, VOCABULARY - 5, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((4, 15), (6, 6))
    )
    try:
        sums, _ = reverse_kl_of_completions(
            student, teacher, prompts, answers, vocab_size=VOCABULARY, pad_token_id=0
        )  # fmt: skip
        own, kl = [], []
        for prompt, answer, kl_sum in zip(prompts, answers, sums, strict=True):
            ids = torch.tensor([prompt + answer])
            log_p, log_q = (
                _own(model, ids)[0, len(prompt) - 1 : -1, :VOCABULARY].log_softmax(-1) for model in (student, teacher)
            )
            dense = float((log_p.exp() * (log_p - log_q)).sum())
            kl.append(abs(kl_sum - dense) / dense)
            made = Head.of(student, VOCABULARY).logits(hidden_states(student, ids, torch.ones_like(ids)))
            own.append(float((made[0, len(prompt) - 1 : -1].log_softmax(-1) - log_p).abs().max()))
        path = logit_path(student)
        row |= {
            "own": max(own),
            "kl": max(kl),
            "sampler": check_sampler(student),
            "scale": path.scale,
            "softcap": path.softcap,
            "inner": path.inner,
            "batching": batching(student),
        }
    except CompatibilityError as error:
        return row | {"result": "refused", "why": str(error)}
    row["result"] = "exact" if max(row["own"], row["kl"], row["sampler"]) < EXACT else "WRONG"
    return row


def _own(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.double()


def row_of(kind: str) -> dict[str, Any]:
    """`measure`, with errors and timeouts as rows."""
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS)
    try:
        return measure(kind)
    except TooSlow:
        return {"type": kind, "result": "not built", "why": f"takes longer than {SECONDS} s on a CPU"}
    except Exception as error:
        return {"type": kind, "result": "CRASH", "why": f"{type(error).__name__}: {error}"}
    finally:
        signal.alarm(0)


def blocks(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The generated blocks of docs/architectures.md."""
    named = {name: [row for row in rows if row["result"] == name] for name in RESULTS}
    counts = [f"| {name} | {len(named[name])} |" for name in RESULTS]
    exact = [
        f"| {row['type']} | {_logits(row)} | {row['own']:.0e} | {row['kl']:.0e} | {row['sampler']:.0e} | "
        f"{ROLLOUTS[row['batching']]} |"
        for row in named["exact"]
    ]
    others = {
        name: [
            f"| {row['type']} | {' '.join(row.get('why', '').split())[:240].replace('|', '/')} |"
            for row in named[name]
        ]
        for name in RESULTS[1:]
    }
    reason = ["| type | reason |", "|---|---|"]
    return {
        "counts": "\n".join(["| result | model types |", "|---|--:|", *counts]),
        "exact": "\n".join(
            ["| type | logits | Δ log p | Δ KL | Δ sampler | rollouts |", "|---|---|---|---|---|---|", *exact]
        ),
        **{name: "\n".join([*reason, *lines] if lines else ["None."]) for name, lines in others.items()},
    }


def _logits(row: dict[str, Any]) -> str:
    """Scaling, cap and inner model of the logits."""
    parts = [f"× {row['scale']:.4g}"] if row["scale"] != 1 else []
    parts += [f"cap {row['softcap']:g}"] if row["softcap"] else []
    return ", ".join([*parts, *(["inner"] if row["inner"] else [])])


def main() -> None:
    """Measure the named types, or all; with `--redraw`, only rewrite the page from the JSON."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    stored, kinds = DOCS / "architectures.json", sys.argv[1:]
    if kinds != ["--redraw"]:
        rows = []
        for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            rows.append(row_of(kind))
            print(json.dumps(rows[-1]), flush=True)
        if kinds:
            return
        stored.write_text(json.dumps(rows, indent=1) + "\n")
    rewrite(DOCS / "architectures.md", blocks(json.loads(stored.read_text())))


if __name__ == "__main__":
    main()
