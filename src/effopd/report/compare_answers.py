"""The questions that a reader of a comparison has, answered in sentences made from results.json."""

from __future__ import annotations

import math
from collections.abc import Iterator

from effopd.bench.results import BEST
from effopd.report.compare_lookup import AXIS_NAMES, FEW, Lookup, times

CONTROLS = ("noop", "fixed-k1", "random_direction")
PAPER_CLAIM = 3.0


def answers(look: Lookup) -> Iterator[str]:
    """The questions a reader has, answered from the numbers."""
    arm = ("effopd", look.reference)
    if ("lookahead", look.reference) in look.arms:
        yield from _net(look, "lookahead", "lookahead")
        yield from _net(look, "lookahead", "lookahead", "effopd")
        yield from _against_best(look, "lookahead", "lookahead")
        yield from _against_best(look, "lookahead", "lookahead", "gap_90")
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
    yield from _false_accepts(look)


def _net(look: Lookup, strategy: str, name: str, against: str | None = None) -> Iterator[str]:
    """The speed-up on every axis, by task."""
    for task in look.tasks:
        found = {axis: look.speedup(task, (strategy, look.reference), axis, against=against) for axis in AXIS_NAMES}
        steps = found["steps"]
        if steps:
            said = ", ".join(f"{times(row)} in {AXIS_NAMES[axis]}" for axis, row in found.items())
            over = f" over `{against}`" if against else ""
            yield f"**{name}: net speed-up{over} at the reference learning rate, {task}** (n = {steps['n']}): {said}."


def _false_accepts(look: Lookup) -> Iterator[str]:
    """What the gate lets pass when nothing is there: by simulation, and along random directions in real runs."""
    said = []
    noise = look.results.get("gate_noise", [])
    if noise:
        shares = ", ".join(
            f"{row['first_accepted']:.1%} [{row['first_accepted_ci95'][0]:.1%}, {row['first_accepted_ci95'][1]:.1%}] "
            f"({row['family']}, {row['model']})"
            for row in noise
        )
        said.append(
            f"of {noise[0]['searches']} simulated searches whose candidates are the same model answering anew "
            f"(D_v = {noise[0]['validation_size']}, ≥), EffOPD's gate lets one pass in {shares} (`benchmarks/gate_noise.py`)"
        )
    for task in look.tasks:
        runs = look.runs(task, ("random_direction", look.reference))
        if runs:
            asked, jumped = sum(run["searches"] for run in runs), sum(len(run["accepted"]) for run in runs)
            said.append(
                f"along random directions as long as the displacement it jumped in {jumped} of {asked} ({task})"
            )
    if said:
        yield "**The gate where nothing is to be found**: " + "; ".join(said) + "."


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
