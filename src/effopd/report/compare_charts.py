"""Charts of a comparison's page: speed-ups, held-out curves, learning rates, envelope."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from effopd.compare.axes import axis_name
from effopd.compare.time_to_target import smooth
from effopd.report import compare_envelope, envelope_figure
from effopd.report.charts import NEUTRAL, Axis, Chart, Panel, Rule, Series, existing
from effopd.report.compare_lookup import FEW, Lookup, Row, factor, times
from effopd.report.style import Look, looks

#: Ends of the speed-up axes; values beyond them are drawn at the end.
_FLOOR, _CEILING = 0.1, 30.0
_TICKS = [(0.1, "≤ 0.1, never"), (0.25, "¼"), (0.5, "½"), (1.0, "1×"), (2.0, "2"), (5.0, "5"), (10.0, "10"),
          (30.0, "≥ 30")]  # fmt: skip
_FEW_TICKS = [(0.1, "never"), (1.0, "1×"), (3.0, "3"), (10.0, "10"), (30.0, "≥ 30")]


def strategy_looks(lookup: Lookup) -> dict[str, Look]:
    """Look of every strategy of the grid, and of a grid joined with it."""
    names = list(dict.fromkeys(strategy for strategy, _ in lookup.arms))
    for part in compare_envelope.parts(lookup):
        names += [name for name in compare_envelope.shown(lookup, part) if name not in names]
    return looks({name: name for name in names})


def charts(lookup: Lookup) -> dict[str, Chart]:
    """All charts with data, by name, in the order of the page."""
    styles = strategy_looks(lookup)
    drawn = [
        *(_envelope(lookup, name, axis, styles) for name, axis in envelope_figure.figures(lookup).items()),
        _speedups(lookup, styles),
        _curves(lookup, styles),
        _rates(lookup, styles),
    ]
    return {chart.name: chart for chart in existing(drawn)}


def _envelope(lookup: Lookup, name: str, axis: str, styles: Mapping[str, Look]) -> Chart:
    """Speed-up against the target: one panel per envelope and task."""
    panels = []
    x = Axis("target: held-out KL, share of its start", "log", [(0.5, "50 %"), (0.25, "25 %"), (0.1, "10 %"),
             (0.05, "5 %"), (0.025, "2.5 %"), (0.01, "1 %")], reverse=True)  # fmt: skip
    y = Axis(f"speed-up in {axis_name(axis)}", "log", _TICKS)
    for part in compare_envelope.parts(lookup):
        if axis not in compare_envelope.axes_with_data(lookup, part):
            continue
        for task in lookup.tasks:
            lines = []
            for strategy in compare_envelope.shown(lookup, part):
                found = compare_envelope.curves(part, task, axis, strategy)
                main = next((arm for arm, _ in found if arm[1] == lookup.reference), found[0][0] if found else None)
                for arm, row in found:
                    lines.append(_target_line(strategy, arm[1], row, part["shares"], styles[strategy], arm == main))
            panels.append(Panel(f"{task}: {envelope_figure.opponents(part)}", x, y, lines, [Rule(1.0)]))
    title = f"Speed-up over the best-tuned run without look-ahead, in {axis_name(axis)}, against the target"
    return Chart(name, title, panels, f"{title}. {envelope_figure.note(lookup)}")


def _target_line(strategy: str, rate: float, row: Row, shares: Sequence[float], look: Look, main: bool) -> Series:
    kept = [i for i in range(len(shares)) if row["n"][i]]
    at = [compare_envelope.at(row, i) for i in kept]
    return Series(
        strategy,
        [shares[i] for i in kept],
        [_inside(point["median"]) for point in at],
        look if main else Look(look.light, look.dark, "3 2", look.marker),
        [_inside(point["low"]) for point in at] if main else None,
        [_inside(point["high"]) for point in at] if main else None,
        width=2.2 if main else 1.0,
        points=main,
        tips=[f"to {100 * shares[i]:.3g} %: {times(compare_envelope.at(row, i))}" for i in kept],
        note=f"learning rate {rate:.3g}",
    )


def _inside(value: float | None) -> float:
    return min(max(math.inf if value is None else value, _FLOOR), _CEILING)


def _speedups(lookup: Lookup, styles: Mapping[str, Look]) -> Chart | None:
    """Speed-ups of all strategies at the reference learning rate, one panel per task and cost."""
    strategies = lookup.compared()
    if not strategies:
        return None
    panels = []
    names = [(float(-i), strategy) for i, strategy in enumerate(strategies)]
    for task in lookup.tasks:
        for axis, label in (("steps", "steps"), ("seconds", "net seconds"), ("generated_tokens", "sampled tokens")):
            series = []
            for place, strategy in names:
                row = lookup.speedup(task, (strategy, lookup.reference), axis)
                if row is None or not row["n"]:
                    continue
                look = styles[strategy]
                low, high = _inside(row["low"]), _inside(row["high"])
                line = Look(look.light, look.dark, "" if row["n"] >= FEW else "3 2")
                series.append(Series(strategy, [low, high], [place, place], line, width=2.2, points=False))
                point = Look(look.light, look.dark, "", "<" if row["median"] == 0 else "o")
                series.append(Series(strategy, [_inside(row["median"])], [place], point, tips=[times(row)]))
            y = Axis("", ticks=names, limits=(0.6 - len(strategies), 0.4))
            panels.append(
                Panel(f"{task}: {label}", Axis(f"speed-up in {label}", "log", _FEW_TICKS), y, series, [_one()])
            )
    note = (
        f"Net speed-up to the final held-out KL of {lookup.baseline}, reference learning rate. Median over seeds "
        "with 95 % interval; dashed: fewer than five seeds, with their range."
    )
    return Chart("speedups", note, panels, note, columns=3, legend=False, rows=len(strategies))


def _one() -> Rule:
    return Rule(1.0, vertical=True)


def curve_strategies(lookup: Lookup) -> list[str]:
    """Drawing order: baseline, headline strategies, controls, then all others but variants."""
    ran = list(lookup.drawn_rates())
    wanted = [lookup.baseline, *lookup.roles.opening(ran), *lookup.roles.controls]
    wanted += [strategy for strategy in ran if strategy not in lookup.roles.variants]
    return [strategy for strategy in dict.fromkeys(wanted) if strategy in ran]


def _curves(lookup: Lookup, styles: Mapping[str, Look]) -> Chart:
    """Held-out KL against steps and net seconds: median over seeds, band from lowest to highest."""
    rates, panels = lookup.drawn_rates(), []
    for task in lookup.tasks:
        for key, costs in (("step", "optimizer steps"), ("seconds", "net seconds")):
            lines = []
            for strategy in curve_strategies(lookup):
                runs = [run["curve"] for run in lookup.runs(task, (strategy, rates[strategy]))]
                if runs:
                    x, median, low, high = band(runs, key)
                    if not x:
                        continue
                    same = rates[strategy] == lookup.reference
                    note = "" if same else f"learning rate {factor(rates[strategy], lookup.reference)}"
                    lines.append(Series(strategy, x, median, styles[strategy], low, high, points=False, note=note))
            y = Axis("held-out reverse KL, nats per token", "log")
            panels.append(Panel(f"{task}: {costs}", Axis(costs, "log"), y, lines))
    note = (
        "Held-out KL at the reference learning rate, or at the one nearest to it of those with the most runs. "
        "Smoothed. Line: median over seeds; shaded: lowest to highest. Curves end with the shortest run. Logarithmic "
        "axes: a speed-up is a shift to the left."
    )
    return Chart("curves", note, panels, note)


def band(curves: Sequence[Mapping[str, list[float]]], key: str, points: int = 60) -> tuple[list[float], ...]:
    """Smoothed KL of several runs on a common grid: x, median, lowest, highest.

    All are empty if a run ends before the first evaluation of another, or before its own.
    """
    later = [[x for step, x in zip(curve["step"], curve[key], strict=True) if step] for curve in curves]
    start, end = max(xs[0] if xs else math.inf for xs in later), min(xs[-1] if xs else 0.0 for xs in later)
    if start > end:
        return [], [], [], []
    x = np.geomspace(start, end, points)
    kl = [[math.inf if value is None else value for value in curve["kl"]] for curve in curves]
    y = np.array([np.interp(x, curve[key], smooth(values)) for curve, values in zip(curves, kl, strict=True)])
    return x.tolist(), np.median(y, axis=0).tolist(), y.min(axis=0).tolist(), y.max(axis=0).tolist()


def _rates(lookup: Lookup, styles: Mapping[str, Look]) -> Chart | None:
    """Net seconds to the reference target by learning rate; runs that miss it are at the top."""
    swept, panels = lookup.swept_to_target(), []
    for task in lookup.tasks:
        by_arm = {
            (strategy, rate): [
                (run["seed"], run["targets"]["reference_kl"]["seconds"])
                for run in lookup.runs(task, (strategy, rate))
                if "reference_kl" in run["targets"]
            ]
            for strategy, rate in sorted(lookup.arms, key=lambda arm: arm[1])
            if strategy in swept
        }
        seen = [seconds for of_arm in by_arm.values() for _, seconds in of_arm if seconds is not None]
        top = 1.6 * max(seen, default=1.0)
        lines = [one for strategy in swept for one in _rate_lines(strategy, by_arm, top, styles[strategy])]
        y = Axis("net seconds to the target", "log")
        rules = [Rule(top, "never arrives", look=NEUTRAL)]
        panels.append(Panel(task, Axis("learning rate", "log"), y, lines, rules))
    note = (
        "Net seconds to the baseline's final KL at the reference learning rate, by learning rate. Points: single "
        "seeds; at the top: never arrives. Line: median over seeds."
    )
    return Chart("learning_rates", note, panels, note) if swept else None


def _rate_lines(strategy: str, by_arm: Mapping[tuple[str, float], list], top: float, look: Look) -> list[Series]:
    arms = {rate: points for (other, rate), points in by_arm.items() if other == strategy and points}
    medians = [min(top, statistics.median([s or math.inf for _, s in points])) for points in arms.values()]
    single = [(rate, seed, seconds) for rate, points in arms.items() for seed, seconds in points]
    return [
        Series(strategy, list(arms), medians, look, points=False, note="median"),
        Series(
            strategy,
            [rate for rate, _, _ in single],
            [top if seconds is None else seconds for _, _, seconds in single],
            look,
            line=False,
            tips=[f"seed {seed}{'' if seconds else ': never arrives'}" for _, seed, seconds in single],
        ),
    ]
