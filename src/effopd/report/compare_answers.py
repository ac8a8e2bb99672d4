"""The questions that a reader of a comparison has, answered in sentences made from results.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from effopd.compare.results import BEST
from effopd.report.compare_lookup import AXIS_NAMES, FEW, Lookup, Row, table, times

CONTROLS = ("noop", "fixed-k1", "random_direction")
PAPER_CLAIM = 3.0


def answers(look: Lookup) -> Iterator[str]:
    """The questions a reader has, answered from the numbers."""
    arm = ("effopd", look.reference)
    if ("line_search", look.reference) in look.arms:
        yield from _net(look, "line_search", "line_search")
        yield from _net(look, "line_search", "line_search", "effopd")
        yield from _against_best(look, "line_search", "line_search")
        yield from _against_best(look, "line_search", "line_search", "gap_90")
    if arm not in look.arms:
        return
    yield from _net(look, "effopd", "EffOPD")
    yield _claim(look, arm)
    yield from _against_best(look, "effopd", "EffOPD")
    controls = [c for c in CONTROLS if (c, look.reference) in look.arms]
    for task in look.tasks:
        if any(look.speedup(task, (name, look.reference), "seconds") for name in controls):
            said = ", ".join(
                f"{name} {times(look.speedup(task, (name, look.reference), 'seconds'))}" for name in controls
            )
            yield f"**Controls, {task}**, net seconds: {said}; EffOPD {times(look.speedup(task, arm, 'seconds'))}."
            said = ", ".join(
                f"{name} {times(look.speedup(task, (name, look.reference), 'seconds', against='effopd'))}"
                for name in controls
            )
            yield f"**Controls over EffOPD, {task}**, seed by seed, net seconds: {said}."
    yield from _gate(look)


def _net(look: Lookup, strategy: str, name: str, against: str | None = None) -> Iterator[str]:
    """The speed-up on every axis, by task."""
    for task in look.tasks:
        found = {axis: look.speedup(task, (strategy, look.reference), axis, against=against) for axis in AXIS_NAMES}
        steps = found["steps"]
        if steps:
            said = ", ".join(f"{times(row)} in {AXIS_NAMES[axis]}" for axis, row in found.items())
            over = f" over `{against}`" if against else ""
            yield f"**{name}: net speed-up{over} at the reference learning rate, {task}** (n = {steps['n']}): {said}."


def _gate(look: Lookup) -> Iterator[str]:
    """What EffOPD's gate accepts where nothing is to be found, by simulation and in real runs."""
    said = []
    if noise := look.results.get("gate_noise"):
        shares = ", ".join(
            f"{row['first_accepted']:.1%} [{row['first_accepted_ci95'][0]:.1%}, {row['first_accepted_ci95'][1]:.1%}] "
            f"({row['family']}, {row['model']})"
            for row in noise
        )
        said.append(
            f"with fresh sampling noise, of {noise[0]['searches']} simulated searches whose candidates are the same model answering "
            f"anew (D_v = {noise[0]['validation_size']}, ≥) it lets one pass in {shares} (`benchmarks/gate_noise.py`)"
        )
    if shared := look.results.get("gate_shared_noise"):
        lengths = [row["relative_size"] for row in shared]
        accepted = [row["first_accepted"] for row in shared]
        said.append(
            "with shared noise, as in this package and in these runs, it lets "
            f"{min(accepted):.0%} to {max(accepted):.0%} of the first candidates along random directions of {min(lengths):g} to "
            f"{max(lengths):g} of the weights' norm pass: they change no answer"
        )
    for task in look.tasks:
        runs = look.runs(task, ("random_direction", look.reference))
        if runs:
            asked, jumped = sum(run["searches"] for run in runs), sum(len(run["accepted"]) for run in runs)
            said.append(
                f"along random directions as long as the displacement it jumped in {jumped} of {asked} ({task})"
            )
    if said:
        yield "**EffOPD's gate where nothing is to be found**: " + "; ".join(said) + "."


def gate_table(groups: Sequence[Row]) -> str:
    """Accepted shares of real moves by their true change in accuracy (`benchmarks/gate_power.py`); parentheses: the lowest
    and the highest run."""
    rows = []
    for row in groups:
        ends = [f"{100 * row[end]:+.1f}" if row[end] is not None else "" for end in ("from", "to")]
        where = f"{ends[0]} to {ends[1]}" if all(ends) else f"below {ends[1]}" if ends[1] else f"{ends[0]} and more"
        shares = [
            f"{row[noise]:.0%} ({min(row[f'{noise}_by_run']):.0%} to {max(row[f'{noise}_by_run']):.0%})"
            for noise in ("shared", "fresh")
        ]
        rows.append([where, str(row["moves"]), str(row["searches"]), *shares])
    header = [
        "true change in accuracy, points",
        "moves",
        "searches",
        "accepted, shared noise",
        "accepted, fresh noise",
    ]
    return table(header, rows)


def gate_section(look: Lookup) -> list[str]:
    """Heading, text and table of what `benchmarks/gate_power.py` found, if it is there."""
    groups = look.results.get("gate_power")
    if not groups:
        return []
    runs = max(len(row["shared_by_run"]) for row in groups)
    text = (
        f"How often EffOPD's gate (≥ on 50 answers) accepts a move along the real displacements of {runs} `effopd` run{'s' * (runs > 1)}, forwards and "
        "backwards, by what the move truly does to the accuracy (`benchmarks/gate_power.py`): false accepts above, power below. "
        "Shared noise: W and candidate are sampled with the same random numbers, as in this package. Parentheses: the lowest and "
        "the highest run."
    )
    return ["## What EffOPD's gate accepts", text, gate_table(groups)]


def _claim(look: Lookup, arm: tuple[str, float]) -> str:
    """Reproduced or not where the interval lies wholly on one side of the paper's claim; a range of few seeds decides nothing."""
    verdicts = []
    for task in look.tasks:
        row = look.speedup(task, arm, "steps")
        if row and row["n"]:
            low, high = (math.inf if row[end] is None else row[end] for end in ("low", "high"))
            verdict = (
                "undecided" if row["n"] < FEW or low < PAPER_CLAIM <= high
                else "reproduced" if low >= PAPER_CLAIM else "not reproduced"
            )  # fmt: skip
            verdicts.append(
                f"{task}: {verdict}, {times(row)}, reached by {look.reached(task, arm)}, {look.again(task, arm)}"
            )
    said = "; ".join(verdicts) or "no pair yet"
    return f"**The paper's “≈ {PAPER_CLAIM:.0f}× fewer steps”**: {said}."


def _against_best(look: Lookup, strategy: str, name: str, target: str = "reference_kl") -> Iterator[str]:
    for task in look.tasks:
        best = look.best(task, target)
        if best is None:
            continue
        rates = [rate for other, rate in look.arms if other == strategy and look.runs(task, (other, rate))]
        said = ", ".join(
            f"lr {rate:.3g} {times(look.speedup(task, (strategy, rate), 'seconds', target, rate=BEST))}"
            for rate in sorted(rates)
        )
        own = times(look.speedup(task, (look.baseline, best), "seconds", target))
        goal = "" if target == "reference_kl" else " to 90 % of the way"
        yield (
            f"**Against {look.baseline} at its best learning rate{goal}, {task}** ({best:.3g}, itself {own} the reference's "
            f"speed), net seconds: {name} at {said}."
        )
