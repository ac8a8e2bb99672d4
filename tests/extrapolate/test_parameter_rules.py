"""Which parameters move, by name: in every kind of decoder, and whatever the model is wrapped
in.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from helpers.tiny_models import make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from transformers import AutoModelForCausalLM

from effopd import EffOPD, EffOPDConfig
from effopd.errors import ConfigError
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.lora_weights import LoraWeights
from effopd.extrapolate.parameter_rules import PARAMETER_RULES, compile_rule, plain_name, select

#: The parts of decoder blocks that move; every other part holds norms or what acts on the residual
#: stream.
MOVE = {
    "llama": {"self_attn", "mlp"},
    "qwen3_moe": {"self_attn", "mlp"},
    "qwen3_next": {"self_attn", "linear_attn", "mlp"},
    "gpt2": {"attn", "mlp"},
    "gpt_neox": {"attention", "mlp"},
    "longcat_flash": {"self_attn", "mlps", "mlp"},
    "llama4_text": {"self_attn", "feed_forward"},
    "lfm2": {"self_attn", "feed_forward"},
    "jamba": {"mamba", "self_attn", "feed_forward"},
    "nemotron_h": {"mixer"},
    "recurrent_gemma": {"temporal_block", "mlp_block"},
    "xlstm": {"mlstm_layer", "ffn"},
    "bert": {"attention", "intermediate", "output"},
    "bart": {"self_attn", "encoder_attn", "fc1", "fc2"},
    "xlnet": {"rel_attn", "ff"},
    "ctrl": {"multi_head_attention", "ffn"},
    "rwkv": {"attention", "feed_forward"},
    "granitemoehybrid": {"mamba", "block_sparse_moe", "shared_mlp"},
}
NORM = re.compile(r"(?i)norm|(?:^|[._])ln(?:[_\d.]|$)")


def names_of(kind: str, **settings) -> list[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**settings))
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", MOVE)
def test_attention_and_mlp_of_every_block_move_and_norms_do_not(kind):
    names = names_of(kind)
    moved = set(select(names, "attention+mlp", kind))
    inside = {name: match.group(1) for name in names if (match := re.search(r"^\D*\.\d+\.(\w+)\.", name))}
    assert {inside.get(name) for name in moved} == MOVE[kind]
    for name, part in inside.items():
        assert (name in moved) == (part in MOVE[kind] and not NORM.search(name.split(f".{part}.", 1)[1])), name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.cross_attn.q_proj.weight",  # Mllama's vision layers
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",  # DBRX
        "transformer.blocks.0.ffn.experts.mlp.w1",
        "transformer.attentions.0.q_lin.weight",  # XLM
        "transformer.ffns.0.lin1.weight",
        "roberta_prelayernorm.encoder.layer.0.attention.self.query.weight",
        "transformer.h.0.crossattention.c_attn.weight",
    ],
)
def test_names_that_say_it_otherwise(name):
    assert select([name, "lm_head.weight"], "attention+mlp", "it") == [name]


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight", "model.layers.0.input_layernorm.mlp.fc1.weight",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight", "bert.encoder.layer.0.attention.ln.weight",
        "model.layers.0.feed_forward_layer_norm.weight", "model.layers.0.attn_hc.fn", "transformer.h.0.ln_1.weight",
    ],
)  # fmt: skip
def test_what_is_neither_attention_nor_mlp_stays(name):
    assert not compile_rule("attention+mlp").search(name)


KEYWORDS = (
    "attn",
    "self_attn",
    "attention",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "mlp",
    "feed_forward",
    "ffn",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@pytest.mark.parametrize("kind", ["lfm2", "llama4_text", "jamba", "mllama", "bert", "qwen3_moe", "gpt2"])
def test_the_released_rule_is_the_authors_substrings(kind):
    """arXiv 2605.11739's public code moves what contains one of 13 words, in lower case."""
    names = [*names_of(kind), "model.LAYERS.0.SELF_ATTN.weight", "model.layers.0.Feed_Forward.w1"]
    assert select(names, "released-code", kind) == [n for n in names if any(word in n.lower() for word in KEYWORDS)]


def test_a_block_in_which_nothing_would_move_is_refused():
    names = [f"model.layers.{i}.{part}.weight" for i in (0, 2) for part in ("self_attn.q_proj", "mlp.up_proj")]
    other = [f"model.layers.1.{part}.weight" for part in ("wave.in_proj", "wave.out_proj")]
    with pytest.raises(ConfigError, match=r"blocks model\.layers\.\* of it.*model\.layers\.1\.wave\.in_proj\.weight"):
        select([*names, *other], "attention+mlp", "it")
    assert select([*names, *other], "self_attn|mlp", "it") == names  # who writes a rule decides
    lists = ["altup.0.weight", "altup.1.weight", "norms.0.weight", "norms.0.bias"]
    assert select([*names, *lists], "attention+mlp", "it") == names


@pytest.mark.parametrize("rule", ["no_such", "released-code", "attention+mlp"])
def test_a_rule_that_matches_nothing_is_refused(rule):
    with pytest.raises(ConfigError, match="matches no trained parameter"):
        EffOPD(nn.Linear(2, 2), lambda model: 0.0, EffOPDConfig(parameters=rule))


# -- wrappers --------------------------------------------------------------------------------------


def layers_compiled(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer)
    return model


def checkpointed(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    return model


WRAPPERS = {
    "torch.compile": torch.compile,
    "compiled layers": layers_compiled,
    "activation checkpoints": checkpointed,
    "DataParallel": DataParallel,
    "DataParallel of compiled": lambda model: DataParallel(torch.compile(model)),
    "compiled DataParallel": lambda model: torch.compile(DataParallel(model)),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*PARAMETER_RULES, r"^model\.layers\.1\."])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_nothing(wrapper, rule):
    bare = make_model(0)
    wrapped = WRAPPERS[wrapper](copy.deepcopy(bare))
    expected, found = LiveWeights(bare, rule), LiveWeights(wrapped, rule)
    assert found.names == expected.names
    found.load_state_dict(expected.state_dict())  # a checkpoint of the one serves the other


def test_an_anchor_saved_with_a_wrappers_names_is_read():
    weights = LiveWeights(make_model(0))
    saved = {f"_orig_mod.{name}": tensor + 1 for name, tensor in weights.state_dict().items()}
    weights.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[f"_orig_mod.{name}"]) for name, tensor in weights.state_dict().items())


@pytest.mark.parametrize("wrapper", ["torch.compile", "DataParallel"])
def test_adapters_have_their_names_in_wrappers(wrapper):
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    bare, wrapped = get_peft_model(make_model(0), lora), WRAPPERS[wrapper](get_peft_model(make_model(0), lora))
    assert LoraWeights(wrapped).names == LoraWeights(bare).names
    EffOPD(wrapped, lambda model: 0.0, EffOPDConfig(parameters="up_proj"))
    inner = get_peft_model(torch.compile(make_model(0)), lora)  # the other way round
    assert LoraWeights(inner).names == LoraWeights(bare).names


def test_a_module_that_is_called_like_a_wrapper_keeps_its_name():
    assert plain_name("module.mlp.weight") == "module.mlp.weight"
    assert plain_name("my_orig_mod.mlp.weight") == "my_orig_mod.mlp.weight"
    model = nn.Module()
    model.module = nn.Module()
    model.module.mlp = nn.Linear(2, 2)
    assert LiveWeights(model, r"^module\.").names == ("module.mlp.weight", "module.mlp.bias")
