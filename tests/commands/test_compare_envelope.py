"""`effopd compare --report` with price lists, a joined grid and a plan; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.grid_runs import LR, planted_run

from effopd.commands.compare import run_compare
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles
from effopd.errors import ConfigError
from effopd.report import compare_figures

PRICES = Path(__file__).parents[2] / "recipes" / "prices" / "1.7b-8b-1xh100.yaml"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """results.json of plain, topd (3 times as fast) and ours (4 times), as text arguments."""
    monkeypatch.setattr(compare_figures, "draw", lambda results, folder: {})
    runs = [
        planted_run(name, LR, seed, speed, noise=0.0, steps=range(0, 97, 8))
        for seed in range(2)
        for name, speed in (("plain", 1.0), ("topd", 3.0), ("ours", 4.0))
    ]
    results = analyze_runs(runs, Roles("plain", LR, headline=("ours",)))
    results["settings"] |= {"base": {}, "strategies": {"plain": {}, "topd": {"rollout_horizon": "topd"}, "ours": {}}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    return path


def report(*arguments):
    run_compare(["--report", *map(str, arguments)])


def test_prices_stay_in_the_results_and_are_on_the_page(grid, tmp_path):
    report(grid, "--prices", PRICES)
    report(grid)
    results, page = json.loads(grid.read_text()), (tmp_path / "results.md").read_text()
    assert [each["name"] for each in results["prices"]] == ["1.7B from 8B, one H100"]
    assert "priced:1.7B from 8B, one H100" in results["envelope"]["axes"] and "not measured" in page
    report(grid, "--join", f"small={grid}")
    joined = json.loads(grid.read_text())["joined_envelope"]
    assert joined["opening"] == ["ours (small)"] and "ours (small)" in (tmp_path / "results.md").read_text()
    with pytest.raises(ConfigError, match="--join 'small=RESULTS_JSON'"):
        report(grid, "--prices", PRICES.with_name("4b-32b-8xh100.yaml"))


def test_a_plan_names_the_baselines_of_a_finished_grid(grid, tmp_path):
    plan = tmp_path / "plan.yaml"
    fields = {
        "output_dir": "x", "reference_learning_rate": LR, "tasks": ["t"], "seeds": [0, 1], "base": {},
        "baselines": ["plain", "topd"], "headline": ["ours"],
        "strategies": {"plain": {}, "topd": {"rollout_horizon": "topd"}, "ours": {}},
    }  # fmt: skip
    plan.write_text(yaml.safe_dump(fields))
    report(grid, plan)
    opponents = json.loads(grid.read_text())["envelope"]["opponents"]
    assert all(row["arms"]["0"] == ["topd", LR] for row in opponents if row["axis"] == "seconds")
    plan.write_text(yaml.safe_dump(fields | {"base": {"max_steps": 3}}))
    with pytest.raises(ConfigError, match="max_steps"):
        report(grid, plan)


def test_wrong_arguments_are_refused_before_anything_is_written(grid, tmp_path):
    before = grid.read_text()
    for arguments, message in (
        ((grid, "--join", "small"), "LABEL=RESULTS_JSON"),
        ((grid, "--join", "small=nowhere.json"), "LABEL=RESULTS_JSON"),
        ((grid, "--prices", tmp_path / "none.yaml"), "--prices"),
    ):
        with pytest.raises(ConfigError, match=message):
            report(*arguments)
    with pytest.raises(ConfigError, match="needs --report"):
        run_compare(["plan.yaml", "--join", f"small={grid}"])
    assert grid.read_text() == before
