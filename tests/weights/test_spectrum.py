"""Every spectral metric equals numpy's float64 SVD, on the shapes of spectra that break
shortcuts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from effopd.weights import spectrum
from effopd.weights.blocks import Blocks
from effopd.weights.spectrum import (
    factor_singular_values,
    noise_effective_rank,
    singular_values,
    spectrum_metrics,
)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    size = len(values)
    return (orthonormal(rows, size, 1) * values.double()) @ orthonormal(columns, size, 2).T


def noise(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cases(rows: int, columns: int) -> dict[str, torch.Tensor]:
    size = min(rows, columns)
    low_rank = with_spectrum(torch.linspace(3, 1, 8), rows, columns)
    repeated = torch.ones(size)
    repeated[:5] = 4.0
    return {
        "random": noise(rows, columns),
        "low rank plus noise": low_rank + 1e-2 * noise(rows, columns) / math.sqrt(columns),
        "low rank plus faint noise": low_rank + 1e-7 * noise(rows, columns) / math.sqrt(columns),
        "repeated": with_spectrum(repeated, rows, columns),
        "rank-deficient": low_rank,
        "graded": with_spectrum(0.9 ** torch.arange(size), rows, columns),
        "zero": torch.zeros(rows, columns, dtype=torch.float64),
        "one entry": torch.zeros(rows, columns, dtype=torch.float64).index_put(
            (torch.tensor([1]), torch.tensor([2])), torch.tensor(-2.0, dtype=torch.float64)
        ),
    }


def reference(delta: np.ndarray) -> dict[str, float]:
    s = np.linalg.svd(delta, compute_uv=False)
    p = s[s > 0] / s.sum() if s.sum() else s
    return {
        "frobenius_norm": np.linalg.norm(delta),
        "spectral_norm": s[0],
        "spectral_to_frobenius": s[0] / np.linalg.norm(s) if s[0] else math.nan,
        "stable_rank": (np.linalg.norm(s) / s[0]) ** 2 if s[0] else math.nan,
        "effective_rank": math.exp(-(p * np.log(p)).sum()) if s[0] else math.nan,
        "top1pct_norm_ratio": np.linalg.norm(s[: math.ceil(len(s) / 100)]) / np.linalg.norm(s) if s[0] else math.nan,
    }


@pytest.mark.parametrize("direct", [10**9, 0], ids=["direct", "gram"])
@pytest.mark.parametrize("shape", [(96, 250), (250, 96), (130, 130)])
@pytest.mark.parametrize("case", cases(8, 8))
def test_metrics_equal_a_float64_svd(case, shape, direct, monkeypatch):
    monkeypatch.setattr(spectrum, "DIRECT", direct)
    monkeypatch.setattr("effopd.weights.blocks._BLOCK", 96 * 40)  # several blocks, the last one smaller
    delta = cases(*shape)[case]
    found = spectrum_metrics(singular_values(delta), shape)
    for name, value in reference(delta.numpy()).items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-300, nan_ok=True), name


def test_squaring_alone_would_not_do(monkeypatch):
    """The QR path is needed: without it a rank-deficient matrix fails the test above."""
    monkeypatch.setattr(spectrum, "DIRECT", 0)
    delta = cases(250, 250)["rank-deficient"]
    right = reference(delta.numpy())["effective_rank"]
    monkeypatch.setattr(spectrum, "_is_safe", lambda s_R: True)
    wrong = spectrum_metrics(singular_values(delta), (250, 250))["effective_rank"]
    assert abs(wrong / right - 1) > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_difference_is_taken_in_float64(dtype, monkeypatch):
    monkeypatch.setattr(spectrum, "DIRECT", 0)
    base = noise(60, 90).to(dtype)
    trained = (base.double() + 1e-3 * cases(60, 90)["low rank plus noise"]).to(dtype)
    delta = trained.double() - base.double()
    expected = np.linalg.svd(delta.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(trained, base).numpy(), expected, rtol=1e-9, atol=1e-12 * expected[0])


def test_a_base_of_another_dtype():
    base = noise(20, 30).bfloat16()
    trained = noise(20, 30).float()
    expected = np.linalg.svd((trained.double() - base.double()).numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(trained, base).numpy(), expected, rtol=1e-9, atol=1e-12 * expected[0])


def test_equal_weights_are_a_zero_update():
    base = noise(500, 600).bfloat16()
    metrics = spectrum_metrics(singular_values(base, base), (500, 600))
    assert metrics["frobenius_norm"] == metrics["spectral_norm"] == 0.0
    assert math.isnan(metrics["effective_rank"])


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_factors_equal_their_product(shape):
    b, a = noise(shape[0], 6), noise(6, shape[1])
    expected = np.linalg.svd((b @ a).numpy(), compute_uv=False)
    found = factor_singular_values(b, a)
    assert found.shape == (40,)
    np.testing.assert_allclose(found[:6].numpy(), expected[:6], rtol=1e-12)
    assert (found[6:] == 0).all()


def test_factors_wider_than_the_matrix():
    b, a = noise(5, 12), noise(12, 30)
    np.testing.assert_allclose(
        factor_singular_values(b, a).numpy(), np.linalg.svd((b @ a).numpy(), compute_uv=False), rtol=1e-10
    )


@pytest.mark.parametrize("shape", [(512, 512), (256, 768)])
def test_noise_floor_is_that_of_bf16_rounding(shape):
    weights = 0.02 * noise(*shape)
    rounding = weights.bfloat16().double() - weights
    measured = spectrum_metrics(singular_values(rounding), shape)
    assert measured["effective_rank"] == pytest.approx(measured["effective_rank_noise_floor"], rel=0.005)


def test_noise_floor_of_a_single_row_is_one():
    assert noise_effective_rank(1, 10**9) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [(torch.zeros(3), None), (torch.zeros(2, 3), torch.zeros(3, 2))])
def test_not_two_matrices_of_one_shape(bad):
    with pytest.raises(ValueError, match="expected one matrix, or two of the same shape"):
        singular_values(*bad)


@pytest.mark.parametrize("shape", [(7, 33), (33, 7)])
def test_blocks_are_the_matrix(shape, monkeypatch):
    for name in ("_BLOCK", "_STRIP"):
        monkeypatch.setattr(f"effopd.weights.blocks.{name}", 7 * 5)
    trained, base = noise(*shape), torch.ones(shape).double()
    delta = trained - base
    blocks = Blocks.of(trained, base)
    wide = delta.T if shape[0] > shape[1] else delta
    assert torch.equal(blocks.dense(), wide)
    x = noise(33, 4)
    torch.testing.assert_close(blocks.times(x), wide @ x)
    torch.testing.assert_close(blocks.transposed_times(x[:7]), wide.T @ x[:7])
