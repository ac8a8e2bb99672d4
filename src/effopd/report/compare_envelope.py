"""Tables of a comparison page on the speed-up over the best-tuned run without look-ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from effopd.compare.axes import axis_name
from effopd.compare.grid_run import Arm
from effopd.compare.paired import coverage
from effopd.report.compare_lookup import FEW, Lookup, Row, Table, one, times

Part = Mapping[str, Any]
#: Shares of a table; the figure has all of them.
TABLE_SHARES = (0.5, 0.25, 0.1, 0.05, 0.025, 0.01)


def parts(lookup: Lookup) -> list[Part]:
    """The envelope of the grid, then the one joined with another grid, if there are any."""
    found = (lookup.results.get(name) for name in ("envelope", "joined_envelope"))
    return [part for part in found if part is not None]


def shown(lookup: Lookup, part: Part) -> list[str]:
    """Strategies of the figures and tables: the headline of the grid and of the joined one."""
    strategies = dict.fromkeys(row["strategy"] for row in part["speedups"])
    own = [name for name in lookup.roles.opening(lookup.at_reference()) if name in strategies]
    return [*own, *(name for name in part.get("opening", ()) if name in strategies)]


def axes_with_data(lookup: Lookup, part: Part, *, first: bool = False) -> list[str]:
    """Axes on which the cost of a shown strategy is known, or that of the first one shown."""
    names = shown(lookup, part)[: 1 if first else None]
    known = {row["axis"] for row in part["speedups"] if row["strategy"] in names}
    return [axis for axis in part["axes"] if axis in known]


def curves(part: Part, task: str, axis: str, strategy: str) -> list[tuple[Arm, Part]]:
    """(arm, its row) of a strategy, by ascending learning rate."""
    rows = [row for row in part["speedups"] if (row["task"], row["axis"], row["strategy"]) == (task, axis, strategy)]
    return [((strategy, row["learning_rate"]), row) for row in sorted(rows, key=lambda row: row["learning_rate"])]


def at(row: Part, index: int) -> Row:
    """One point of a curve, as a row of `paired.SeedMedian`."""
    return {name: row[name][index] for name in ("median", "low", "high", "n")}


def _indices(part: Part) -> list[int]:
    return [part["shares"].index(share) for share in TABLE_SHARES]


def _heads() -> list[str]:
    return [f"to {100 * share:.3g} % of the starting KL" for share in TABLE_SHARES]


def _tasks(part: Part) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in part["tuning"]))


def speed_table(lookup: Lookup, part: Part, axis: str) -> Table:
    """Speed-up by target; one row per shown strategy, learning rate and task."""
    rows = []
    for task in _tasks(part):
        for strategy in shown(lookup, part):
            for arm, row in curves(part, task, axis, strategy):
                cells = [times(at(row, index)) for index in _indices(part)]
                rows.append([task, f"`{strategy}`", f"{arm[1]:.3g}", *cells])
    return Table(["task", "strategy", "learning rate", *_heads()], rows)


def range_table(lookup: Lookup, part: Part) -> Table:
    """Range of a strategy's medians over its learning rates, with the worst seed of all."""
    rows = []
    for axis in axes_with_data(lookup, part):
        for task in _tasks(part):
            for strategy in shown(lookup, part):
                found = curves(part, task, axis, strategy)
                if found:
                    cells = [_range([(rate, row) for (_, rate), row in found], index) for index in _indices(part)]
                    rows.append([axis_name(axis), task, f"`{strategy}`", *cells])
    return Table(["cost", "task", "strategy", *_heads()], rows)


def _range(rows: list[tuple[float, Part]], index: int) -> str:
    """`1.02–1.20×, worst 0.87× (seed 3, 3e-05)`."""
    points = [(rate, row) for rate, row in rows if row["n"][index]]
    if not points:
        return "–"
    medians = sorted(_value(row["median"][index]) for _, row in points)
    ends = [one(_stored(value), "") for value in (medians[0], medians[-1])]
    worst = {rate: row.get("worst", row["low"])[index] for rate, row in points}  # older files: few seeds, their range
    rate, row = min(points, key=lambda each: _value(worst[each[0]]))
    text = ends[0] if ends[0] == ends[1] else "–".join(ends)
    return f"{text}, worst {one(worst[rate], '')} (seed {row['worst_seed'][index]}, {rate:.3g})"


def _value(value: float | None) -> float:
    return math.inf if value is None else value


def _stored(value: float) -> float | None:
    return None if math.isinf(value) else value


def opponent_table(part: Part) -> Table:
    """Best-tuned run per target, its cost to the target, and the cost of tuning it."""
    rows = []
    for axis in part["axes"]:
        for task in _tasks(part):
            tuning = next(row for row in part["tuning"] if (row["task"], row["axis"]) == (task, axis))
            for row in _opponents(part, task, axis):
                if row["share"] in TABLE_SHARES:
                    rows.append(
                        [axis_name(axis), task, f"{100 * row['share']:.3g} %", _names(row), *_costs(row, tuning)]
                    )
    header = ["cost", "task", "target", "best-tuned run, seeds", "its cost, median", "tuning cost", "… as a multiple"]
    return Table(header, rows)


def _opponents(part: Part, task: str, axis: str) -> Iterator[Part]:
    return (row for row in part["opponents"] if (row["task"], row["axis"]) == (task, axis))


def _names(row: Part) -> str:
    """`plain` 9e-05 (0, 1, 3), `topd` 3e-05 (2, 4)."""
    by_arm: dict[str, list[str]] = {}
    for seed, arm in row["arms"].items():
        by_arm.setdefault("none" if arm is None else f"`{arm[0]}` {arm[1]:.3g}", []).append(seed)
    if len(by_arm) == 1:
        return next(iter(by_arm))
    return ", ".join(f"{name} ({', '.join(seeds)})" for name, seeds in by_arm.items())


def _costs(row: Part, tuning: Part) -> list[str]:
    cost, total = row["cost"], tuning["cost"]
    none = all(arm is None for arm in row["arms"].values())
    return [
        "–" if none else "never" if cost is None else f"{cost:,.4g}",
        "–" if total is None else f"{total:,.4g} ({tuning['runs']} runs)",
        "–" if total is None or not cost else f"{total / cost:.3g}×",
    ]


def interval(lookup: Lookup, part: Part) -> str:
    """How the interval of the figures is made, by the numbers of seeds of the shown strategies."""
    names = shown(lookup, part)
    numbers = {max(row["n"]) for row in part["speedups"] if row["strategy"] in names and any(row["n"])}
    low, high = min(numbers, default=0), max(numbers, default=0)
    seeds = f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds"
    covers = list(dict.fromkeys(f"{100 * coverage(n):.4g}" for n in (low, high)))
    kind = "range" if high <= FEW else "interval of the median" if low > FEW else "interval of the median or range"
    return f"{kind} over {seeds}, paired by seed, which covers the median in {' to '.join(covers)} % of cases"
