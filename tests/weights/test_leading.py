"""Leading directions against a full float64 SVD, and a bound that holds."""

from __future__ import annotations

import math

import pytest
import torch
from weights.test_spectrum import noise, with_spectrum

from effopd.weights import leading
from effopd.weights.leading import leading_directions, leading_of_factors

SPECTRA = {
    "geometric": (0.9 ** torch.arange(60), 0.05),
    "power law": (1 / (1 + torch.arange(60)), 0.03),
    "slow": (1.5 * (1 - 0.01 * torch.arange(60)), 0.3),
    "mostly noise": (0.6 + 0.5 * (3 - torch.arange(60)).clamp(min=0), 1.0),
}


def update(name: str, shape: tuple[int, int]) -> torch.Tensor:
    values, scale = SPECTRA[name]
    return (with_spectrum(values, *shape) + scale * noise(*shape) / sum(size**0.5 for size in shape)).float()


def angle(a_MK: torch.Tensor, b_MK: torch.Tensor) -> float:
    """Largest principal angle (radians), from the sine so that small angles are exact."""
    rest = b_MK - a_MK @ (a_MK.T @ b_MK)
    return math.asin(min(1.0, float(torch.linalg.matrix_norm(rest, 2))))


@pytest.mark.parametrize("shape", [(450, 800), (800, 450)])
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_a_full_svd_within_its_bound(name, shape):
    delta = update(name, shape)
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    found = leading_directions(delta, k=20)
    torch.testing.assert_close(found.s_K, s[:20], rtol=1e-8, atol=0)
    assert found.next_value == pytest.approx(float(s[20]), rel=1e-3)
    for basis in (found.u_MK, found.v_NK):
        torch.testing.assert_close(basis.T @ basis, torch.eye(20).double(), rtol=0, atol=1e-10)
    for k in range(1, 21):
        worst = max(angle(u[:, :k], found.u_MK[:, :k]), angle(vt[:k].T, found.v_NK[:, :k]))
        assert worst <= found.angle_bound_K[k - 1] + 1e-10
        if (s[k - 1] - s[k]) / s[k - 1] > 1e-2:
            assert worst < 1e-4


def test_small_matrices_are_exact():
    delta = update("geometric", (60, 90))
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    found = leading_directions(delta, k=5)
    assert angle(u[:, :5], found.u_MK) < 1e-12
    torch.testing.assert_close(found.s_K, s[:5])
    torch.testing.assert_close((found.u_MK * found.s_K) @ found.v_NK.T, (u[:, :5] * s[:5]) @ vt[:5])


@pytest.mark.parametrize("shape", [(20, 30), (450, 500)])
def test_repeated_values_are_reported(shape):
    values = torch.ones(20)
    values[:4] = 3.0
    found = leading_directions(with_spectrum(values, *shape), k=4)
    assert (found.angle_bound_K[:3] > 0.1).all(), "the directions inside a repeated value cannot be told apart"
    assert found.angle_bound_K[3] < 1e-6


@pytest.mark.parametrize("shape", [(20, 30), (450, 500)])
def test_zero_and_rank_deficient_updates(shape):
    zero = leading_directions(torch.zeros(shape), k=3)
    assert (zero.s_K == 0).all() and torch.isfinite(zero.u_MK).all()
    assert (zero.angle_bound_K == math.pi / 2).all()
    delta = with_spectrum(torch.tensor([2.0, 1.0]), *shape)
    found = leading_directions(delta, k=4)
    torch.testing.assert_close(found.s_K, torch.tensor([2.0, 1, 0, 0]).double(), rtol=1e-9, atol=1e-7)
    assert found.angle_bound_K[1] < 1e-4
    torch.testing.assert_close((found.u_MK * found.s_K) @ found.v_NK.T, delta, rtol=0, atol=1e-7)


def test_deterministic_and_leaves_the_generator_alone():
    delta = update("power law", (450, 500))
    state = torch.get_rng_state()
    first, second = (leading_directions(delta, k=6) for _ in range(2))
    assert torch.equal(first.u_MK, second.u_MK)
    assert torch.equal(state, torch.get_rng_state())
    other = leading_directions(delta, k=6, seed=1)
    assert angle(first.u_MK, other.u_MK) < 1e-4


