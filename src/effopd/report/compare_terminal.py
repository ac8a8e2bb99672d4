"""Terminal tables of a comparison."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from effopd.report.compare_lookup import AXIS_NAMES, Lookup, Results, Row, number, one, times


def summary_tables(results: Results) -> list[Table]:
    """One table per task: the strategies at the reference learning rate."""
    lookup = Lookup(results)
    return [_summary_table(lookup, task) for task in lookup.tasks]


def _summary_table(lookup: Lookup, task: str) -> Table:
    seeds = len({run["seed"] for run in lookup.results["runs"] if run["task"] == task})
    drawn = Table(
        title=escape(
            f"{task}: net speed-up to the final held-out KL of {lookup.baseline}, {seeds} seed(s), median, low–high"
        ),
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    drawn.add_column("", no_wrap=True)
    for name in ("steps", "net\nseconds", "sampled\ntokens", "reached", "final\nKL", "accuracy", "search"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for strategy in lookup.at_reference():
        arm = (strategy, lookup.reference)
        if not lookup.runs(task, arm):
            continue
        last = {"final_kl": ".4f", "final_accuracy": ".3f", "search_share": ".1%"}
        drawn.add_row(
            escape(strategy),
            *(_two_lines(lookup.speedup(task, arm, axis)) for axis in list(AXIS_NAMES)[:3]),
            lookup.reached(task, arm).replace(" of ", "/"),
            *(number(lookup.quality(task, arm, name), form).split(" ")[0] for name, form in last.items()),
        )
    return drawn


def _two_lines(row: Row | None) -> str:
    """The median above its interval, without brackets, which rich parses as markup."""
    if row is None or row["n"] < 2 or (row["median"], row["low"], row["high"]) == (0, 0, 0):
        return times(row).partition(" (")[0]
    return f"{one(row['median'])}\n{one(row['low'], '')}–{one(row['high'], '')}"
