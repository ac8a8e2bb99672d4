from __future__ import annotations

import contextlib
import io

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 300
SIZES = {
    ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"): 64,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads", "linear_num_value_heads", "num_linear_attention_heads"): 4,
    ("num_key_value_heads", "linear_num_key_heads"): 2,
    ("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"): 16,
    ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"): 96,
    ("moe_intermediate_size", "shared_expert_intermediate_size"): 32,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"): 128,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "top_k_experts", "moe_k"): 2,
}  # fmt: skip
#: Tried in this order until the model builds, runs and generates.
VARIANTS = [
    {}, {"num_key_value_heads": 4}, {"head_dim": None}, {"num_key_value_heads": 4, "head_dim": None}, {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": None}, {"num_hidden_layers": 3}, {"num_hidden_layers":6}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 1, "num_hidden_layers":4}, None,
]
#: What a family needs besides.
SPECIAL = {
    "modernbert-decoder": {}, "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers":2, "num_decoder_layers": 2}, 
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64, "logits_soft_cap": 1.0},
}


def value_of(config, name):
    try:
        return getattr(config, name, None)
    except Exception: 
        return None


def configured(kind, variant):
    cls = CONFIG_MAPPING[kind]
    default = cls()
    try:
        text = default.get_text_config()
    except ValueError:
        text = default.decoder
    small = {}
    if variant is not None:
        for names, value in SIZES.items():
            for name in names:
                if type(value_of(text, name)) is int:
                    small[name] = value
        for name, value in {**variant, **SPECIAL.get(kind, {})}.items():
            if value is None: small.pop(name, None)
            else: small[name] = value
    for name, value in text.to_dict().items():
        if name.endswith("token_id") and type(value) is int and value >= VOCABULARY: small[name] = 3
        if name == "is_decoder": small[name] = True
    for name in ("vocab_size", "n_vocab"):
        if type(value_of(text, name)) is int: small[name] = VOCABULARY
    config = type(text)(**small)
    if text is not default:
        name = "text_config" if value_of(default, "text_config") is not None else "decoder"
        config = cls(**{name: config.to_dict()})
    return config


def build(kind, sharpen=6.0):
    first = None
    for variant in VARIANTS:
        try:
            config = configured(kind, variant)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > 1e7: raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            ids = torch.arange(4, 12)[None]
            for p in model.parameters():
                if p.ndim == 2: p.data.mul_(sharpen)
            with torch.no_grad():
                model(ids)
                model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=True)
            return model
        except Exception as error:
            first = first or error
            last = error
    raise first
