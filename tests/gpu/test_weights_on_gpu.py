"""Moves of live weights on the GPU: closed form, exact restore, host anchor, memory."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_checkpoints import save_base, save_trained
from helpers.tiny_models import make_model
from peft import LoraConfig, get_peft_model

from effopd import analyze
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.lora_weights import LoraWeights, adapted

pytestmark = pytest.mark.gpu

SCALES = (2.0, -0.5, 64.0, 2.0)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def noise(parameter, generator, size=0.05):
    """Noise that is the same on every device."""
    return (size * torch.randn(parameter.shape, generator=generator)).to(parameter.device, parameter.dtype)


@torch.no_grad()
def nudge(model, only="", seed=3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.add_(noise(parameter, generator))


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@DTYPES
def test_moves_are_the_closed_form_and_restore_bit_for_bit(device, dtype):
    model = make_model(0).to(device, dtype)
    weights, start = LiveWeights(model, "all"), bits(model)
    nudge(model)
    now = bits(model)
    weights.begin()
    rounding = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    for scale in SCALES:
        weights.move_to(scale)
        for name, parameter in model.named_parameters():
            target = now[name].double() + scale * (now[name].double() - start[name].double())
            torch.testing.assert_close(parameter.detach().double(), target, **rounding)
    weights.restore()
    assert same(bits(model), now)
    weights.move_to(2.0)
    weights.abort()
    assert same(bits(model), now)


@DTYPES
def test_an_anchor_in_host_memory_gives_the_same_bits(device, dtype):
    reached = []
    for anchor_device in (None, "cpu"):
        model = make_model(0).to(device, dtype)
        weights = LiveWeights(model, "all", anchor_device)
        if anchor_device == "cpu":
            assert {tensor.device.type for tensor in weights.state_dict().values()} == {"cpu"}
            assert all(tensor.is_pinned() for tensor in weights.state_dict().values()) == (device == "cuda")
        nudge(model)
        weights.begin()
        weights.move_to(5.5)
        reached.append(bits(model))
        weights.commit()
        assert weights.displacement_norm() == 0.0
    assert same(*reached)


@DTYPES
def test_memory_beside_the_model_is_anchor_and_origin(device, dtype):
    model = make_model(0, vocab_size=4096, hidden=256).to(device, dtype)
    numel, width = sum(p.numel() for p in model.parameters()), dtype.itemsize
    largest = max(p.numel() for p in model.parameters())

    def allocated():
        return torch.cuda.memory_allocated() if device == "cuda" else None

    before = allocated()
    weights = LiveWeights(model, "all")
    assert weights.nbytes == 4 * numel
    nudge(model)
    weights.begin()
    assert weights.nbytes == (4 + width) * numel
    if device == "cuda":
        blocks = 2 * 512 * len(list(model.parameters()))  # the allocator rounds up to 512 bytes
        assert 0 <= allocated() - before - weights.nbytes <= blocks
        torch.cuda.reset_peak_memory_stats()
        held = allocated()
        weights.move_to(2.0)
        assert torch.cuda.max_memory_allocated() - held <= 5 * 4 * largest + blocks
    weights.commit()
    assert weights.nbytes == 4 * numel


def lora(device):
    torch.manual_seed(0)
    model = get_peft_model(make_model(0), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    nudge(model, "lora_B", seed=1)
    return model.to(device)


def test_lora_factors_move_as_on_the_cpu(device):
    products = []
    for place in ("cpu", device):
        model = lora(place)
        weights = LoraWeights(model, "all")
        nudge(model, "lora_")
        now = bits(model)
        weights.begin()
        weights.move_to(4.0)
        products.append({name: (b @ a).detach().cpu() for name, (a, b), _ in adapted(model)})
        weights.restore()
        assert same(bits(model), now)
    for name, product in products[0].items():
        torch.testing.assert_close(products[1][name], product, rtol=1e-3, atol=1e-4)


def test_an_analysis_equals_that_on_the_cpu(device, tmp_path):
    import pandas as pd

    base = save_base(tmp_path / "base")
    trained = save_trained(tmp_path / "trained", base, seed=1)
    tables = [
        analyze(base, {"opd": trained}, tmp_path / place, k=4, device=place, base_spectrum=True).tables
        for place in dict.fromkeys(("cpu", device))
    ]
    for name, path in tables[0].items():
        one, other = pd.read_parquet(path), pd.read_parquet(tables[-1][name])
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-6, check_exact=False)
