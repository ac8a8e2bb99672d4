"""Moving live weights: closed form, bit-exact restore, validation before anything is touched."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model
from torch import nn

from effopd.errors import ConfigError, NonFiniteWeightsError, WeightsError
from effopd.extrapolate.live_weights import LiveWeights


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_a_bit(model, seed=0, size=1e-3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((size * torch.randn(p.shape, generator=generator)).to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_form_and_bit_exact_restore(dtype):
    model = make_model(0).to(dtype)
    live = LiveWeights(model, "all")
    w0 = snapshot(model)
    train_a_bit(model, size=0.1)
    w1 = snapshot(model)
    live.begin()
    points = {}
    for scale in (2.0, 10.0, 4.0, 2.0):
        live.move_to(scale)
        for name, p in model.named_parameters():
            start = w1[name].double()
            expected = start + scale * (start - w0[name].double())
            torch.testing.assert_close(p, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
            assert torch.equal(points.setdefault((scale, name), p.detach().clone()), p)  # never chained: no history
    live.move_to(0.0)
    assert all(torch.equal(p, w1[name]) for name, p in model.named_parameters())
    live.move_to(6.0)
    live.restore()
    assert all(torch.equal(p, w1[name]) for name, p in model.named_parameters())


def test_negative_zero_survives_scale_zero():
    layer = nn.Linear(2, 2, bias=False)
    nn.init.constant_(layer.weight, -0.0)
    live = LiveWeights(layer, "all")
    live.begin()
    live.move_to(0.0)
    live.commit()
    assert torch.signbit(layer.weight).all()


def test_commit_moves_the_anchor():
    model = make_model(0)
    live = LiveWeights(model, "attention+mlp")
    train_a_bit(model)
    assert live.displacement_norm() > 0
    live.begin()
    live.move_to(2.0)
    live.commit()
    assert live.displacement_norm() == 0.0
    for name, tensor in live.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, dict(model.named_parameters())[name])


def test_rules_select_what_they_say():
    model = make_model(0)
    names = {rule: set(LiveWeights(model, rule).names) for rule in ("attention+mlp", "released-code", "all")}
    paper, code = names["attention+mlp"], names["released-code"]
    assert len(paper) == 2 * 7 and all(".self_attn." in n or ".mlp." in n for n in paper)
    assert not any("norm" in n or "embed" in n for n in paper)
    extra = {n.split(".", 3)[3] for n in code - paper}
    assert extra == {"post_attention_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert names["all"] == {name for name, _ in model.named_parameters()}
    assert set(LiveWeights(model, r"layers\.1\.mlp").names) == {n for n in paper if "layers.1.mlp" in n}


def test_only_selected_parameters_move():
    model = make_model(0)
    live = LiveWeights(model, "attention+mlp")
    train_a_bit(model)
    before = snapshot(model)
    live.begin()
    live.move_to(10.0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(live.names)


def test_non_finite_candidate_is_refused_and_undone():
    model = make_model(0)
    live = LiveWeights(model, "all")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e38)
    before = snapshot(model)
    live.begin()
    with pytest.raises(NonFiniteWeightsError, match=r"10.0·D is not finite in parameter"):
        live.move_to(10.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_loading_checks_everything_before_touching_anything():
    live = LiveWeights(make_model(0), "attention+mlp")
    good = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    first, *rest = good
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    for bad, message in (
        ({name: good[name] for name in rest}, "missing"),
        (good | {"foo": torch.zeros(1)}, "unexpected"),
        (good | {first: torch.zeros(3, 3)}, "shape"),
        (good | {first: torch.full_like(good[first], torch.nan)}, "not finite"),
    ):
        with pytest.raises(WeightsError, match=message):
            live.load_state_dict({name: t + 1 if name in rest and t.ndim else t for name, t in bad.items()})
        assert all(torch.equal(t, before[name]) for name, t in live.state_dict().items())


def test_low_precision_is_warned_about(caplog):
    LiveWeights(make_model(0).to(torch.bfloat16), "all")
    assert "torch.bfloat16" in caplog.text


def test_refusals():
    with pytest.raises(ConfigError, match="matches no trained parameter"):
        LiveWeights(make_model(0), "lora_")
    layer = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(WeightsError, match="complex64"):
        LiveWeights(layer, "all")
    with pytest.raises(ConfigError, match="all are frozen"):
        LiveWeights(make_model(0).requires_grad_(False), "all")


def test_frozen_parameters_take_no_memory():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layer[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)  # quantized, say
    layer[0].bias.requires_grad_(False)
    assert LiveWeights(layer, "all").names == ("1.weight", "1.bias")


def test_anchor_device_cpu():
    live = LiveWeights(make_model(0), "all", anchor_device="cpu")
    assert {t.device.type for t in live.state_dict().values()} == {"cpu"}
