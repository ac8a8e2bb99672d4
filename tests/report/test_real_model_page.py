"""Blocks of docs/real_model.md from planted runs."""

from __future__ import annotations

import dataclasses

import pages
import real_model
from helpers.grid_runs import planted_run

from effopd.compare.envelope_rows import envelopes
from effopd.compare.grid_run import SearchSummary, to_row
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles


def results():
    runs = []
    for task in ("reasoning-gym:a", "reasoning-gym:b"):
        for seed in range(3):
            for rate, speed in ((1e-5, 1.0), (3e-5, 2.0)):
                runs.append(planted_run("plain", rate, seed, speed, task=task, noise=0.0))
            fast = planted_run("line_search", 3e-6, seed, 4.0, task=task, noise=0.0)
            runs.append(dataclasses.replace(fast, searches=SearchSummary(((1, 16.0), (2, -0.5)), 4)))
    return {"settings": {"strategies": {"plain": {}, "line_search": {}}}, "runs": [to_row(run) for run in runs]}


def test_every_block_of_the_page_has_its_place_and_the_right_values():
    page = real_model.Page(results())
    blocks = page.blocks()
    pages.with_blocks((pages.DOCS / "real_model.md").read_text(), {**blocks, "pairs": ""})
    speeds = [line for line in blocks["speed-up in steps"].splitlines() if "`line_search`" in line]
    assert len(speeds) == 2 and all("2.0" in line or "1.9" in line or "2.1" in line for line in speeds)
    tuned = [line for line in blocks["speed-up in net seconds"].splitlines() if "`plain` | 3e-05" in line]
    assert all(line.count("1.00× (1.00–1.00, n = 3)") == 4 for line in tuned) and len(tuned) == 2
    assert blocks["tuned rates"].count("`plain` 3e-05") == 2 * 4 * 3
    assert blocks["searches"].count("1: +16, 2: -0.5") == 6


def test_the_comparison_with_tuned_rivals_has_an_opponent_per_number_of_rollouts():
    def pace(seed):
        return 0.01

    def with_all_tokens(run):
        """The run with the tokens of updates and of the teacher, which prices need."""
        known = ("update_forward_tokens", "teacher_forward_tokens", "search_teacher_tokens")
        costs = [dataclasses.replace(e.costs, **dict.fromkeys(known, e.step)) for e in run.evaluations]
        pairs = zip(run.evaluations, costs, strict=True)
        return dataclasses.replace(run, evaluations=tuple(dataclasses.replace(e, costs=each) for e, each in pairs))

    roles = Roles("tuned", 3e-5, headline=("search", "search-32"), baselines=("tuned", "tuned-32"))
    speeds = {("tuned", 3e-5): 1.0, ("tuned", 1e-4): 2.0, ("search", 3e-6): 3.0}
    speeds |= {("tuned-32", 3e-5): 4.0, ("search-32", 3e-6): 2.0}
    runs = [
        with_all_tokens(planted_run(name, rate, seed, speed, task="gym:a", noise=0.0, pace=pace, steps=range(241)))
        for (name, rate), speed in speeds.items() for seed in range(2)
    ]  # fmt: skip
    found = analyze_runs(runs, roles)
    found["settings"] = {**roles.to_settings(), "strategies": dict.fromkeys(name for name, _ in speeds)}
    blocks = real_model.tuned_blocks(found | envelopes(found, ()))
    pages.with_blocks((pages.DOCS / "real_model.md").read_text(), blocks)
    rows = {name: {tuple(row.split(" | ")[:3]): row for row in text.splitlines()} for name, text in blocks.items()}
    # 25 % is met at ln 4 / (0.01 · speed) steps; the trailing median adds one
    few, many = (rows[f"tuned, {rollouts} rollouts"] for rollouts in (16, 32))
    assert few["| steps", "`a`", "opponent"].split(" | ")[4] == "`tuned` ×3.3"
    assert few["| steps", "`a`", "`search`"].split(" | ")[4] == f"{71 / 48:.2f}×"
    assert many["| steps", "`a`", "opponent"].split(" | ")[4] == "`tuned-32` ×1"
    assert many["| steps", "`a`", "`search-32`"].split(" | ")[4] == f"{36 / 71:.2f}×"
    assert rows["tuned, steps"]["| `a`", "`search`", "×0.1"].split(" | ")[5] == "48"
    assert ("| steps", "`a`", "`search-32`") not in few and ("| steps", "`a`", "`search`") not in many


def test_pairs_show_accuracies_with_intervals():
    accuracy = {
        when: {"mean": mean, "low": 0.1, "high": 0.9, "n": 200} for when, mean in (("before", 0.2), ("after", 0.5))
    }
    summary = {"avg@1": 0.75, "ci95_low": 0.7, "ci95_high": 0.8}
    text = real_model.pairs_table({"a": {"accuracy": accuracy}, "b": {"accuracy": accuracy}}, {"a": summary})
    assert "| a | 0.200 [0.100, 0.900] | 0.500 [0.100, 0.900] | 0.750 [0.700, 0.800] | 200 |" in text
    assert "| b | 0.200 [0.100, 0.900] | 0.500 [0.100, 0.900] | – | 200 |" in text


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "PLACE", tmp_path)
    real_model.Page(results()).draw()
    assert (tmp_path / "curves.png").stat().st_size > 20_000
