"""The control direction: as long as the displacement, otherwise nothing to do with it, and
reproducible.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from effopd.extrapolate.strategies.random_direction import random_like, seed_of


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(300, 200), (7,), (2, 3, 4), (1, 1), ()])
def test_same_length_shape_and_dtype(shape, length):
    displacement = length * torch.randn(shape, generator=generator(1))
    noise = random_like(displacement, generator())
    assert noise.shape == displacement.shape and noise.dtype == displacement.dtype
    assert float(noise.double().norm()) == pytest.approx(float(displacement.double().norm()), rel=1e-6)


def test_it_does_not_know_the_displacement():
    displacement = torch.randn(300, 200, generator=generator(1))
    noise = random_like(displacement, generator())
    cosine = float(torch.dot(noise.flatten(), displacement.flatten()) / noise.norm() / displacement.norm())
    assert abs(cosine) < 5 / (300 * 200) ** 0.5
    turned = random_like(displacement.flip(0), generator())
    assert torch.equal(noise, turned)


def test_the_generator_alone_decides():
    displacement = torch.ones(5, 4)
    first = random_like(displacement, generator())
    torch.manual_seed(123)
    assert torch.equal(first, random_like(displacement, generator()))
    assert not torch.equal(first, random_like(displacement, generator(1)))


def test_no_displacement_no_noise():
    assert torch.equal(random_like(torch.zeros(3, 2), generator()), torch.zeros(3, 2))


def test_seeds_differ_by_run_step_and_parameter():
    seeds = [seed_of(*key) for key in itertools.product((0, 1, 11), (1, 2, 11), ("q_proj", "k_proj", "1/q_proj"))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_everywhere():
    """Fixed values: a change would make old runs impossible to repeat."""
    assert seed_of(0, 1, "model.layers.0.mlp.up_proj.weight") == 2138657131486533514
    assert seed_of(3, 64, "w") == 771686655816010339
