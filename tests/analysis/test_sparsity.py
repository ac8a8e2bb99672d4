"""Entrywise metrics: equal to naive numpy whatever the dtype, layout and block size, with ties
counted fairly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from effopd.analysis import sparsity as entries
from effopd.analysis.sparsity import entry_metrics, principal_overlap
from effopd.errors import WeightsError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
_MANTISSA = {
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
    torch.float32: (23, -126),
    torch.float64: (52, -1022),
}


def pair(*shape: int, dtype: torch.dtype, noise: float = 1e-3, seed: int = 0, scale: float = 0.02):
    generator = torch.Generator().manual_seed(seed)
    base = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    moved = torch.rand(*shape, generator=generator) < 0.5
    trained = base + scale * noise * torch.randn(*shape, generator=generator, dtype=torch.float64) * moved
    base, trained = base.to(dtype), trained.to(dtype)
    base.view(-1)[::7] = 0.0
    trained.view(-1)[::14] = -0.0
    return base, trained


def expected_share(magnitude: np.ndarray, changed: np.ndarray, m: int) -> float:
    """Mean share of the changed entries among the m smallest, ties broken at random: by sorting."""
    threshold = np.sort(magnitude.ravel())[m - 1] if m else -1.0
    below, tied = magnitude < threshold, magnitude == threshold
    weight = (m - below.sum()) / tied.sum() if m else 0.0
    return float((changed & below).sum() + weight * (changed & tied).sum()) / changed.sum()


def ulps(x: torch.Tensor) -> np.ndarray:
    mantissa, lowest = _MANTISSA[x.dtype]
    values = np.abs(x.double().numpy())
    exponent = np.floor(np.log2(np.where(values > 0, values, 2.0**lowest)))
    return 2.0 ** (np.maximum(exponent, lowest) - mantissa)


def naive(base: torch.Tensor, trained: torch.Tensor) -> dict[str, float]:
    b, w = base.double().numpy(), trained.double().numpy()
    changed = (base.to(torch.bfloat16).double() != trained.to(torch.bfloat16).double()).numpy()
    delta, m = w - b, math.floor(0.3 * b.size)
    noise = math.sqrt((ulps(base) ** 2 + ulps(trained) ** 2).sum() / 12)
    return {
        "bf16_unchanged_share": 1 - changed.mean(),
        "update_density": (np.abs(delta) > 1e-3 * np.maximum(np.abs(b), np.abs(w))).mean(),
        "max_abs_update": np.abs(delta).max(),
        "relative_norm": np.linalg.norm(delta) / np.linalg.norm(b),
        "low_magnitude_overlap": expected_share(np.abs(b), changed, m),
        "low_magnitude_overlap_chance": m / b.size,
        "rounding_noise_to_update": noise / np.linalg.norm(delta),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 53), (1000,), (3, 5, 7, 11), (1, 9), (10,)])
@pytest.mark.parametrize("block", [500, 2**18])
def test_equal_to_naive_numpy(dtype, shape, block, monkeypatch):
    monkeypatch.setattr(entries, "_BLOCK", block)
    base, trained = pair(*shape, dtype=dtype, noise=0.1)
    before = base.clone(), trained.clone()
    assert entry_metrics(base, trained) == pytest.approx(naive(base, trained), rel=1e-12)
    assert torch.equal(base, before[0]) and torch.equal(trained, before[1])


@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_the_two_sides_may_be_stored_differently(dtype, other):
    base, trained = pair(60, 50, dtype=torch.float64, noise=0.1)
    base, trained = base.to(dtype), trained.to(other)
    assert entry_metrics(base, trained) == pytest.approx(naive(base, trained), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_matter(dtype, monkeypatch):
    monkeypatch.setattr(entries, "_BLOCK", 500)
    base, trained = pair(40, 60, dtype=dtype, noise=0.1)
    whole = entry_metrics(base, trained)
    for view in (lambda x: x.T, lambda x: x.T.contiguous().T, lambda x: x.reshape(4, 10, 60).transpose(0, 2)):
        assert entry_metrics(view(base), view(trained)) == pytest.approx(whole, rel=1e-12)
    assert entry_metrics(base, trained.T.contiguous().T) == pytest.approx(whole, rel=1e-12)
    sliced = entry_metrics(base[5:20, ::2], trained[5:20, ::2])
    assert sliced == pytest.approx(naive(base[5:20, ::2], trained[5:20, ::2]), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_update_is_no_change(dtype):
    base, _ = pair(30, 30, dtype=dtype)
    metrics = entry_metrics(base, base.clone())
    assert metrics["bf16_unchanged_share"] == 1.0
    assert metrics["update_density"] == metrics["max_abs_update"] == metrics["relative_norm"] == 0.0
    assert math.isnan(metrics["low_magnitude_overlap"]) and math.isnan(metrics["rounding_noise_to_update"])
    negative_zero = torch.zeros(4, dtype=dtype)
    assert entry_metrics(negative_zero, -negative_zero)["bf16_unchanged_share"] == 1.0


def test_what_bf16_cannot_hold_is_unchanged_and_what_is_small_is_not_dense():
    base = torch.ones(100)
    metrics = entry_metrics(base, base + 5e-4)
    assert metrics["bf16_unchanged_share"] == 1.0 and metrics["update_density"] == 0.0
    metrics = entry_metrics(base, base + 2e-3)
    assert metrics["bf16_unchanged_share"] == 1.0 and metrics["update_density"] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_masks_overlap_by_chance(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 300, generator=generator, dtype=torch.float64).to(dtype)
    trained = torch.where(torch.rand(300, 300, generator=generator) < 0.4, 2 * base, base)
    metrics = entry_metrics(base, trained)
    assert metrics["low_magnitude_overlap"] == pytest.approx(0.3, abs=0.01)
    assert metrics["low_magnitude_overlap_chance"] == pytest.approx(0.3, abs=1e-4)
    u, s, vt = torch.linalg.svd(base.double())
    assert principal_overlap(base, trained, u[:, :9], s[:9], vt[:9].T) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_that_are_the_smallest_or_the_largest_entries(dtype):
    base = torch.arange(1, 201, dtype=torch.float64).reshape(20, 10).to(dtype)  # all distinct in every dtype
    assert len(base.unique()) == 200
    for threshold, overlap in ((61, 1.0), (121, 0.5)):
        assert entry_metrics(base, torch.where(base < threshold, -base, base))["low_magnitude_overlap"] == overlap
    assert entry_metrics(base, torch.where(base > 60, -base, base))["low_magnitude_overlap"] == 0.0


def test_ties_count_as_if_broken_at_random():
    base = torch.ones(10, dtype=torch.bfloat16)
    base[:2] = 0.5
    trained = base.clone()
    trained[[0, 4, 5]] = 3.0
    # three count: both halves, and one of eight ones, drawn at random: (1 + 2 · 1/8) / 3
    assert entry_metrics(base, trained)["low_magnitude_overlap"] == pytest.approx(1.25 / 3)
    assert entry_metrics(torch.zeros(10), torch.ones(10))["low_magnitude_overlap"] == pytest.approx(0.3)


def test_ulps_of_zeros_and_subnormals_and_powers_of_two():
    for dtype, (mantissa, lowest) in _MANTISSA.items():
        tiny = 2.0**lowest
        base = torch.tensor([0.0, tiny, tiny / 2, 1.0, 1.5, 2.0], dtype=dtype)
        update = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=dtype)
        smallest, one = 2.0 ** (lowest - mantissa), 2.0**-mantissa
        square = 2 * (3 * smallest**2 + 2 * one**2 + (2 * one) ** 2)
        found = entry_metrics(base, base + update)["rounding_noise_to_update"]
        assert found == pytest.approx(math.sqrt(square / 12), rel=1e-14)


def test_rounding_noise_predicts_what_rounding_does():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 400, generator=generator, dtype=torch.float64)
    other = torch.randn(400, 400, generator=generator, dtype=torch.float64)
    exact = (other - base).norm()
    rounded = entry_metrics(base.to(torch.bfloat16), other.to(torch.bfloat16))
    error = (other.to(torch.bfloat16).double() - base.to(torch.bfloat16).double() - (other - base)).norm()
    assert rounded["rounding_noise_to_update"] == pytest.approx(float(error / exact), rel=0.02)


def rebuilt_overlap(base, trained, u, s, v, alpha: float) -> float:
    rebuilt = np.abs(((u * s) @ v.T).numpy().astype(np.float32))
    changed = (base.to(torch.bfloat16) != trained.to(torch.bfloat16)).numpy()
    return 1.0 - expected_share(rebuilt, changed, changed.size - math.floor(alpha * changed.size))


@pytest.mark.parametrize("block", [700, 2**18])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 0.0])
def test_principal_overlap_equals_naive_numpy(block, alpha, monkeypatch):
    monkeypatch.setattr(entries, "_BLOCK", block)
    base, trained = pair(50, 70, dtype=torch.bfloat16, noise=0.1)
    u, s, vt = torch.linalg.svd(base.double(), full_matrices=False)
    triplets = u[:, :5], s[:5], vt[:5].T
    expected = rebuilt_overlap(base, trained, *triplets, alpha)
    assert principal_overlap(base, trained, *triplets, alpha=alpha) == pytest.approx(expected, abs=1e-9)
    transposed = principal_overlap(base.T, trained.T, triplets[2], triplets[1], triplets[0], alpha=alpha)
    assert transposed == pytest.approx(expected, abs=1e-9)


def test_principal_overlap_at_its_ends():
    u, v = torch.linalg.qr(torch.arange(1.0, 21).reshape(10, 2).double()).Q[:, :1], torch.eye(8).double()[:, :1]
    base = (u @ v.T).float()  # one column carries everything
    first, rest = torch.ones(10, 8), torch.ones(10, 8)
    first[:, 1:], rest[:, 0] = 0.0, 0.0
    s = torch.ones(1)
    assert principal_overlap(base, base + first, u, s, v, alpha=10 / 80) == 1.0
    assert principal_overlap(base, base + rest, u, s, v, alpha=10 / 80) == 0.0
    assert principal_overlap(base, base + rest, u, s, v, alpha=45 / 80) == pytest.approx(0.5)  # 35 of 70 ties
    assert math.isnan(principal_overlap(base, base, u, s, v))


def test_nothing_in_nan_out_and_bad_input_is_refused():
    assert all(math.isnan(value) for value in entry_metrics(torch.ones(0, 3), torch.ones(0, 3)).values())
    assert math.isnan(entry_metrics(torch.zeros(3), torch.ones(3))["relative_norm"])
    with pytest.raises(WeightsError, match=r"\(3,\) and \(4,\)"):
        entry_metrics(torch.ones(3), torch.ones(4))
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(WeightsError, match="Dequantize"):
            entry_metrics(torch.ones(3).to(dtype), torch.ones(3).to(dtype))
    matrix = torch.ones(4, 6)
    u, v = torch.eye(4)[:, :2], torch.eye(6)[:, :2]
    with pytest.raises(WeightsError, match="singular triplets"):
        principal_overlap(matrix, matrix, v, torch.ones(2), u)
    with pytest.raises(ValueError, match="alpha"):
        principal_overlap(matrix, matrix, u, torch.ones(2), v, alpha=1.5)
