"""Grids continued on another machine: which runs are made here, and what becomes of the others'
seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.grid_runs import LR
from helpers.grid_runs import planted_run as run

from effopd.compare.grid import Grid
from effopd.compare.grid_run import to_row
from effopd.compare.imported_runs import (
    Source,
    key,
    merge_runs,
    read_entries,
    runs_to_make,
    save_entries,
    saved_entries,
    scaled,
    sources,
)
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles
from effopd.errors import ConfigError
from effopd.report.compare_page import render

BASE = {"max_steps": 96, "cost_clock": "cpu"}


def plan(root: Path = Path("nowhere"), **changes) -> Grid:
    values = {
        "output_dir": str(root), "reference_learning_rate": LR, "tasks": ["t", "u"], "seeds": [0, 1, 2], "base": BASE,
        "strategies": {"plain": {}, "twice": {"effopd": {"strategy": "effopd"}}},
    } | changes  # fmt: skip
    return Grid(**values)


def grid(**settings):
    arms = {"plain": {}, "twice": {"speed": 2.0}}
    return [
        run(name, seed=seed, task=task, **arm, **settings)
        for seed in range(3)
        for task in ("t", "u")
        for name, arm in arms.items()
    ]


def analyzed(runs):
    return analyze_runs(runs, Roles("plain", LR))


def results_json(path: Path, runs, the_plan: Grid, **settings) -> Path:
    found = analyzed(runs)
    found["settings"] |= {"base": the_plan.base, "strategies": the_plan.strategies, "tasks": the_plan.tasks} | settings
    path.write_text(json.dumps(found))
    return path


def test_what_is_known_is_not_made_again_but_one_run_of_each_task():
    there = [r for r in grid() if r.seed < 2]
    made = runs_to_make(plan(), [Source("a.json", tuple(there))])
    assert [(r.task, r.strategy, r.seed) for r in made] == [
        ("t", "plain", 0), ("u", "plain", 0),  # made on both machines
        ("t", "plain", 2), ("t", "twice", 2), ("u", "plain", 2), ("u", "twice", 2),
    ]  # fmt: skip
    assert runs_to_make(plan(), []) == plan().runs()


def test_the_run_made_on_both_machines_is_one_that_the_source_has():
    rates = {"strategies": {"plain": {"learning_rate_factors": [1, 3, 10]}}}
    there = [run("plain", 3e-4, 1, task="t"), run("plain", 9e-5, 2, task="t")]
    for more, first in (([], ("t", 3e-4, 1)), ([run("plain", LR, 2, task="t")], ("t", LR, 2))):
        made = runs_to_make(plan(**rates), [Source("a.json", (*there, *more))])
        assert [(r.task, r.learning_rate, r.seed) for r in made[:2]] == [first, ("u", LR, 0)]
        assert len({r.path for r in made}) == len(made) == 18 - 2 - len(more) + 1


def test_a_file_without_the_baseline_shares_another_run():
    """Seconds are converted by any run of both machines; the baseline of the plan may not exist."""
    there = [run("twice", LR, 1, task="t"), run("twice", LR, 2, task="t")]
    made = runs_to_make(plan(), [Source("a.json", tuple(there))])
    assert [(r.task, r.strategy, r.seed) for r in made[:2]] == [("t", "twice", 1), ("u", "plain", 0)]
    assert len({r.path for r in made}) == len(made) == 12 - 2 + 1


def test_runs_of_another_command_are_imported_too():
    the_plan = plan()
    more = [replace(r, strategy="rewarded") for r in the_plan.runs() if r.strategy == "plain"]
    there = [*grid(), *(run("rewarded", seed=seed, task="t") for seed in range(3))]
    settings = the_plan.roles.to_settings() | {"base": the_plan.base, "strategies": the_plan.strategies}
    entries = [{"path": "r.json", "settings": settings, "runs": [to_row(r) for r in there]}]
    assert [len(found.runs) for found in (*sources(the_plan, entries), *sources(the_plan, entries, more))] == [12, 15]
    read, (note,) = merge_runs(the_plan, [run(seed=0, task="t")], sources(the_plan, entries, more), more)
    assert [r.strategy for r in read[-3:]] == ["rewarded"] * 3 and len(read) == 15 and note["runs"] == 14


def test_a_slower_machine_changes_no_speedup():
    whole = grid()
    here = [r for r in whole if r.strategy == "plain"]
    there = [scaled(r, 1.4) for r in whole if r.strategy == "twice" or r.seed == 0]
    read, (note,) = merge_runs(plan(), here, [Source("a.json", tuple(there))])
    assert note["factor"] == pytest.approx(1 / 1.4) and (note["n"], note["runs"]) == (2, 6)
    assert [r.merges for r in read] == [(0,) if r.strategy == "twice" else () for r in read]
    assert [key(r) for r in read] == [key(r) for r in plan().runs()]
    mixed, alone = analyzed(read)["speedups"], analyzed(whole)["speedups"]
    for ours, theirs in zip(mixed, alone, strict=True):
        assert ours["median"] == pytest.approx(theirs["median"], rel=1e-4), ours
    wrong = analyzed([*here, *(r for r in there if key(r) not in set(map(key, here)))])["speedups"]
    assert any(a["median"] != pytest.approx(b["median"], rel=0.1) for a, b in zip(wrong, alone, strict=True))


def test_the_run_made_here_wins_and_then_the_first_source():
    here = [run(seed=0, task="t", code="here")]
    first = [run(seed=0, task="t", code="first"), run(seed=1, task="t", code="first")]
    second = [run(seed=s, task="t", code="second") for s in range(3)]
    the_plan = plan()
    read, notes = merge_runs(the_plan, here, [Source("a", tuple(first)), Source("b", tuple(second))])
    assert [(r.seed, r.code) for r in read] == [(0, "here"), (1, "first"), (2, "second")]
    assert [note["runs"] for note in notes] == [1, 1]


def test_a_run_made_anew_counts_for_none_of_the_machines_that_made_it_before(tmp_path):
    """A grid that moves on twice: the second time `twice` is made anew, as after a change of the
    code.
    """
    whole = {key(r): r for r in grid()}
    baseline = [r for r in whole.values() if r.strategy == "plain" and r.seed == 0]
    the_plan, path = plan(tmp_path), tmp_path / "r.json"
    for speed, made_here in ((1.4, []), (0.7, [r for r in whole.values() if r.strategy == "twice"])):
        if made_here:
            (source,) = sources(the_plan, read_entries(the_plan, [path]))
        else:
            source = Source("first.json", tuple(scaled(r, speed) for r in whole.values()))
        read, notes = merge_runs(the_plan, [*baseline, *made_here], [source])
        results_json(path, read, the_plan, merges=notes)
    assert [note["runs"] for note in notes] == [4, 4]  # plain of the other seeds; 14 runs were taken over in all
    assert sorted({r.merges for r in read}) == [(), (0, 1)]
    assert all(r.merges == () for r in read if r.strategy == "twice" or r.seed == 0)
    page = render(json.loads(path.read_text()), {})
    assert "4 of the 12 runs were made on other machines" in page and "4 runs were merged more than once" in page


def test_the_merges_of_several_sources_keep_their_order():
    first, second = ([run(seed=s, task="t", code="there") for s in seeds] for seeds in ((0, 1), (0, 1, 2)))
    second = [replace(r, merges=(1,)) for r in second]
    notes = ({"factor": 0.5}, {"factor": 2.0})
    read, found = merge_runs(
        plan(), [run(seed=0, task="t")], [Source("a", tuple(first), notes), Source("b", tuple(second), notes)]
    )
    assert [r.merges for r in read] == [(), (2,), (4, 5)]
    assert [note["runs"] for note in found] == [0, 0, 1, 0, 1, 1]


def test_a_speedup_is_the_one_measured_on_the_machine_that_made_its_runs():
    """Also where machines differ by more for one seed than for another, and where the baseline came
    from a third one.
    """
    whole = {key(r): r for r in grid()}
    uneven = [1.4, 1.1, 1.9]
    third = [r for r in whole.values() if r.strategy == "plain"]
    there = [scaled(r, uneven[r.seed]) for r in whole.values()]
    here = [r for r in third if r.seed == 0]
    found = [Source("third.json", tuple(scaled(r, 0.7) for r in third)), Source("there.json", tuple(there))]
    read, notes = merge_runs(plan(), here, found)
    assert [note["runs"] for note in notes] == [4, 6]
    paces = {key(r): r.evaluations[-1].costs.net_seconds for r in read}
    for task in ("t", "u"):
        for seed in range(3):
            ours = [paces[task, name, LR, seed] for name in ("plain", "twice")]
            assert ours[0] / ours[1] == pytest.approx(1.0)  # both cost a second a step


def test_seconds_without_a_run_in_common_are_refused():
    with pytest.raises(ConfigError, match=r"no finished run in common.*a run that the file holds"):
        merge_runs(plan(), [run(seed=0, task="t")], [Source("a.json", (run(seed=1, task="t"),))])


def test_a_source_comes_back_from_its_copy(tmp_path):
    the_plan = plan(tmp_path)
    entries = read_entries(the_plan, [results_json(tmp_path / "r.json", grid(), the_plan, merges=[{"runs": 3}])])
    save_entries(the_plan, entries)
    (source,) = sources(the_plan, saved_entries(the_plan))
    assert {key(r) for r in source.runs} == {key(r) for r in the_plan.runs()} and source.merges == ({"runs": 3},)
    assert saved_entries(plan(tmp_path / "other")) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": BASE | {"max_steps": 48}}, r"base.max_steps \(48 here, 96 there\)"),
        ({"strategies": {"plain": {}, "twice": {"effopd": {"strategy": "line_search"}}}}, "strategies.twice.effopd"),
        ({"reference_learning_rate": 1e-3}, "reference_learning_rate"),
        ({"tasks": {"t": {"train_size": 9}, "u": {}}}, r"tasks.t.train_size \(9 here, None there\)"),
        ({"tasks": {"t": {"max_steps": 9}}}, r"tasks.t.max_steps \(9 here, 96 there\)"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, changes, message):
    path = results_json(tmp_path / "r.json", grid(), plan())
    with pytest.raises(ConfigError, match=message):
        read_entries(plan(tmp_path, **changes), [path])


def test_more_rates_or_strategies_are_no_other_settings(tmp_path):
    path = results_json(tmp_path / "r.json", grid(), plan())
    more = {"plain": {"learning_rate_factors": [1, 3]}, "noop": {"effopd": {"strategy": "noop"}}}
    assert read_entries(plan(tmp_path, tasks={"t": {"max_steps": 96}, "v": {"max_steps": 9}}), [path])  # as `base`
    (entry,) = read_entries(plan(tmp_path, strategies=more), [path])
    (source,) = sources(plan(tmp_path, strategies=more), [entry])
    assert {r.strategy for r in source.runs} == {"plain"}


def test_settings_of_what_never_ran_are_no_other_settings(tmp_path):
    """A strategy or task that a plan lists and no run of the file has can be planned anew."""
    ran = [r for r in grid() if (r.task, r.strategy) == ("t", "plain")]
    path = results_json(tmp_path / "r.json", ran, plan(tasks={"t": {}, "u": {"max_steps": 9}}))
    changed = plan(tmp_path, strategies={"plain": {}, "twice": {"max_steps": 7}}, tasks={"t": {}, "u": {}})
    assert [len(source.runs) for source in sources(changed, read_entries(changed, [path]))] == [len(ran)]


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"settings": {}, "runs": [{"task": "t"}]}'])
def test_what_is_no_results_json_is_said(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json"):
        read_entries(plan(tmp_path), [tmp_path / "r.json"])
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_entries(plan(tmp_path), [tmp_path / "none.json"])
