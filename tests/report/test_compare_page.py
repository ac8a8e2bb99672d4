"""Sentences, tables and figures follow from results.json, and from nothing else."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from helpers.grid_runs import LR, planted_run
from rich.console import Console

from effopd.compare.grid_run import GridRun, SearchSummary, from_row
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Claim, Roles
from effopd.report.compare_gate import gate_results
from effopd.report.compare_lookup import Lookup, number, times
from effopd.report.compare_page import render
from effopd.report.compare_tables import at_own_rate
from effopd.report.compare_terminal import summary_tables

ROLES = Roles(
    "plain", LR, rivals=("effopd",), headline=("effopd",), controls=("noop", "random_direction"),
    claims=(Claim("effopd", 3, "steps", "3× fewer steps"),),
)  # fmt: skip


def run(strategy, seed, rate=LR, speed=1.0, floor=0.0, task="sums", searches=SearchSummary()) -> GridRun:  # noqa: B008
    """KL falls as exp(−0.03 · speed · step), with a little noise; a step costs a second."""
    return planted_run(
        strategy, rate, seed, speed, floor=floor, task=task, searches=searches, noise=0.02, pace=lambda seed: 0.03,
        steps=range(0, 61, 2),
    )  # fmt: skip


def grid(seeds=3, tasks=("sums", "words"), speed=2.0, roles=ROLES):
    jumped = SearchSummary(accepted=((4, 10.0),), count=1)
    runs = []
    for task in tasks:
        for seed in range(seeds):
            runs += [run("plain", seed, task=task), run("plain", seed, 9e-5, 1.5, task=task)]
            runs += [run("effopd", seed, speed=speed, task=task, searches=jumped)]
            runs += [run("effopd", seed, 9e-5, speed, floor=0.5, task=task), run("noop", seed, task=task)]
    return analyze_runs(runs, roles)


@pytest.fixture(scope="module")
def results():
    return grid()


def printed(results, width):
    console = Console(width=width, record=True, file=io.StringIO())
    for table in summary_tables(results):
        console.print(table)
    return console.export_text()


def test_numbers_in_words():
    row = {"median": 2.0, "low": 0.0, "high": None, "n": 5}
    assert times(row) == "2.00× [never, > any]"
    assert times(row | {"n": 3}) == "2.00× (never–> any, n = 3)"
    assert times(row | {"n": 1}) == "2.00× (n = 1)"
    assert times(None) == times(row | {"n": 0}) == number(None) == "–"
    assert number({"median": 0.5, "low": 0.25, "high": None, "n": 2}, ".2f") == "0.50 (0.25 to diverged)"


def lines_of(page, start):
    return [line for line in page.splitlines() if line.startswith(start)]


def test_every_speed_up_in_the_headline_is_a_row_of_the_results(results):
    page = render(results, {})
    look = Lookup(results)
    for task in ("sums", "words"):
        (line,) = lines_of(page, f"| `effopd` | `plain` | {task} | 3 |")
        axes = ("steps", "seconds", "generated_tokens", "forward_tokens")
        assert line.split(" | ")[4:] == [
            *(times(look.speedup(task, ("effopd", LR), axis)) for axis in axes[:3]),
            times(look.speedup(task, ("effopd", LR), axes[3])) + " |",
        ]


def test_the_page_names_no_strategy_that_the_plan_does_not(results):
    """Under other names, in the same roles, the page is the same."""
    names = {"plain": "slow", "effopd": "quick", "noop": "still"}
    results = results | {"versions": {}}
    text, page = json.dumps(results), render(results, {})
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
        page = page.replace(f"`{old}`", f"`{new}`")
    assert render(json.loads(text), {}) == page


def test_without_roles_the_page_opens_with_every_other_strategy():
    page = render(grid(roles=Roles("plain", LR)), {})
    headline = page.partition("## Headline")[2].partition("\n## ")[0]
    assert lines_of(headline, "| `effopd` | `plain`") and lines_of(headline, "| `noop` | `plain`")
    assert "Controls" not in page and "claims" not in page and "`effopd` | `effopd`" not in page


def test_controls_stand_beside_the_rival(results):
    controls = render(results, {}).partition("Controls, net seconds")[2].partition("\n## ")[0]
    look = Lookup(results)
    (noop,) = lines_of(controls, "| sums | `noop` |")
    (rival,) = lines_of(controls, "| sums | `effopd` |")
    over = [times(look.speedup("sums", ("noop", LR), "seconds", against=other)) for other in (None, "effopd")]
    assert noop == f"| sums | `noop` | {over[0]} | {over[1]} | – |"
    assert rival.endswith("| 1.00× (1.00–1.00, n = 3) | 3 of 3 |")


def test_the_page_changes_with_the_numbers(results):
    changed = copy.deepcopy(results)
    for row in changed["speedups"]:
        if (row["task"], row["strategy"], row["axis"], row["target"]) == ("sums", "effopd", "steps", "reference_kl"):
            row["median"] = 3.21
    before, after = render(results, {}), render(changed, {})
    claim = "| 3× fewer steps | `effopd` | sums | undecided | "  # three seeds have no interval
    assert claim in before and f"{claim}3.21×" in after
    assert "3.21" not in before


@pytest.mark.parametrize(
    "low, high, n, verdict",
    [
        (1.78, 4.0, 5, "undecided"),  # the interval holds the claimed 3
        (0.0, 9.6, 5, "undecided"),
        (1.5, 2.9, 5, "not reproduced"),
        (0.0, 0.0, 5, "not reproduced"),
        (3.0, 9.6, 5, "reproduced"),
        (3.5, None, 5, "reproduced"),  # the baseline may never arrive
        (1.5, None, 5, "undecided"),
        (4.0, 5.0, 4, "undecided"),  # a range of four seeds is no interval
        (1.0, 2.0, 3, "undecided"),
    ],
)
def test_a_claim_is_judged_by_the_interval(results, low, high, n, verdict):
    changed = copy.deepcopy(results)
    for row in changed["speedups"]:
        if (row["task"], row["strategy"], row["learning_rate"], row["axis"]) == ("sums", "effopd", LR, "steps"):
            row |= {"low": low, "high": high, "n": n}
    page = render(changed, {})
    assert f"| 3× fewer steps | `effopd` | sums | {verdict} | " in page


def test_an_arm_that_never_arrives_stays_on_the_page(results):
    rows = [line for line in render(results, {}).splitlines() if line.startswith("| sums | `effopd` | 9e-05")]
    assert len(rows) == 4  # rates, same rate, the lowest end, final quality
    assert all("0 of 3 | " in row for row in rows[:3])


def test_a_grid_without_effopd_or_with_one_task_or_seed():
    for seeds, tasks in ((1, ("sums",)), (1, ("sums", "words"))):
        page = render(grid(seeds, tasks), {})
        assert ("### all tasks" in page) == (len(tasks) > 1)
    only = analyze_runs([run("plain", 0)], ROLES)
    assert "| `plain` | 1.00×" in render(only, {})


def test_at_the_same_rate_only_runs_with_a_baseline_can_reach_its_end():
    arms = [(name, speed, rate) for name, speed in (("plain", 1), ("effopd", 2)) for rate in (LR, 9e-5)]
    runs = [run(name, seed, rate, speed) for name, speed, rate in arms for seed in range(3)]
    without = [each for each in runs if (each.arm, each.seed) != (("plain", 9e-5), 1)]
    rows = at_own_rate(Lookup(analyze_runs(without, ROLES))).rows
    assert [row[2:4] for row in rows] == [["3e-05", "3 of 3"], ["9e-05", "2 of 2"]]


def test_what_the_gate_accepts_where_nothing_changes(results):
    found = gate_results(Path(__file__).parents[2] / "docs")
    rows = found["gate_noise"]
    assert {(row["family"], row["model"]) for row in rows} == {
        (family, model) for family in ("chain_sum", "spell_backward") for model in ("student", "teacher")
    }
    assert all(row["validation_size"] == 50 for row in rows + found["gate_shared_noise"])
    assert len({row["gate"] for row in rows + found["gate_shared_noise"]}) == 1
    assert "paper's gate" not in render(results, {})
    page = render(results | found, {})
    for row in rows:
        assert lines_of(page, f"| {row['family']} | {row['model']} | {row['first_accepted']:.1%} [")
    shared = [row["first_accepted"] for row in found["gate_shared_noise"]]
    assert f"{min(shared):.0%} to {max(shared):.0%} of the first candidates" in page
    searches = SearchSummary(accepted=((1, 2.0), (2, 2.0)), count=3)
    lost = run("random_direction", 0, searches=searches)
    page = render(analyze_runs([*map(from_row, results["runs"]), lost], ROLES), {})
    (line,) = [line for line in lines_of(page, "| sums | `random_direction` |") if line.endswith("| 2 of 3 |")]
    assert line.count(" | ") == 4


def test_the_gates_power_is_a_table_by_true_change(results, tmp_path):
    row = {"from": 0.025, "to": 0.075, "moves": 4, "searches": 80, "shared": 0.9, "fresh": 0.75}
    row |= {"shared_by_run": [0.85, 0.95], "fresh_by_run": [0.5, 1.0]}
    (tmp_path / "gate_power.json").write_text(
        json.dumps({"by_true_change": [row | {"from": None, "to": -0.075}, row, row | {"to": None}]})
    )
    found = gate_results(tmp_path)
    section = render(results | found, {}).partition("## Moves accepted by the paper's gate")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in lines] == ["| below -7.5", "| +2.5 to +7.5", "| +2.5 and more"]
    assert all(line.endswith("| 4 | 80 | 90% (85% to 95%) | 75% (50% to 100%) |") for line in lines)
    assert "updates of 2 runs" in section


def test_tables_are_rectangular(results):
    blocks = [b for b in render(results, {}).split("\n\n") if b.startswith("| ")]
    assert len(blocks) >= 6
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_is_whole(results, width):
    text = printed(results, width)
    assert "…" not in text and "effopd" in text and "plain" in text
    assert text.count("final held-out KL of plain") == 2
    found = Lookup(results).speedup("sums", ("effopd", LR), "seconds")
    assert f"{found['median']:.2f}×" in text and "3/3" in text and "10.0%" in text


def test_the_terminal_shows_intervals_of_runs_that_never_arrive():
    slow = [run("effopd", seed, speed=2.0, floor=0.5 if seed else 0.0) for seed in range(3)]
    results = analyze_runs([*(run("plain", seed) for seed in range(3)), *slow], ROLES)
    row = Lookup(results).speedup("sums", ("effopd", LR), "seconds")
    assert row["low"] == row["median"] == 0.0 < row["high"]
    for width in (80, 120):
        assert f"never–{row['high']:.2f}" in printed(results, width)


def test_the_same_json_draws_the_same_page(results):
    again = json.loads(json.dumps(results, allow_nan=False))
    assert render(again, {"a": "b.png"}) == render(results, {"a": "b.png"})
    assert printed(again, 100) == printed(results, 100)


def test_variants_have_a_table_of_their_own(results):
    assert "Effect of each component" not in render(results, {})
    speeds = {"plain": 1, "look": 4, "brief": 2, "look-alike": 2}
    runs = [run(name, seed, speed=speed) for seed in range(5) for name, speed in speeds.items()]
    page = render(analyze_runs(runs, Roles("plain", LR, variants={"brief": "look"})), {})
    section = page.partition("## Effect of each component")[2].partition("\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| sums")]  # names declare nothing
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["`look`", "`brief`", "3e-05"]
    assert 0.4 < float(cells[4].split("×")[0]) < 0.6
    assert cells[-1].startswith("+0.0")


@pytest.mark.parametrize(("error", "shown"), [(0.1, True), (0.0, False)])
def test_the_precision_of_the_kl_is_that_of_the_evaluation_at_the_target(error, shown, results):
    known = copy.deepcopy(results)
    for each in known["runs"]:
        each["curve"]["kl_se"] = [error * kl for kl in each["curve"]["kl"]]
    page = render(known, {})
    assert ("| sums | 10% (" in page) is shown and ("## Precision" in page) is shown
