"""From curves to claims: planted speed-ups, pairing, censoring, round trips."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers.grid_runs import LR, evaluation
from helpers.grid_runs import planted_run as run

from effopd.common.files import append_row
from effopd.compare.grid_run import GridRun, SearchSummary, from_row, read_run, to_row
from effopd.compare.paired import median_with_interval, ratio
from effopd.compare.quality import area
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Claim, Roles
from effopd.compare.time_to_target import final_target
from effopd.errors import CheckpointError
from effopd.report.compare_lookup import Lookup
from effopd.report.compare_page import render
from effopd.report.compare_terminal import summary_tables


def results(runs, **roles):
    return analyze_runs(runs, Roles("plain", LR, **roles))


def speedup(found, strategy, axis="steps", target="reference_kl", task="t", against=LR, rate=LR):
    (row,) = [
        r for r in found["speedups"]
        if (r["strategy"], r["learning_rate"], r["axis"], r["target"], r["task"], r["against_learning_rate"])
        == (strategy, rate, axis, target, task, against)
    ]  # fmt: skip
    return row


def grid(seeds=5, **arms):
    runs = [run(seed=seed) for seed in range(seeds)]
    return runs + [run(name, seed=seed, **settings) for name, settings in arms.items() for seed in range(seeds)]


def test_a_planted_2x_is_found_and_a_planted_1x_is_not():
    found = results(grid(8, twice={"speed": 2.0}, same={}))
    twice, same = speedup(found, "twice"), speedup(found, "same")
    assert twice["low"] > 1.5 and twice["low"] <= 2.0 <= twice["high"] * 1.05
    assert same["low"] <= 1.0 <= (same["high"] or math.inf)


def test_the_baseline_is_exactly_1x_of_itself_and_so_is_its_twin():
    runs = [run(seed=seed) for seed in range(5)]
    twins = [dataclasses.replace(r, strategy="twin") for r in runs]
    found = results(runs + twins)
    for strategy in ("plain", "twin"):
        for axis in ("steps", "seconds", "generated_tokens", "forward_tokens"):
            row = speedup(found, strategy, axis)
            assert row["median"] == row["low"] == row["high"] == 1.0


def test_every_axis_has_its_own_cost():
    found = results(grid(twice={"speed": 2.0, "step_cost": 4.0}))
    steps, seconds = speedup(found, "twice"), speedup(found, "twice", "seconds")
    assert seconds["median"] == pytest.approx(steps["median"] / 4)


def test_pairing_is_by_seed():
    """Seeds differ threefold in how long they take; paired, that cancels."""
    slow = {0: 1.0, 1: 1.5, 2: 2.0, 3: 2.5, 4: 3.0}
    base = [run(seed=s, step_cost=c, noise=0.0) for s, c in slow.items()]
    paired = results(base + [run("x", seed=s, speed=2.0, step_cost=c, noise=0.0) for s, c in slow.items()])
    crossed = results(base + [run("x", seed=s, speed=2.0, step_cost=slow[4 - s], noise=0.0) for s in slow])
    tight, wide = speedup(paired, "x", "seconds"), speedup(crossed, "x", "seconds")
    assert tight["high"] / tight["low"] < 1.2 < wide["high"] / wide["low"]


def test_never_is_reported_as_never():
    found = results(grid(stuck={"floor": 0.5}))
    row = speedup(found, "stuck")
    assert row["median"] == 0.0 and row["censored"] == row["n"] == 5
    own = [r for r in found["runs"] if r["strategy"] == "stuck"]
    assert all(r["targets"]["reference_kl"]["reached"] is False for r in own)
    assert all(r["targets"]["reference_kl"]["steps"] is None for r in own)
    page = render(found, {})
    assert "| `stuck` | never" in page and "0 of 5" in page


def test_one_stuck_seed_lowers_the_median_instead_of_vanishing():
    good = grid(x={"speed": 2.0})
    bad = [run("x", seed=4, floor=0.5) if (r.strategy, r.seed) == ("x", 4) else r for r in good]
    assert speedup(results(bad), "x")["n"] == 5
    assert speedup(results(bad), "x")["low"] == 0.0 < speedup(results(good), "x")["low"]


def test_the_best_learning_rate_is_the_fastest_that_arrives():
    runs = [
        run(rate=rate, seed=seed, speed=speed, floor=floor)
        for seed in range(3)
        for rate, speed, floor in ((1e-5, 0.3, 0), (LR, 1.0, 0), (9e-5, 3.0, 0), (3e-4, 9.0, 0.5))
    ]
    found = results([*runs, *[run("x", seed=seed, speed=2.0) for seed in range(3)]])
    best = found["best_learning_rate"]["t"]
    assert best["reference_kl"] == best["best_kl"] == 9e-5
    assert found["lowest_learning_rate"] == {"t": 9e-5} and found["swept"] == {"t": [1e-5, LR, 9e-5, 3e-4]}
    assert speedup(found, "x", against="best")["median"] < 1.0 < speedup(found, "x")["median"]
    assert speedup(found, "plain", against="best", rate=9e-5)["median"] == 1.0
    # the target of the best learning rate is out of reach at the reference's, so everyone there is
    # beaten
    assert speedup(found, "plain", against="best", target="best_kl")["median"] == 0.0


def test_the_best_learning_rate_is_that_of_the_target():
    """A rate may be the first at nine tenths of the way and never arrive at the end."""
    runs = [
        run(rate=rate, seed=seed, speed=speed, floor=floor)
        for seed in range(3)
        for rate, speed, floor in ((LR, 1.0, 0), (3e-4, 6.0, 0.06))
    ]
    found = results([*runs, *[run("x", seed=seed, speed=2.0) for seed in range(3)]])
    best = found["best_learning_rate"]["t"]
    assert best["gap_90"] == 3e-4 and best["reference_kl"] == LR
    assert (
        speedup(found, "x", against="best", target="gap_90")["median"]
        < 1
        < speedup(found, "x", against="best")["median"]
    )


def test_rates_are_ranked_on_the_seeds_that_all_of_them_have():
    """Otherwise a rate that has finished the easy seed only would look best."""
    runs = [run(rate=LR, seed=seed, speed=2.0 if seed == 0 else 1.0) for seed in range(3)]
    runs += [run(rate=9e-5, seed=0, speed=1.7)]
    assert results(runs)["best_learning_rate"]["t"]["reference_kl"] == LR


def test_arms_are_compared_with_the_baseline_at_their_own_rate():
    runs = [run(rate=rate, seed=seed, speed=speed) for seed in range(3) for rate, speed in ((LR, 1.0), (9e-5, 3.0))]
    found = results([*runs, *[run("x", rate=9e-5, seed=seed, speed=6.0) for seed in range(3)]])
    assert speedup(found, "x", rate=9e-5, against="same")["median"] == pytest.approx(2.0, rel=0.15)
    assert speedup(found, "x", rate=9e-5)["median"] > 4
    measures = {r["measure"]: r for r in found["quality"] if r["strategy"] == "x"}
    assert measures["kl_difference"]["median"] < measures["kl_difference_same"]["median"] <= 0


def test_a_visit_to_the_target_is_told_from_an_arrival():
    row = results([*grid(3), run("x", seed=0, speed=4.0)])["runs"][-1]
    assert row["strategy"] == "x" and row["targets"]["reference_kl"]["above_again"] == 0.0
    visiting = run("y", seed=0, speed=4.0)
    half = len(visiting.evaluations) // 2
    back = [dataclasses.replace(e, kl=1.0) if i >= half else e for i, e in enumerate(visiting.evaluations)]
    row = results([*grid(3), dataclasses.replace(visiting, evaluations=tuple(back))])["runs"][-1]
    assert row["targets"]["reference_kl"]["reached"] and row["targets"]["reference_kl"]["above_again"] > 0.3


def test_accuracy_targets_count_upwards():
    found = results(grid(twice={"speed": 2.0}))
    assert speedup(found, "twice", target="reference_accuracy")["median"] == pytest.approx(2.0, rel=0.1)


@pytest.mark.slow
def test_tasks_are_pooled_seed_by_seed():
    runs = [run(task=task, seed=seed) for task in "ab" for seed in range(5)]
    runs += [run("x", task=task, seed=seed, speed=2.0) for task in "ab" for seed in range(5)]
    pooled = speedup(results(runs), "x", task="all")
    assert pooled["n"] == 5 and pooled["low"] > 1.5
    runs += [run("z", task=task, seed=seed, speed={"a": 2.0, "b": 8.0}[task]) for task in "ab" for seed in range(5)]
    found = results(runs)
    each = [speedup(found, "z", task=task, axis="seconds")["median"] for task in "ab"]
    assert speedup(found, "z", task="all", axis="seconds")["median"] == pytest.approx((each[0] * each[1]) ** 0.5)
    stuck = [run("z", task="b", seed=4, floor=0.5) if (r.strategy, r.place) == ("z", ("b", 4)) else r for r in runs]
    assert speedup(results(stuck), "z", task="all")["censored"] == 1


def test_an_unfinished_grid_uses_the_pairs_it_has():
    runs = [*grid(4), run("x", seed=1, speed=2.0), run("x", seed=9, speed=2.0)]
    found = results(runs)
    assert speedup(found, "x")["n"] == 1
    alone = next(r for r in found["runs"] if (r["strategy"], r["seed"]) == ("x", 9))
    assert alone["targets"] == {} and alone["auc_steps"] is None
    render(found, {})
    summary_tables(found)


def test_area_is_the_mean_of_the_relative_kl():
    straight = GridRun("t", "x", LR, 0, tuple(evaluation(step, 1 - step / 100) for step in range(0, 101, 10)))
    assert area(straight, "steps", 100) == pytest.approx(0.6, abs=0.02)  # the trailing median lags by a step of 10
    assert area(straight, "steps", 200) < area(straight, "steps", 100)
    flat = GridRun("t", "x", LR, 0, tuple(evaluation(step, 2.0) for step in range(0, 101, 10)))
    assert area(flat, "steps", 55) == pytest.approx(1.0)


def test_the_area_counts_costs_before_step_1_and_a_divergence():
    late = tuple(evaluation(step, 2.0, seconds=3 + step) for step in range(0, 11, 5))
    flat = GridRun("t", "x", LR, 0, late)
    for budget in (2, 4, 20):  # before, within and after the run's seconds
        assert area(flat, "seconds", budget) == pytest.approx(1.0)
    ended = flat.diverged()
    assert area(ended, "steps", 20) == math.inf == area(ended, "steps", 10)
    assert area(ended, "steps", 8) == pytest.approx(1.0)  # it diverges later
    found = median_with_interval([0.3, 0.4, 0.5, area(ended, "steps", 20), math.inf], zero_is_never=False)
    assert (found.median, found.high, found.n) == (0.5, math.inf, 5)


@pytest.mark.slow
def test_planted_speedups_over_many_grids():
    """Curves with a floor, noise at every evaluation; ratios of five seeds each."""

    def calls(speed, floor):
        called = 0
        for repeat in range(60):
            ratios = []
            for seed in range(5):
                rng = np.random.default_rng([repeat, seed])
                base = run(seed=seed, noise=0.1, floor=floor, rng=rng)
                other = run("x", seed=seed, noise=0.1, floor=floor, speed=speed, rng=rng)
                costs = [r.cost(final_target(base.evaluations), "kl", False) for r in (base, other)]
                ratios.append(ratio(*(cost.steps if cost else None for cost in costs)))
            estimate = median_with_interval(ratios)
            called += not estimate.low <= 1.0 <= estimate.high
        return called / 60

    assert calls(speed=1.0, floor=0.1) <= 0.15 and calls(speed=1.0, floor=0.0) <= 0.2
    assert calls(speed=2.0, floor=0.0) == 1.0


def test_a_diverged_run_never_arrives_and_is_kept():
    def diverged(strategy, seed):
        whole = run(strategy, seed=seed)
        late = [dataclasses.replace(e, kl=math.nan) if e.step > 4 else e for e in whole.evaluations]
        return dataclasses.replace(whole, evaluations=tuple(late))

    found = results([*grid(5), *[diverged("x", seed) for seed in range(5)]])
    row = speedup(found, "x")
    assert row["n"] == row["censored"] == 5 and row["median"] == 0.0
    text = json.dumps(found, allow_nan=False)
    assert json.dumps(results([from_row(r) for r in json.loads(text)["runs"]]), allow_nan=False) == text
    assert "| 0 of 5 | – | diverged [diverged, diverged] |" in render(found, {})


def test_a_run_that_ended_with_a_loss_that_is_not_finite_never_arrives():
    ended = run("x", seed=0)
    found = results([*grid(2), dataclasses.replace(ended, evaluations=ended.evaluations[:3]).diverged()])
    row = speedup(found, "x")
    assert row["n"] == row["censored"] == 1 and row["median"] == 0.0
    assert found["runs"][-1]["final_kl"] is None


def test_a_diverged_baseline_sets_no_target():
    runs = grid(3, x={"speed": 2.0})
    broken = [r.diverged() if (*r.arm, r.seed) == ("plain", LR, 2) else r for r in runs]
    assert speedup(results(broken), "x")["n"] == 2


def test_pooling_needs_every_task():
    runs = [run(task=task, seed=seed) for task in "ab" for seed in range(3)]
    found = results(runs + [run("x", task="a", seed=seed, speed=2.0) for seed in range(3)])
    assert {row["task"] for row in found["speedups"] if row["strategy"] == "x"} == {"a"}
    assert {row["task"] for row in found["speedups"] if row["strategy"] == "plain"} == {"a", "b", "all"}


def test_a_run_without_what_is_compared_is_refused(tmp_path):
    place = {"task": "t", "strategy": "plain", "learning_rate": LR, "seed": 0}
    with pytest.raises(CheckpointError, match="has no row"):
        read_run(tmp_path, **place)
    append_row(tmp_path / "evals.jsonl", {k: v for k, v in run().evaluations[0].to_row().items() if k != "eval_kl"})
    with pytest.raises(CheckpointError, match="lacks eval_kl"):
        read_run(tmp_path, **place)


def test_results_are_strict_json_and_redraw_the_same_page():
    searches = SearchSummary(accepted=((4, 10.0),), count=2)
    runs = grid(5, stuck={"floor": 0.5}, twice={"speed": 2.0})
    runs += [run("effopd", seed=s, speed=3.0, searches=searches) for s in range(5)]
    roles = {"rivals": ("effopd",), "claims": (Claim("effopd", 3),)}
    found = results(runs, **roles)
    text = json.dumps(found, allow_nan=False)
    again = json.loads(text)
    assert render(again, {}) == render(found, {})
    rebuilt = analyze_runs([from_row(row) for row in again["runs"]], Roles.of_settings(again["settings"]))
    assert json.dumps(rebuilt, allow_nan=False) == text
    page = render(found, {"curves": "results/curves.png"})
    assert "4: 10" in page and "results/curves.png" in page
    assert "| `effopd` | t | not reproduced | 2.8" in page


def test_a_claim_is_judged_by_its_interval():
    roles = {"claims": (Claim("quick", 3),)}
    for speed, verdict in ((2.0, "not reproduced"), (4.0, "reproduced")):
        page = render(results(grid(quick={"speed": speed}), **roles), {})
        assert f"| 3× in steps | `quick` | t | {verdict} |" in page
    wide = grid(quick={"speed": 4.0})
    wide = [run("quick", seed=0, speed=2.0) if (r.strategy, r.seed) == ("quick", 0) else r for r in wide]
    assert "| t | undecided |" in render(results(wide, **roles), {})


def test_reading_a_run_directory(tmp_path):
    source = run()
    for record in source.evaluations:
        append_row(tmp_path / "evals.jsonl", record.to_row())
    trials = [{"scale": scale, "verdict": "start", "seconds": 1.0} for scale in (0.0, 2.0)]
    append_row(
        tmp_path / "searches.jsonl",
        {"step": 1, "accepted_scale": 2.0, "fit": {"q2": 0.5}, "trials": trials, "memory_bytes": 80},
    )
    read = read_run(tmp_path, task="t", strategy="plain", learning_rate=LR, seed=0)
    assert read.evaluations == source.evaluations
    row = to_row(read)
    assert row["accepted"] == [[1, 2.0]] and row["fit"] == {"q2": 0.5}
    assert row["searches"] == 1 and row["memory_bytes"] == 80
    assert to_row(from_row(row)) == row and from_row(row).searches == read.searches
    assert Lookup(results([read])).reached("t", ("plain", LR)) == "1 of 1"


def test_a_variant_is_compared_with_what_it_is_a_variant_of_at_its_own_learning_rate():
    runs = [run(seed=seed) for seed in range(5)]
    for rate, speed in ((LR, 4.0), (9e-5, 8.0)):
        runs += [run("look", rate, seed, speed=speed) for seed in range(5)]
        runs += [run("short", rate, seed, speed=2.0) for seed in range(5)]
        runs += [run("look-alike", rate, seed, speed=2.0) for seed in range(5)]  # its name declares nothing
    found = results(runs, variants={"short": "look"})
    pairs = {
        (r["strategy"], r["learning_rate"]): r["median"]
        for r in found["speedups"]
        if (r["against"], r["target"], r["axis"]) == ("look", "reference_kl", "steps")
    }
    assert pairs == {
        ("short", LR): pytest.approx(0.5, rel=0.15),
        ("short", 9e-5): pytest.approx(0.25, rel=0.15),
    }
    (row,) = [
        r
        for r in found["quality"]
        if (r["strategy"], r["learning_rate"], r["measure"]) == ("short", LR, "kl_difference_parent")
    ]
    assert row["low"] > 0 and row["n"] == 5
