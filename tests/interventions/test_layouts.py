"""Interventions on models whose tensors are fused, stored transposed, without prefix, or merged on
loading.
"""

from __future__ import annotations

import pytest
import torch
from interventions.test_run import OPTIONS, equal, load, moved, weights
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from effopd.errors import CompatibilityError
from effopd.interventions.editable_model import EditableModel, save_point
from effopd.interventions.kinds import INTERVENTIONS
from effopd.interventions.options import InterventionOptions
from effopd.interventions.sources import Sources


def make_other(family: str):
    torch.manual_seed(0)
    if family.startswith("gpt2"):
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    size = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "bloom":  # q, k and v of each head in turn
        return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**size))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, head_dim=8, num_experts=3, moe_intermediate_size=8))


def make_pair(family, tmp_path):
    for name in ("base", "rl"):
        model = make_other(family) if name == "base" else moved(1, 0.02, make_other(family))
        (model.transformer if family == "gpt2-backbone" else model).save_pretrained(tmp_path / name)
    return Sources(tmp_path / "base", {"rl": [tmp_path / "rl"]})


@pytest.mark.parametrize("family", ["gpt2", "gpt2-backbone", "phi3", "bloom"])
def test_fused_and_transposed_tensors(family, tmp_path):
    sources = make_pair(family, tmp_path)
    live = EditableModel(load(tmp_path / "base"), sources)
    base, trained = (weights(load(tmp_path / name)) for name in ("base", "rl"))
    inputs = sources.point_inputs(OPTIONS)
    points = {
        p.id: p for kind in ("alpha", "window", "swap", "rank", "random") for p in INTERVENTIONS[kind].points(inputs)
    }
    for point in points.values():
        with live.at(point) as norm:
            now = weights(live.model)
        assert equal(weights(live.model), base) and equal(now, base) == (norm == 0)
        if point.same_model == "trained/rl/0":
            assert equal(now, trained)
        if point.id == "swap/rl/unit=mlp,side=only":
            assert equal(now, {name: trained[name] if ".mlp." in name else base[name] for name in base})
    with live.at(points["rank/rl/end=top,percent=10,norm=own,rest=trained"]):
        for part in sources.base.parts():
            if part.is_matrix and part.place.module in ("attention", "mlp"):
                now = part.view(live_tensor(live, part.tensor)).double() - part.view(sources.base.load(part.tensor))
                assert torch.linalg.matrix_rank(now, atol=1e-5) == -(-min(part.shape) // 10)


def live_tensor(live, name):
    found = weights(live.model)
    return found.get(name, found.get(f"transformer.{name}"))


def test_a_model_that_is_merged_on_loading_is_written_instead(tmp_path):
    sources = make_pair("moe", tmp_path)
    with pytest.raises(CompatibilityError, match=r"renames or merges tensors.*--save_dir"):
        EditableModel(load(tmp_path / "base"), sources)
    (point,) = INTERVENTIONS["alpha"].points(sources.point_inputs(InterventionOptions(alphas=[1])))
    assert equal(weights(load(save_point(point, sources, tmp_path / "out"))), weights(load(tmp_path / "rl")))