def test_a_base_is_subtracted():
    base, delta = noise(450, 500).float(), update("geometric", (450, 500))
    trained = base + delta
    direct = torch.linalg.svd(trained.double() - base.double(), full_matrices=False)
    found = leading_directions(trained, base, k=4)
    assert angle(direct.U[:, :4], found.u_MK) < 1e-4


def test_factors_equal_their_product():
    b, a = noise(60, 5), noise(5, 40)
    found, direct = leading_of_factors(b, a, k=8), leading_directions(b @ a, k=5)
    assert found.u_MK.shape == (60, 5) and found.next_value == 0.0
    assert angle(direct.u_MK, found.u_MK) < 1e-8 and angle(direct.v_NK, found.v_NK) < 1e-8
    torch.testing.assert_close(found.s_K, direct.s_K)


def test_the_limit_is_kept_when_nothing_converges(monkeypatch):
    """A spectrum without gaps ends at the limit, and the bound admits it."""
    monkeypatch.setattr(leading, "_LIMIT", 3)
    found = leading_directions(with_spectrum(torch.linspace(1.0, 0.999, 450), 450, 460), k=20)
    assert found.angle_bound_K.max() > 0.1


def test_k_below_one():
    with pytest.raises(ValueError, match="k must be at least 1"):
        leading_directions(torch.zeros(3, 4), k=0)


def few_entries(shape: tuple[int, int], cells: int) -> torch.Tensor:
    """An update of single entries among the first rows and columns, all of another size."""
    delta = torch.zeros(shape, dtype=torch.float64)
    for i in range(cells):
        delta[3 + i, 4 + i] = 1e-3 / (1 + i)
    return delta


def sparse(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(size, (40,), generator=generator) for size in shape)
    delta = torch.zeros(shape, dtype=torch.float64)
    delta[rows, columns] = torch.rand(40, generator=generator, dtype=torch.float64)
    return delta


def one_row_twice(shape: tuple[int, int]) -> torch.Tensor:
    delta = torch.zeros(shape, dtype=torch.float64)
    delta[5] = delta[7] = noise(1, shape[1])[0]
    return delta


DEGENERATE = {
    "zero": torch.zeros,
    "one entry": lambda shape: few_entries(shape, 1),
    "two entries": lambda shape: few_entries(shape, 2),
    "one row, twice": one_row_twice,
    "sparse": sparse,
    "repeated values": lambda shape: with_spectrum(torch.tensor([3.0, 3.0, 1.0, 1.0]), *shape),
    **{f"rank {r}": lambda shape, r=r: noise(shape[0], r) @ noise(r, shape[1]) for r in (1, 2, 5, 26, 30)},
    "steep": lambda shape: with_spectrum(0.1 ** torch.arange(16).double(), *shape),
    "tiny": lambda shape: 1e-30 * noise(*shape),
    "huge": lambda shape: 1e30 * noise(*shape),
}


@pytest.mark.parametrize("shape", [(30, 40), (400, 420), (420, 400)])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_updates(name, shape):
    delta = DEGENERATE[name](shape).double()
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    found = leading_directions(delta, k=20)
    torch.testing.assert_close(found.s_K, s[:20], rtol=1e-7, atol=1e-10 * float(s[0]))
    for basis in (found.u_MK, found.v_NK):
        torch.testing.assert_close(basis.T @ basis, torch.eye(20).double(), rtol=0, atol=1e-9)
    for k in range(1, 21):
        worst = max(angle(u[:, :k], found.u_MK[:, :k]), angle(vt[:k].T, found.v_NK[:, :k]))
        assert worst <= found.angle_bound_K[k - 1] + 1e-9
    if s[20] < 1e-12 * s[0]:  # nothing is left out
        torch.testing.assert_close((found.u_MK * found.s_K) @ found.v_NK.T, delta, rtol=0, atol=1e-9 * float(s[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_changed_entry_in_every_dtype(dtype):
    base = torch.ones(400, 500, dtype=dtype)
    trained = base.clone()
    trained[3, 4] += 0.5
    found = leading_directions(trained, base, k=20)
    assert found.s_K.tolist() == pytest.approx([0.5] + [0.0] * 19, abs=1e-12)
    assert abs(found.u_MK[3, 0]) == pytest.approx(1) and abs(found.v_NK[4, 0]) == pytest.approx(1)
    assert found.angle_bound_K[0] < 1e-9
