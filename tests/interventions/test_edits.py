"""Interventions on one matrix, and which parts each intervention hands to which rule."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_model

from effopd.errors import ConfigError
from effopd.interventions.edits import (
    component_count,
    components,
    interpolated,
    norm_scaled,
    random_direction,
    rescaled,
)
from effopd.interventions.kinds import INTERVENTIONS, reference_points
from effopd.interventions.options import InterventionOptions
from effopd.interventions.part_kinds import default_half_width
from effopd.interventions.points import BASE, PointInputs
from effopd.weights import MODULES, Part, Place, Update
from effopd.weights.parts import parts_of

MODEL = make_model(0)
PARTS = parts_of(MODEL.config.to_dict(), {name: tuple(p.shape) for name, p in MODEL.named_parameters()})
RUNS = {"opd#0": [0, 2, 4], "opd#1": [0, 2, 4], "rl": [0, 2, 4]}


def make_update(shape=(12, 8), seed=0, rank=None, part=None) -> Update:
    """A float32 base and a trained matrix; with `rank`, the update is b a."""
    generator = torch.Generator().manual_seed(seed)
    part = part or Part("w", Place(0, "mlp", "up"), tuple(shape))
    base = torch.randn(part.shape, generator=generator)
    if rank is None:
        return Update(part, base, base + 0.01 * torch.randn(part.shape, generator=generator))
    b = torch.randn(part.shape[0], rank, generator=generator, dtype=torch.float64)
    return Update(part, base, factors=(b, torch.randn(rank, part.shape[1], generator=generator, dtype=torch.float64)))


def make_inputs(**options) -> PointInputs:
    def norms(run):
        return {part: 1.0 + i + 10.0 * list(RUNS).index(run) for i, part in enumerate(PARTS)}

    return PointInputs(PARTS, RUNS, norms, InterventionOptions(**options))


def all_points(**options):
    inputs = make_inputs(**options)
    return {name: kind.points(inputs) for name, kind in INTERVENTIONS.items()}


@pytest.mark.parametrize("rank", [None, 3])
def test_interpolation_ends_are_exact_and_the_middle_is_half_the_norm(rank):
    update = make_update(rank=rank)
    assert interpolated(update, 0.0) is None
    assert torch.equal(interpolated(update, 1.0), update.trained)
    half = interpolated(update, 0.5) - update.base.double()
    assert half.norm().item() == pytest.approx(0.5 * update.norm(), rel=1e-12)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_components_are_those_of_a_reference_svd(shape, rank, k):
    update = make_update(shape, rank=rank)
    u, s, vt = np.linalg.svd(update.delta().numpy(), full_matrices=False)
    s[3 if rank else len(s) :] = 0
    top, bottom = (u[:, :k] * s[:k]) @ vt[:k], (u[:, -k:] * s[-k:]) @ vt[-k:]
    np.testing.assert_allclose(components(update, k, "top"), top, atol=1e-12)
    np.testing.assert_allclose(components(update, k, "bottom"), bottom, atol=1e-12)


def test_leading_and_trailing_components_add_up_and_are_orthogonal():
    update = make_update()
    top, bottom = components(update, 3, "top"), components(update, 5, "bottom")
    torch.testing.assert_close(top + bottom, update.delta(), rtol=0, atol=1e-14)
    assert abs((top * bottom).sum().item()) < 1e-14
    assert torch.equal(components(update, 8, "top"), update.delta())


def test_component_count_is_exact_in_the_decimal_typed():
    assert component_count(0.07, 10000) == 7 and component_count(10, 30) == 3  # floating point says 8
    assert component_count(1, 128) == 2 and component_count(0.001, 128) == 1 and component_count(100, 128) == 128


@pytest.mark.parametrize("rank", [None, 3])
def test_update_norm_is_frobenius(rank):
    update = make_update(rank=rank)
    assert update.norm() == pytest.approx(update.delta().norm().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(12, 8), (7,)])
def test_norm_scaling_reaches_the_final_norm_at_one(shape):
    delta = make_update(shape).delta()
    assert norm_scaled(delta, 3.0, 1.0).norm().item() == pytest.approx(3.0, rel=1e-12)
    assert torch.equal(norm_scaled(delta, 3.0, 0.0), delta)
    own = delta.norm().item()
    assert norm_scaled(delta, 3.0, 1.6).norm().item() == pytest.approx(own + 1.6 * (3.0 - own), rel=1e-12)
    assert not norm_scaled(torch.zeros(shape), 3.0, 1.0).any() and not rescaled(torch.zeros(shape), 3.0).any()


def test_random_directions_have_the_norm_and_depend_on_seed_and_name_only():
    state = torch.get_rng_state()
    one = random_direction((40, 30), 2.5, 0, "w")
    assert torch.equal(torch.get_rng_state(), state)
    assert one.norm().item() == pytest.approx(2.5, rel=1e-12) and one.dtype == torch.float64
    assert torch.equal(one, random_direction((40, 30), 2.5, 0, "w"))
    for other in (random_direction((40, 30), 2.5, 1, "w"), random_direction((40, 30), 2.5, 0, "v")):
        assert abs((one * other).sum().item()) / 2.5**2 < 0.1
    assert random_direction((5,), 0.0, 0, "w").norm() == 0


# -- points ----------------------------------------------------------------------------------------


def test_ids_are_unique_and_safe_as_paths():
    points = [*reference_points(make_inputs()), *(p for found in all_points().values() for p in found)]
    ids = [point.id for point in points]
    assert len(set(ids)) == len(ids)
    assert all(len(name.split("/")) <= 3 and not set(name) & set('\\:*?"<>| ') for name in ids)


def test_every_option_is_read_by_an_intervention():
    read = [name for kind in INTERVENTIONS.values() for name in kind.options]
    assert sorted(read) == sorted(field.name for field in dataclasses.fields(InterventionOptions))


def test_equal_models_are_named_alike_and_others_are_not():
    found = all_points(early_steps=None)
    trained = {point.run: point.same_model for point in reference_points(make_inputs())}
    assert trained["base"] == BASE
    for run in RUNS:
        (alpha_0,) = [p for p in found["alpha"] if p.run == run and p.coordinates["alpha"] == 0]
        (alpha_1,) = [p for p in found["alpha"] if p.run == run and p.coordinates["alpha"] == 1]
        tops = [p for p in found["rank"] if p.run == run and p.coordinates["percent"] == 100]
        (last,) = [p for p in found["trajectory"] if p.run == run and p.coordinates["step"] == 4]
        assert alpha_0.same_model == BASE
        assert {alpha_1.same_model, last.same_model, *(p.same_model for p in tops)} == {trained[run]}
    names = {p.same_model for p in found["norm_scaling"]} & {p.same_model for p in found["trajectory"]}
    assert names == {"trained/opd#0/1", "trained/opd#1/1", "trained/rl/1"}  # β = 0 is W_t itself
    shared = INTERVENTIONS["rank"].points(make_inputs(rank_norm="shared", ends=["top"]))
    assert not any(p.model for p in [*shared, *INTERVENTIONS["random"].points(make_inputs())])


def test_windows_are_cut_at_the_ends():
    for half, expected in ((0, [1, 1]), (1, [2, 2])):
        points = [p for p in INTERVENTIONS["window"].points(make_inputs(half_width=half)) if p.run == "rl"]
        for module in ("mlp", "attention"):
            found = [p for p in points if p.coordinates["module"] == module]
            layers = [{part.place.layer for part in PARTS if p.selects(part)} for p in found]
            assert [len(layer) for layer in layers] == expected
            assert all(part.place.module == module for p in found for part in PARTS if p.selects(part))
            norms = make_inputs().norms("rl")
            squares = sum(norms[x] ** 2 for x in PARTS if x.place.module == module and x.place.layer == 1)
            assert found[1].measures["layer_norm"] == pytest.approx(math.sqrt(squares))
    assert [default_half_width(n) for n in (1, 2, 4, 14, 28, 36)] == [0, 1, 1, 4, 8, 8]


def test_swaps_partition_the_model():
    points = [p for p in INTERVENTIONS["swap"].points(make_inputs()) if p.run == "rl"]
    units = {p.coordinates["unit"] for p in points}
    assert units == {"embedding", "attention", "mlp", "norm", "layer_0", "layer_1"}  # tied: no head; nothing is other
    sides = {(p.coordinates["unit"], p.coordinates["side"]): p for p in points}
    for unit in units:
        assert all(sides[unit, "only"].selects(part) != sides[unit, "without"].selects(part) for part in PARTS)
    modules = [p for (unit, side), p in sides.items() if unit in MODULES and side == "only"]
    assert all(sum(p.selects(part) for p in modules) == 1 for part in PARTS)
    (embedding,) = [p for p in INTERVENTIONS["embedding"].points(make_inputs()) if p.run == "rl"]
    assert embedding.same_model == sides["embedding", "without"].same_model


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("norm", ["own", "full", "shared"])
def test_rank_points_keep_the_norm_that_was_asked_for(norm, rank):
    part = next(part for part in PARTS if part.place.module == "mlp")
    update = make_update(part=part, rank=rank)
    inputs = make_inputs(rank_norm=norm, percents=[10.0, 100.0])
    mean = sum(inputs.norms(run)[part] for run in RUNS) / len(RUNS)
    for run in RUNS:
        low, full = (p for p in INTERVENTIONS["rank"].points(inputs) if p.run == run and p.coordinates["end"] == "top")
        move = low.edit(update) - update.base.double()
        k = component_count(10.0, min(part.shape))
        kept = components(update, k, "top").norm().item()
        expected = {"own": kept, "full": update.norm(), "shared": mean}[norm]
        assert move.norm().item() == pytest.approx(expected, rel=1e-12)
        assert np.linalg.matrix_rank(move.numpy(), tol=1e-9) == k
        if norm == "shared":
            assert (full.edit(update) - update.base.double()).norm().item() == pytest.approx(mean, rel=1e-12)
        else:
            assert torch.equal(full.edit(update), update.trained)
        bottom = next(
            p for p in INTERVENTIONS["rank"].points(inputs) if p.run == run and p.coordinates["end"] == "bottom"
        )
        left = (bottom.edit(update) - update.base.double()).norm().item()
        assert left == pytest.approx(components(update, k, "bottom").norm().item(), rel=1e-9, abs=1e-13)


def test_the_rest_of_a_rank_point_is_trained_or_base():
    vector = next(part for part in PARTS if part.place.module == "norm")
    update = make_update(part=vector)
    trained = INTERVENTIONS["rank"].points(make_inputs())[0]
    assert trained.selects(vector) and torch.equal(trained.edit(update), update.trained)
    base = INTERVENTIONS["rank"].points(make_inputs(rest="base"))
    assert not any(p.selects(vector) or p.model for p in base)


def test_norm_scaling_of_a_zero_update_leaves_the_base():
    part = PARTS[3]
    base = torch.ones(part.shape)
    points = [p for p in INTERVENTIONS["norm_scaling"].points(make_inputs()) if p.coordinates["beta"] == 1]
    assert {(p.run, p.coordinates["step"], p.snapshot) for p in points} == {(run, 2, 1) for run in RUNS}
    assert points[0].edit(Update(part, base, base.clone())) is None


def test_interventions_that_need_a_trajectory_say_so():
    inputs = PointInputs(PARTS, {"rl": [None]}, lambda run: {}, InterventionOptions())
    for name in ("trajectory", "norm_scaling"):
        with pytest.raises(ConfigError, match="'rl' is a single checkpoint"):
            INTERVENTIONS[name].points(inputs)
    with pytest.raises(ConfigError, match=r"no step 3 before its last, 4.*among: 2"):
        INTERVENTIONS["norm_scaling"].points(make_inputs(early_steps=[2, 3]))
    lone = PointInputs(
        [part for part in PARTS if part.place.layer is None], RUNS, lambda run: {}, InterventionOptions()
    )
    with pytest.raises(ConfigError, match="layer"):
        INTERVENTIONS["window"].points(lone)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alphas", []), ("alphas", [float("nan")]), ("alphas", ["x"]), ("percents", [0.0]), ("percents", [101.0]),
        ("ends", ["middle"]), ("rank_norm", "mine"), ("rest", "none"), ("betas", [float("inf")]), ("half_width", -1),
        ("random_seeds", [-1]),
    ],
)  # fmt: skip
def test_bad_options_name_the_field(field, value):
    with pytest.raises(ConfigError, match=field):
        InterventionOptions(**{field: value})
