"""Sentences, tables and figures follow from results.json, and from nothing else."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from effopd.commands.compare import gate_errors
from effopd.compare.results import Run, analyse, from_row
from effopd.report.compare_lookup import Lookup, number, times
from effopd.report.compare_page import render, summary_table

LR = 3e-5


def run(strategy, seed, rate=LR, speed=1.0, floor=0.0, task="sums", searches=()):
    """KL falls as exp(−0.03 · speed · step), with a little noise; a step costs a second."""
    rng = np.random.default_rng([seed, int(1e6 * rate), *map(ord, task + strategy)])
    rows = tuple(
        {
            "step": step,
            "eval_kl": 0.1 * max(math.exp(-0.03 * speed * step), floor) * math.exp(0.02 * rng.standard_normal()),
            "eval_kl_se": 0.001,
            "eval_accuracy": 0.8 - 0.5 * math.exp(-0.03 * speed * step),
            "cost/net_seconds": 1.0 * step,
            "cost/net_generated_tokens": 100 * step,
            "cost/net_forward_tokens": 300 * step,
            "cost/search_seconds": 0.1 * step,
        }
        for step in range(0, 61, 2)
    )
    return Run(task, strategy, rate, seed, rows, searches)


def grid(seeds=3, tasks=("sums", "words"), speed=2.0):
    runs = []
    for task in tasks:
        for seed in range(seeds):
            runs += [run("vanilla", seed, task=task), run("vanilla", seed, 9e-5, 1.5, task=task)]
            runs += [
                run(
                    "effopd",
                    seed,
                    speed=speed,
                    task=task,
                    searches=({"step": 4, "accepted_scale": 10.0, "trials": (0, 1)},),
                )
            ]
            runs += [run("effopd", seed, 9e-5, speed, floor=0.5, task=task), run("noop", seed, task=task)]
    return analyse(runs, baseline="vanilla", reference_learning_rate=LR)


@pytest.fixture(scope="module")
def results():
    return grid()


def printed(results, width):
    console = Console(width=width, record=True, file=io.StringIO())
    for table in summary_table(results):
        console.print(table)
    return console.export_text()


def test_numbers_in_words():
    row = {"median": 2.0, "low": 0.0, "high": None, "n": 5}
    assert times(row) == "2.00× [never, > any]"
    assert times(row | {"n": 3}) == "2.00× (never–> any, n = 3)"
    assert times(row | {"n": 1}) == "2.00× (n = 1)"
    assert times(None) == times(row | {"n": 0}) == number(None) == "–"
    assert number({"median": 0.5, "low": 0.25, "high": None, "n": 2}, ".2f") == "0.50 (0.25 to diverged)"


def test_every_speed_up_in_the_lead_is_a_row_of_the_results(results):
    page = render(results, {})
    look = Lookup(results)
    for task in ("sums", "words"):
        line = next(x for x in page.splitlines() if f"reference learning rate, {task}**" in x)
        for axis, name in (("steps", "steps"), ("seconds", "net seconds"), ("generated_tokens", "sampled tokens")):
            assert f"{times(look.speedup(task, ('effopd', LR), axis))} in {name}" in line
        assert "(n = 3)" in line


def test_the_page_changes_with_the_numbers(results):
    changed = copy.deepcopy(results)
    for row in changed["speedups"]:
        if (row["task"], row["strategy"], row["axis"], row["target"]) == ("sums", "effopd", "steps", "reference_kl"):
            row["median"] = 3.21
    before, after = render(results, {}), render(changed, {})
    assert "sums: undecided, " in before and "sums: undecided, 3.21×" in after  # three seeds have no interval
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
def test_the_papers_claim_is_judged_by_the_interval(results, low, high, n, verdict):
    changed = copy.deepcopy(results)
    for row in changed["speedups"]:
        if (row["task"], row["strategy"], row["learning_rate"], row["axis"]) == ("sums", "effopd", LR, "steps"):
            row |= {"low": low, "high": high, "n": n}
    page = render(changed, {})
    assert f"fewer steps”**: sums: {verdict}, " in page


def test_an_arm_that_never_arrives_stays_on_the_page(results):
    rows = [line for line in render(results, {}).splitlines() if line.startswith("| sums | `effopd` | 9e-05")]
    assert len(rows) == 4 and all(
        "0 of 3 | " in row for row in rows[:3]
    )  # rates, same rate, the lowest end, final quality


def test_a_grid_without_effopd_or_with_one_task_or_seed():
    for seeds, tasks in ((1, ("sums",)), (1, ("sums", "words"))):
        page = render(grid(seeds, tasks), {})
        assert ("### all tasks" in page) == (len(tasks) > 1)
    only = analyse([run("vanilla", 0)], baseline="vanilla", reference_learning_rate=LR)
    assert "| `vanilla` | 1.00×" in render(only, {})


def test_what_the_gate_lets_pass_where_nothing_is_to_be_found(results):
    found = gate_errors(Path(__file__).parents[2] / "docs")
    rows = found["gate_noise"]
    assert {(row["family"], row["model"]) for row in rows} == {
        (family, model) for family in ("chain_sum", "spell_backward") for model in ("student", "teacher")
    }
    assert all(
        row["gate"] == "not_worse" and row["validation_size"] == 50 for row in rows + found["gate_shared_noise"]
    )
    assert "nothing is to be found" not in render(results, {}) and "gate accepts" not in render(results, {})
    page = render(results | found, {})
    assert f"{rows[0]['first_accepted']:.1%} [" in page and "20000 simulated searches" in page
    shared = [row["first_accepted"] for row in found["gate_shared_noise"]]
    assert f"{min(shared):.0%} to {max(shared):.0%} of the first candidates" in page
    searches = tuple({"step": s, "accepted_scale": 2.0 * (s < 3), "trials": (0, 1)} for s in (1, 2, 4))
    lost = run("random_direction", 0, searches=searches)
    page = render(analyse([*map(from_row, results["runs"]), lost], baseline="vanilla", reference_learning_rate=LR), {})
    assert "it jumped in 2 of 3 (sums)" in page


def test_the_gates_power_is_a_table_by_true_change(results, tmp_path):
    row = {"from": 0.025, "to": 0.075, "moves": 4, "searches": 80, "shared": 0.9, "fresh": 0.75}
    row |= {"shared_by_run": [0.85, 0.95], "fresh_by_run": [0.5, 1.0]}
    (tmp_path / "gate_power.json").write_text(
        json.dumps({"by_true_change": [row | {"from": None, "to": -0.075}, row, row | {"to": None}]})
    )
    found = gate_errors(tmp_path)
    section = render(results | found, {}).partition("## What EffOPD's gate accepts")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in lines] == ["| below -7.5", "| +2.5 to +7.5", "| +2.5 and more"]
    assert all(line.endswith("| 4 | 80 | 90% (85% to 95%) | 75% (50% to 100%) |") for line in lines)
    assert "real displacements of 2 `effopd` runs" in section


def test_tables_are_rectangular(results):
    blocks = [b for b in render(results, {}).split("\n\n") if b.startswith("| ")]
    assert len(blocks) >= 6
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_is_whole(results, width):
    text = printed(results, width)
    assert "…" not in text and "effopd" in text and "vanilla" in text
    assert text.count("vanilla's final held-out KL") == 2
    found = Lookup(results).speedup("sums", ("effopd", LR), "seconds")
    assert f"{found['median']:.2f}×" in text and "3/3" in text and "10.0%" in text


def test_the_terminal_shows_intervals_of_runs_that_never_arrive():
    slow = [run("effopd", seed, speed=2.0, floor=0.5 if seed else 0.0) for seed in range(3)]
    results = analyse([*(run("vanilla", seed) for seed in range(3)), *slow], baseline="vanilla",
                      reference_learning_rate=LR)  # fmt: skip
    row = Lookup(results).speedup("sums", ("effopd", LR), "seconds")
    assert row["low"] == row["median"] == 0.0 < row["high"]
    for width in (80, 120):
        assert f"never–{row['high']:.2f}" in printed(results, width)


def test_the_same_json_draws_the_same_page(results):
    again = json.loads(json.dumps(results, allow_nan=False))
    assert render(again, {"a": "b.png"}) == render(results, {"a": "b.png"})
    assert printed(again, 100) == printed(results, 100)


def test_variants_have_a_table_of_their_own(results):
    assert "What each part is worth" not in render(results, {})
    runs = [run(name, seed, speed=speed) for seed in range(5)
            for name, speed in (("vanilla", 1), ("look", 4), ("look-short", 2), ("vanilla-linear", 1))]  # fmt: skip
    page = render(analyse(runs, baseline="vanilla", reference_learning_rate=LR), {})
    section = page.partition("## What each part is worth")[2].partition("\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| sums")]  # the baseline has no variants
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["`look`", "`short`", "3e-05"]
    assert 0.4 < float(cells[4].split("×")[0]) < 0.6
    assert cells[-1].startswith("+0.0")
