"""Speed-up over the baseline tuned on the other seeds, by target."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers.grid_runs import LR
from helpers.grid_runs import planted_run as run

from effopd.compare.envelope import Envelope, Tuning
from effopd.compare.envelope_rows import envelopes
from effopd.compare.prices import KINDS, PriceList
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles
from effopd.errors import ConfigError
from effopd.report.compare_envelope import opponent_table, range_table
from effopd.report.compare_lookup import Lookup
from effopd.report.envelope_figure import note

SEEDS = range(3)


def test_the_opponent_is_the_fastest_arm_of_all_baselines_on_the_other_seeds():
    runs = [run("plain", rate, seed, speed, noise=0.0) for seed in SEEDS for rate, speed in ((LR, 1.0), (3 * LR, 2.0))]
    runs += [run("decay", LR, seed, 3.0, noise=0.0) for seed in SEEDS]
    for share in (0.5, 0.25, 0.1, 0.05):
        assert Envelope(runs).opponent(0, share) == ("plain", 3 * LR)
        assert Envelope(runs, ("plain", "decay")).opponent(0, share) == ("decay", LR)


def test_a_lucky_seed_does_not_choose_its_own_opponent():
    speed = {(LR, seed): 2.0 for seed in SEEDS} | {(3 * LR, seed): 1.0 for seed in SEEDS} | {(3 * LR, 0): 8.0}
    runs = [run("plain", rate, seed, s, noise=0.0) for (rate, seed), s in speed.items()]
    assert Envelope(runs).opponent(0, 0.1) == ("plain", LR)  # at seed 0 itself the other rate is faster


def test_the_tuned_arm_is_1x_and_twice_its_speed_is_2x_on_every_axis_at_every_target():
    runs = [run("plain", rate, seed, speed, noise=0.0) for seed in SEEDS for rate, speed in ((LR, 1.0), (3 * LR, 2.0))]
    runs += [run("ours", LR, seed, 4.0, noise=0.0) for seed in SEEDS]
    for axis in ("steps", "seconds", "generated_tokens", "forward_tokens"):
        for share in (0.25, 0.1):
            envelope = Envelope(runs, axis=axis)
            assert envelope.speedup(("plain", 3 * LR), share).median == 1.0
            assert envelope.speedup(("ours", LR), share).median == pytest.approx(2.0, rel=0.15)


def test_never_is_zero_over_an_opponent_that_arrives_and_infinite_the_other_way():
    runs = [run("plain", LR, seed, noise=0.0) for seed in SEEDS]
    runs += [run("stuck", LR, seed, 3.0, floor=0.5, noise=0.0) for seed in SEEDS]
    assert Envelope(runs).speedup(("stuck", LR), 0.1).median == 0.0
    assert Envelope(runs, ("stuck",)).speedup(("plain", LR), 0.1).median == math.inf


def test_one_seed_alone_tunes_on_itself():
    runs = [run("plain", LR, 0), run("plain", 3 * LR, 0, speed=2.0)]
    assert Envelope(runs).opponent(0, 0.25) == ("plain", 3 * LR)


def test_the_speed_up_by_hand():
    """KL falls to a half every 10, 5 and 2.5 steps; evaluations every 2, smoothed over three."""
    pace = math.log(2) / 10
    runs = [run(name, LR, seed, speed, noise=0.0, pace=lambda seed: pace)
            for seed in SEEDS for name, speed in (("plain", 1.0), ("topd", 2.0), ("ours", 4.0))]  # fmt: skip
    envelope = Envelope(runs, ("plain", "topd"))
    # 13 % is first met at steps 30, 16 and 8; the trailing median adds one evaluation
    assert [envelope.cost((name, LR), 0, 0.13) for name in ("plain", "topd", "ours")] == [32.0, 18.0, 10.0]
    assert envelope.speedups(("ours", LR), 0.13) == dict.fromkeys(SEEDS, 1.8)
    assert envelope.tuning() == Tuning(2 * 96.0, 2, 3)


def test_priced_seconds_choose_their_own_opponent():
    priced = PriceList("x", dict.fromkeys(KINDS, 0.0) | {"sampled": 0.5})
    runs = [run("plain", LR, seed, 1.0, noise=0.0) for seed in SEEDS]
    runs += [run("quick", LR, seed, 2.0, noise=0.0, step_cost=9.0) for seed in SEEDS]
    assert Envelope(runs, ("plain", "quick")).opponent(0, 0.25) == ("plain", LR)
    envelope = Envelope(runs, ("plain", "quick"), priced)
    assert envelope.opponent(0, 0.25) == ("quick", LR)
    assert envelope.cost(("quick", LR), 0, 0.25) == 50 * Envelope(runs, axis="steps").cost(("quick", LR), 0, 0.25)


def test_an_unknown_cost_is_no_pair_and_no_opponent():
    runs = [run("plain", LR, seed, noise=0.0) for seed in SEEDS]
    envelope = Envelope(runs, axis="teacher_tokens")
    assert envelope.opponent(0, 0.5) is None and envelope.speedup(("plain", LR), 0.5).n == 0
    assert envelope.without_costs() == [("plain", LR)] and envelope.tuning().cost is None


def test_the_worst_seed_of_many_is_shown_with_its_own_speed_up():
    """Of ten seeds, the interval leaves out the smallest and the largest value."""
    runs = [run("plain", LR, seed, noise=0.0) for seed in range(10)]
    runs += [run("ours", LR, seed, 0.5 if seed == 4 else 2.0, noise=0.0) for seed in range(10)]
    results = analyze_runs(runs, Roles("plain", LR, headline=("ours",)))
    results |= envelopes(results, ())
    (ours,) = [row for row in results["envelope"]["speedups"] if (row["strategy"], row["axis"]) == ("ours", "seconds")]
    assert ours["worst_seed"][0] == 4 and ours["worst"][0] < 1 < ours["low"][0]
    (cells,) = [row for row in range_table(Lookup(results), results["envelope"]).rows if row[0] == "net seconds"]
    assert f"worst {ours['worst'][0]:.2f} (seed 4, 3e-05)" in cells[3]


def test_runs_on_stored_answers_have_no_speed_up_in_sampled_tokens():
    def stored(seed):
        whole = run("stored", LR, seed, 2.0, noise=0.0)
        costs = [dataclasses.replace(e.costs, net_generated_tokens=0) for e in whole.evaluations]
        pairs = zip(whole.evaluations, costs, strict=True)
        return dataclasses.replace(whole, evaluations=tuple(dataclasses.replace(e, costs=c) for e, c in pairs))

    runs = [each for seed in SEEDS for each in (run("plain", LR, seed, noise=0.0), stored(seed))]
    for baseline in ("plain", "stored"):
        results = analyze_runs(runs, Roles(baseline, LR))
        rows = [row for row in results["speedups"] if row["strategy"] != row["against"] and row["target"] == "gap_90"]
        known = {row["axis"]: (row["n"], row["undefined"], row["censored"]) for row in rows}
        assert known["seconds"] == (3, 0, 0) and known["generated_tokens"] == (0, 3, 0)
        rows = envelopes(results, ())["envelope"]["speedups"]
        at_a_half = {(row["strategy"], row["axis"]): row["n"][0] for row in rows}
        assert at_a_half["stored", "seconds"] == 3 and at_a_half["stored", "generated_tokens"] == 0


def test_shares_of_an_infinite_kl_at_the_start_are_no_targets():
    def infinite(whole):
        start, *later = whole.evaluations
        return dataclasses.replace(whole, evaluations=(dataclasses.replace(start, kl=math.inf), *later))

    runs = [infinite(run(name, LR, seed, speed)) for seed in SEEDS for name, speed in (("plain", 1.0), ("ours", 4.0))]
    results = analyze_runs(runs, Roles("plain", LR))
    assert {n for row in envelopes(results, ())["envelope"]["speedups"] for n in row["n"]} == {0}


def test_without_an_opponent_its_cost_is_unknown_and_not_never():
    results = analyze_runs([run("plain", LR, 0), run("plain", 3 * LR, 1)], Roles("plain", LR))
    rows = opponent_table(envelopes(results, ())["envelope"]).rows
    assert {tuple(row[3:5]) for row in rows} == {("none", "–")}


def test_a_joined_grid_competes_under_its_label_at_the_seeds_of_both():
    def results(runs):
        return analyze_runs(runs, Roles("plain", LR, headline=("ours",)))

    pairs = (("plain", 1.0), ("ours", 2.0))
    here = results([run(name, LR, seed, speed, noise=0.0) for seed in SEEDS for name, speed in pairs])
    there = results([run("plain", LR, seed, 4.0, noise=0.0) for seed in range(2)])
    joined = envelopes(here, (), ("small", there))["joined_envelope"]
    assert joined["baselines"] == ["plain", "plain (small)"] and joined["seeds"] == [0, 1]
    assert all(row["arms"]["0"] == ["plain (small)", LR] for row in joined["opponents"] if row["axis"] == "seconds")
    (ours,) = [row for row in joined["speedups"] if (row["strategy"], row["axis"]) == ("ours", "seconds")]
    assert all(value < 1 for value in ours["median"])
    with pytest.raises(ConfigError, match="--join small"):
        envelopes(here, (), ("small", results([run("plain", LR, 9)])))


@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        ((3, 3), "range over 3 seeds, paired by seed, which covers the median in 75 % of cases"),
        ((2, 5), "range over 2 to 5 seeds, paired by seed, which covers the median in 50 to 93.75 % of cases"),
        ((1, 6), "interval of the median or range over 1 to 6 seeds, paired by seed, which covers the median in 0 to"),
        ((6, 6), "interval of the median over 6 seeds, paired by seed, which covers the median in 96.88 % of cases"),
    ],
)
def test_the_note_of_the_figure_counts_the_seeds_of_the_arms_that_are_drawn(seeds, text):
    runs = [run("plain", LR, seed) for seed in range(7)]
    runs += [run(name, LR, seed, 2.0) for name, count in zip(("a", "b"), seeds, strict=True) for seed in range(count)]
    roles = Roles("plain", LR, headline=("a", "b"))
    results = analyze_runs(runs, roles)
    assert text in note(Lookup(results | envelopes(results, ())))
