"""The memory estimate against what a training step really holds; and sizes without a download."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from effopd.distill.footprint import ModelSize, bytes_a_rank, model_size, size_of
from effopd.extrapolate.live_weights import LiveWeights


@pytest.mark.parametrize("rule", ["attention+mlp", "all"])
def test_the_estimate_is_what_a_step_and_a_search_hold(rule):
    model = make_model(0)
    optimizer = torch.optim.AdamW(model.parameters())
    lookahead = LiveWeights(model, rule)
    model(torch.arange(4)[None]).logits.sum().backward()
    optimizer.step()
    lookahead.begin()
    size = size_of(model.config)
    found = bytes_a_rank(size, 0, moved=size.selected(rule))
    parameters = list(model.parameters())
    assert found["weights"] == sum(p.nbytes for p in parameters)
    assert found["gradients"] == sum(p.grad.nbytes for p in parameters)
    moments = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert found["optimizer"] == sum(t.nbytes for t in moments)
    assert found["anchor"] + found["candidate"] == lookahead.nbytes


def test_sharding_divides_everything_but_the_teacher():
    size = ModelSize(8_000_000, "name")
    whole = bytes_a_rank(size, 1000, moved=size.parameters)
    shared = bytes_a_rank(size, 1000, moved=size.parameters, ranks=8, sharded=True)
    assert whole == bytes_a_rank(size, 1000, moved=size.parameters, ranks=8)  # DDP
    assert shared.pop("teacher") == whole.pop("teacher") == 1000
    assert {name: 8 * value for name, value in shared.items()} == whole
    assert "anchor" not in bytes_a_rank(size, 0)  # plain OPD


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen3-1.7B-Base", 1.7), ("Qwen/Qwen3-30B-A3B", 30), ("x/gpt2-124M", 0.124), ("x/DAPO-Qwen-32B/", 32)],
)
def test_a_name_tells_the_size_of_a_model_that_is_not_here(name, billions):
    assert model_size(name) == ModelSize(round(billions * 1e9), "name")


def test_a_name_without_a_size_is_unknown():
    assert model_size("someone/model-v2") is None


def test_a_folder_is_measured_by_its_configuration(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    assert size.source == "configuration" and size.parameters == make_model(0).num_parameters()
    assert size.layers == make_model(0).config.num_hidden_layers
