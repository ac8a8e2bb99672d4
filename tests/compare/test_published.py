"""The published results follow from the runs that they hold, and the published pages from the
results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effopd.compare.cross_targets import runs_of
from effopd.compare.grid import load_grid, run_settings
from effopd.compare.results import analyze_runs
from effopd.compare.roles import Roles
from effopd.report.compare_charts import charts
from effopd.report.compare_lookup import Lookup
from effopd.report.compare_page import render

ROOT = Path(__file__).parents[2]


@pytest.fixture(
    scope="module",
    params=[("docs", "compare-testbed"), ("docs/ablation", "compare-ablation")],
    ids=lambda pair: pair[0],
)
def published(request):
    """(folder, its results.json, the plan of its recipe)."""
    folder, recipe = request.param
    return (
        ROOT / folder,
        json.loads((ROOT / folder / "results.json").read_text()),
        load_grid(ROOT / "recipes" / f"{recipe}.yaml"),
    )


@pytest.mark.slow
def test_the_runs_are_analyzed_to_the_published_numbers(published):
    _, results, _ = published
    again = json.loads(
        json.dumps(analyze_runs(runs_of(results), Roles.of_settings(results["settings"])), allow_nan=False)
    )
    for part in ("best_learning_rate", "lowest_learning_rate", "swept", "speedups", "quality", "runs"):
        assert_close(again[part], results[part], part)


def assert_close(made, stored, where):
    """Equal up to rounding: the last digit of a bootstrap bound depends on the processor."""
    if isinstance(stored, dict):
        assert list(made) == list(stored), where
        for key, value in stored.items():
            assert_close(made[key], value, f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(made) == len(stored), where
        for place, value in enumerate(stored):
            assert_close(made[place], value, f"{where}[{place}]")
    elif isinstance(stored, float):
        assert made == pytest.approx(stored, rel=1e-12), where
    else:
        assert made == stored, where


def test_the_page_is_drawn_from_the_results(published):
    folder, results, _ = published
    figures = {name: f"results/{name}.png" for name in charts(Lookup(results))}
    assert {path.stem for path in (folder / "results").glob("*.png")} == set(figures)
    assert render(results, figures) == (folder / "results.md").read_text()


def test_the_settings_are_those_of_the_recipe(published):
    _, results, grid = published
    settings = results["settings"]
    assert Roles.of_settings(settings) == grid.roles
    assert {name: run_settings(values) for name, values in settings["strategies"].items()} == {
        name: run_settings(values) for name, values in grid.strategies.items()
    }
    assert settings["base"] == grid.base
