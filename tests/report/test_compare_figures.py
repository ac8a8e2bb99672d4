"""The figures of a comparison show what results.json holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from helpers.grid_runs import LR
from matplotlib.figure import Figure
from report.test_compare_page import ROLES, grid, run

from effopd.compare.results import analyze_runs
from effopd.report.compare_charts import charts, curve_strategies, strategy_looks
from effopd.report.compare_figures import draw
from effopd.report.compare_lookup import Lookup


@pytest.fixture
def figures(monkeypatch):
    """Figures as they would be saved, by name; no pixels are made."""
    kept = {}

    def keep(self, path, **options):
        kept[path.stem] = self
        path.write_bytes(b"png")

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def curves(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_every_figure_is_drawn_from_the_json_alone(tmp_path, figures):
    results = json.loads(json.dumps(grid(), allow_nan=False))
    drawn = draw(results, tmp_path / "figures")
    assert set(drawn) == set(figures) == {"speedups", "curves", "learning_rates"}
    assert all(path.is_file() for path in drawn.values())


def test_curves_hold_the_median_of_the_seeds(tmp_path, figures):
    results = grid(tasks=("sums",))
    draw(results, tmp_path)
    by_steps, by_seconds = figures["curves"].axes
    for axis in (by_steps, by_seconds):
        assert axis.get_yscale() == "log" and set(curves(axis)) == {"plain", "effopd", "noop"}
    ends = sorted(r["final_kl"] for r in results["runs"] if (r["strategy"], r["learning_rate"]) == ("effopd", LR))
    assert curves(by_steps)["effopd"].get_ydata()[-1] == pytest.approx(ends[1])
    assert len(by_steps.collections) == 3  # a band each


def test_the_forest_marks_what_never_arrives(tmp_path, figures):
    runs = [run(name, seed, speed=speed, floor=floor) for seed in range(3)
            for name, speed, floor in (("plain", 1, 0), ("effopd", 2, 0), ("stuck", 1, 0.5))]  # fmt: skip
    results = analyze_runs(runs, ROLES)
    draw(results, tmp_path)
    axis = figures["speedups"].axes[0]
    points = [line for line in axis.get_lines() if len(line.get_xdata()) == 1]
    medians = {line.get_marker(): line.get_xdata()[0] for line in points}
    expected = Lookup(results).speedup("sums", ("effopd", LR), "steps")["median"]
    assert medians["o"] == pytest.approx(expected)
    assert medians["<"] < 0.25  # at the left edge, not missing


def test_runs_that_never_arrive_sit_above_all_others(tmp_path, figures):
    draw(grid(tasks=("sums",)), tmp_path)
    (axis,) = figures["learning_rates"].axes
    crosses = [line.get_ydata()[0] for line in axis.get_lines() if line.get_marker() == "x"]
    points = [line.get_ydata()[0] for line in axis.get_lines() if line.get_marker() == "o"]
    assert len(crosses) == 3 and len(set(crosses)) == 1 and min(crosses) > max(points)
    assert len(points) == 9


def test_what_there_is_no_data_for_is_left_out(tmp_path, figures):
    only = analyze_runs([run("plain", 0)], ROLES)
    assert set(draw(only, tmp_path)) == {"curves"}


def test_without_the_baseline_nothing_is_drawn_that_needs_it(tmp_path, figures):
    runs = [run("effopd", seed, rate=rate) for seed in range(2) for rate in (LR, 3 * LR)]
    results = analyze_runs(runs, ROLES)
    assert Lookup(results).swept() == ["effopd"]
    assert set(draw(results, tmp_path)) == set(charts(Lookup(results))) == {"curves"}


def test_the_legend_hides_no_curve(tmp_path, figures):
    names = [f"strategy-with-a-long-name-{i}" for i in range(6)]
    draw(analyze_runs([run(name, 0) for name in ("plain", *names)], ROLES), tmp_path)
    figure = figures["curves"]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    left = legend.get_window_extent().x0
    assert all(axis.get_window_extent().x1 < left for axis in figure.axes)
    assert figure.axes[0].get_window_extent().width > 3 * figure.dpi


def test_a_diverged_run_does_not_stop_the_figures(tmp_path, figures):
    whole = run("effopd", 0)
    evaluations = tuple(replace(e, kl=math.nan) if e.step > 20 else e for e in whole.evaluations)
    runs = [run("plain", 0), run("plain", 1), replace(whole, evaluations=evaluations), run("effopd", 1)]
    assert "curves" in draw(analyze_runs(runs, ROLES), tmp_path)


@pytest.mark.parametrize("early", [(0,), (0, 1)])
def test_a_run_that_ends_before_its_first_evaluation_has_no_curve(tmp_path, figures, early):
    ended = [replace(run("effopd", seed), evaluations=run("effopd", seed).evaluations[:1]) for seed in range(2)]
    runs = [run("plain", 0), run("plain", 1)]
    runs += [ended[seed].diverged() if seed in early else run("effopd", seed) for seed in range(2)]
    results = analyze_runs(runs, ROLES)
    draw(results, tmp_path)
    assert set(curves(figures["curves"].axes[0])) == {"plain"}
    assert {series.label for panel in charts(Lookup(results))["curves"].drawn for series in panel.series} == {"plain"}


def test_runs_with_a_single_evaluation_have_no_curves(tmp_path, figures):
    results = analyze_runs([replace(run("plain", 0), evaluations=run("plain", 0).evaluations[:1])], ROLES)
    draw(results, tmp_path)
    assert "curves" not in charts(Lookup(results))


def test_curves_begin_with_those_of_the_roles_and_figures_have_not_too_many(tmp_path, figures):
    others = [f"other-{i}" for i in range(12)]
    runs = [run(name, 0) for name in ("plain", *others, "noop", "effopd")]
    results = analyze_runs(runs, replace(ROLES, variants={"other-0": "other-1"}))
    shown = curve_strategies(Lookup(results))
    assert shown[:3] == ["plain", "effopd", "noop"] and "other-0" not in shown and len(shown) == 14
    draw(results, tmp_path)
    assert list(curves(figures["curves"].axes[0])) == ["plain", *others[1:6], "noop", "effopd"]


def test_a_strategy_without_a_run_at_the_reference_rate_is_drawn_at_the_nearest_with_the_most_runs():
    rate = ROLES.reference_learning_rate
    runs = [run("plain", 0), *(replace(run("effopd", 0), learning_rate=f * rate) for f in (0.01, 0.1, 30))]
    lookup = Lookup(analyze_runs(runs, ROLES))
    assert lookup.drawn_rates() == {"plain": rate, "effopd": 0.1 * rate}
    assert curve_strategies(lookup) == ["plain", "effopd"]
    runs += [replace(run("effopd", 1), learning_rate=30 * rate), run("plain", 1)]
    runs += [replace(run("plain", seed), learning_rate=3 * rate) for seed in range(3)]
    assert Lookup(analyze_runs(runs, ROLES)).drawn_rates() == {"plain": rate, "effopd": 30 * rate}


def test_charts_hold_the_values_of_the_figures():
    results = grid(tasks=("sums",))
    lookup = Lookup(results)
    drawn = charts(lookup)
    assert list(drawn) == ["speedups", "curves", "learning_rates"]
    by_steps = {series.label: series for series in drawn["curves"].drawn[0].series}
    ends = sorted(r["final_kl"] for r in results["runs"] if (r["strategy"], r["learning_rate"]) == ("effopd", LR))
    assert set(by_steps) == {"plain", "effopd", "noop"} and by_steps["effopd"].y[-1] == pytest.approx(ends[1])
    steps = drawn["speedups"].drawn[0]
    medians = {series.label: series.x[0] for series in steps.series if series.points}
    for strategy, median in medians.items():
        expected = lookup.speedup("sums", (strategy, LR), "steps")["median"]
        assert median == pytest.approx(max(expected, 0.1))  # never: at the end of the axis
    (rule,) = drawn["learning_rates"].drawn[0].rules
    never = [s.y for s in drawn["learning_rates"].drawn[0].series if not s.line and s.label == "effopd"]
    assert [y for values in never for y in values].count(rule.at) == 3


def test_colors_do_not_depend_on_the_grid():
    few, many = (
        strategy_looks(Lookup(analyze_runs([run(name, 0) for name in names], ROLES)))
        for names in (("plain", "effopd"), ("noop", "line_search", "effopd", "plain"))
    )
    assert few["effopd"].light == many["effopd"].light and few["plain"].light == many["plain"].light
