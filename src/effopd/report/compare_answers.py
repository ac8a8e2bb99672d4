"""First tables of a comparison page: headline speed-ups, claims, tuned baseline, controls."""

from __future__ import annotations

import math

from effopd.compare.speedups import BEST
from effopd.report.compare_lookup import AXIS_NAMES, FEW, Lookup, Row, Table, times
from effopd.report.compare_tables import jumped

#: Target → its name on the page.
_TARGETS = {"reference_kl": "final KL", "gap_90": "90 %"}


def headline(lookup: Lookup) -> Table:
    """Net speed-ups of the headline strategies over baseline and rivals, at the reference rate."""
    rows = []
    for strategy in _headline_strategies(lookup):
        for opponent in (lookup.baseline, *lookup.roles.rivals):
            if opponent == strategy:
                continue
            for task in lookup.tasks:
                arm = (strategy, lookup.reference)
                speedups = [lookup.speedup(task, arm, axis, against=opponent) for axis in AXIS_NAMES]
                if speedups[0]:
                    rows.append([f"`{strategy}`", f"`{opponent}`", task, str(speedups[0]["n"]), *map(times, speedups)])
    return Table(["strategy", "over", "task", "seeds", *AXIS_NAMES.values()], rows)


def _headline_strategies(lookup: Lookup) -> list[str]:
    return lookup.roles.opening(lookup.at_reference())


def claims(lookup: Lookup) -> Table:
    """Verdict on each claim of the plan, per task."""
    rows = []
    for claim in lookup.roles.claims:
        arm = (claim.strategy, lookup.reference)
        for task in lookup.tasks:
            row = lookup.speedup(task, arm, claim.axis)
            if row and row["n"]:
                text = claim.text or f"{claim.speedup:g}× in {AXIS_NAMES[claim.axis]}"
                rows.append([text, f"`{claim.strategy}`", task, verdict(row, claim.speedup), times(row),
                             lookup.reached(task, arm), lookup.again(task, arm)])  # fmt: skip
    return Table(["claim", "strategy", "task", "verdict", "speed-up", "reached", "off target later"], rows)


def verdict(row: Row, claimed: float) -> str:
    """`reproduced` if the interval is at or above the claim, `not reproduced` if it is below.

    Otherwise, and with fewer than five seeds, `undecided`.
    """
    low, high = (math.inf if row[end] is None else row[end] for end in ("low", "high"))
    if row["n"] < FEW or low < claimed <= high:
        return "undecided"
    return "reproduced" if low >= claimed else "not reproduced"


def against_tuned_baseline(lookup: Lookup) -> Table:
    """Speed-ups in net seconds of the headline strategies over the baseline at its best rate.

    The strategies are listed at all their rates; the baseline's best rate depends on the target.
    """
    rows = []
    for strategy in _headline_strategies(lookup):
        for target, name in _TARGETS.items():
            for task in lookup.tasks:
                best = lookup.best(task, target)
                if best is None:
                    continue
                rates = sorted(
                    rate for other, rate in lookup.arms if other == strategy and lookup.runs(task, (other, rate))
                )
                by_rate = [
                    (rate, lookup.speedup(task, (strategy, rate), "seconds", target, rate=BEST)) for rate in rates
                ]
                baseline = times(lookup.speedup(task, (lookup.baseline, best), "seconds", target))
                cell = ", ".join(f"{rate:.3g}: {times(speedup)}" for rate, speedup in by_rate)
                rows.append([f"`{strategy}`", name, task, f"{best:.3g}", baseline, cell])
    header = ["strategy", "target", "task", f"best rate of `{lookup.baseline}`", "its speed-up there",
              "speed-up of the strategy by its own learning rate"]  # fmt: skip
    return Table(header, rows)


def controls(lookup: Lookup) -> Table:
    """Speed-ups in net seconds of controls and rivals over the baseline and each rival."""
    rows = []
    for task in lookup.tasks:
        for strategy in dict.fromkeys((*lookup.roles.controls, *lookup.roles.rivals)):
            arm = (strategy, lookup.reference)
            if lookup.runs(task, arm) and lookup.roles.controls:
                over = [lookup.speedup(task, arm, "seconds", against=other) for other in (None, *lookup.roles.rivals)]
                rows.append([task, f"`{strategy}`", *map(times, over), jumped(lookup, task, arm) or "–"])
    header = ["task", "strategy", *(f"over `{other}`" for other in (lookup.baseline, *lookup.roles.rivals)),
              "searches that jumped"]  # fmt: skip
    return Table(header, rows)
