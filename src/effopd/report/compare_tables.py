"""Tables of a comparison page, as text cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from effopd.compare.cross_targets import own_rate, runs_of
from effopd.compare.grid_run import Arm
from effopd.compare.speedups import ALL, BEST, SAME
from effopd.report.compare_lookup import AXIS_NAMES, Lookup, Row, Table, number, times

#: Accepted jumps shown per run; all of them are in `results.json`.
_JUMPS = 8


def strategies(lookup: Lookup, task: str) -> Table:
    """Every strategy at the reference learning rate."""
    header = [
        "strategy", *AXIS_NAMES.values(), "reached", "off target later", "final KL", "final accuracy",
        "KL area (steps)", "KL area (net seconds)", "search share", "… to the target", "searches that jumped",
        "extra memory, MB",
    ]  # fmt: skip
    measures = {"final_kl": ".4f", "final_accuracy": ".3f", "auc_steps": ".3f", "auc_seconds": ".3f",
                "search_share": ".1%", "search_share_to_target": ".1%"}  # fmt: skip
    return Table(header, [
        [
            f"`{arm[0]}`",
            *(times(lookup.speedup(task, arm, axis)) for axis in AXIS_NAMES),
            lookup.reached(task, arm),
            lookup.again(task, arm),
            *(number(lookup.quality(task, arm, measure), form) for measure, form in measures.items()),
            jumped(lookup, task, arm) or "–",
            _memory(lookup, task, arm),
        ]
        for arm in _reference_arms(lookup, task)
    ])  # fmt: skip


def _reference_arms(lookup: Lookup, task: str) -> list[Arm]:
    arms = [(strategy, lookup.reference) for strategy in lookup.at_reference()]
    return [arm for arm in arms if lookup.runs(task, arm)]


def jumped(lookup: Lookup, task: str, arm: Arm) -> str:
    """Number of an arm's searches that jumped, as `29 of 35`; "" without searches."""
    runs = lookup.runs(task, arm)
    searches = sum(run["searches"] for run in runs)
    return f"{sum(len(run['accepted']) for run in runs)} of {searches}" if searches else ""


def _memory(lookup: Lookup, task: str, arm: Arm) -> str:
    memory = max(run["memory_bytes"] or 0 for run in lookup.runs(task, arm))
    return f"{memory / 1e6:.1f}" if memory else "–"


def over_tasks(lookup: Lookup) -> Table:
    """Speed-ups over all tasks."""
    rows = []
    for strategy in lookup.at_reference():
        speedups = {axis: lookup.speedup(ALL, (strategy, lookup.reference), axis) for axis in AXIS_NAMES}
        if speedups["steps"]:
            rows.append([f"`{strategy}`", str(speedups["steps"]["n"]), *map(times, speedups.values())])
    return Table(["strategy", "seeds", *AXIS_NAMES.values()], rows)


def _swept(lookup: Lookup) -> Iterator[tuple[str, Arm, list[str]]]:
    """(task, arm, first cells of its row) of strategies with several learning rates."""
    for task in lookup.tasks:
        for strategy in lookup.swept():
            for rate in sorted(rate for other, rate in lookup.arms if other == strategy):
                if lookup.runs(task, (strategy, rate)):
                    yield task, (strategy, rate), [task, f"`{strategy}`", f"{rate:.3g}"]


def rates(lookup: Lookup) -> Table:
    """Every learning rate against the baseline at the reference, its best and the same rate."""
    rows = []
    for task, arm, (*cells, rate) in _swept(lookup):
        marks = [
            f" (best{goal})"
            for target, goal in (("reference_kl", ""), ("gap_90", " to 90 %"))
            if arm == (lookup.baseline, lookup.best(task, target))
        ]
        rows.append([
            *cells, rate + "".join(marks), lookup.reached(task, arm), lookup.again(task, arm),
            times(lookup.speedup(task, arm, "steps")), times(lookup.speedup(task, arm, "seconds")),
            times(lookup.speedup(task, arm, "seconds", rate=BEST)),
            times(lookup.speedup(task, arm, "forward_tokens", rate=BEST)),
            times(lookup.speedup(task, arm, "seconds", rate=SAME)),
            times(lookup.speedup(task, arm, "seconds", "gap_90")),
            times(lookup.speedup(task, arm, "seconds", "gap_90", rate=BEST)),
            times(lookup.speedup(task, arm, "forward_tokens", "gap_90", rate=BEST)),
        ])  # fmt: skip
    header = [
        "task",
        "strategy",
        "learning rate",
        "reached",
        "off target later",
        "steps",
        "net seconds",
        "… against the best",
        "… in forward tokens",
        "… against the same rate",
        "90 %: net seconds",
        "… against the best",
        "… in forward tokens",
    ]
    return Table(header, rows)


def at_own_rate(lookup: Lookup) -> Table:
    """Speed-up over the baseline at the arm's own learning rate, to its final KL at that rate."""
    by_arm: dict[tuple[str, Arm], dict[str, Row]] = {}
    for row in own_rate(runs_of(lookup.results), lookup.baseline):
        by_arm.setdefault((row["task"], (row["strategy"], row["learning_rate"])), {})[row["axis"]] = row
    rows = [
        [
            *cells,
            f"{axes['steps']['reached']} of {axes['steps']['n'] + axes['steps']['undefined']}",
            *(times(axes[axis]) for axis in AXIS_NAMES),
        ]
        for task, arm, cells in _swept(lookup)
        if arm[0] != lookup.baseline and (axes := by_arm.get((task, arm)))
    ]
    return Table(["task", "strategy", "learning rate", "reached", *AXIS_NAMES.values()], rows)


def best_at_an_end(lookup: Lookup) -> list[str]:
    """Tasks whose best baseline rate is at an end of the sweep, with that rate.

    The baseline can be faster still beyond that rate.
    """
    ends = {task: (swept[0], swept[-1]) for task, swept in lookup.results["swept"].items() if len(swept) > 1}
    best = {task: lookup.best(task) for task in lookup.tasks}
    return [f"{task}: {rate:.3g}" for task, rate in best.items() if rate is not None and rate in ends.get(task, ())]


def variants(lookup: Lookup) -> Table:
    """Each variant against its parent strategy, at the same learning rate."""
    rows = []
    for task in lookup.scopes:
        for arm in lookup.arms:
            parent = lookup.roles.parent(arm, lookup.arms)
            if parent is None:
                continue
            speedups = [lookup.speedup(task, arm, axis, against=parent[0], rate=SAME) for axis in AXIS_NAMES]
            to_90 = lookup.speedup(task, arm, "seconds", "gap_90", parent[0], SAME)
            if any(speedups) or to_90:
                difference = number(lookup.quality(task, arm, "kl_difference_parent"), "+.4f")
                rows.append(
                    [
                        task,
                        f"`{parent[0]}`",
                        f"`{arm[0]}`",
                        f"{arm[1]:.3g}",
                        *map(times, [*speedups, to_90]),
                        difference,
                    ]
                )
    header = ["task", "strategy", "variant", "learning rate", *AXIS_NAMES.values(), "90 %: net seconds", "final KL"]
    return Table(header, rows)


def to_lowest(lookup: Lookup) -> Table:
    """Speed-ups to the baseline's lowest final KL."""
    rows = [
        [*cells, lookup.reached(task, arm, "best_kl"),
         *(times(lookup.speedup(task, arm, axis, "best_kl", rate=BEST)) for axis in AXIS_NAMES)]
        for task, arm, cells in _swept(lookup)
    ]  # fmt: skip
    return Table(["task", "strategy", "learning rate", "reached", *AXIS_NAMES.values()], rows)


def final_quality(lookup: Lookup) -> Table:
    """Final KL, and differences of KL and accuracy from the baseline's final values."""
    measures = {"final_kl": ".4f", "kl_difference_same": "+.4f", "kl_difference_lowest": "+.4f",
                "accuracy_difference_same": "+.3f", "accuracy_difference_lowest": "+.3f"}  # fmt: skip
    rows = [
        [*cells, *(number(lookup.quality(task, arm, measure), form) for measure, form in measures.items())]
        for task, arm, cells in _swept(lookup)
    ]
    header = [
        "task",
        "strategy",
        "learning rate",
        "final KL",
        "KL: same rate",
        "KL: lowest",
        "accuracy: same rate",
        "accuracy: lowest KL",
    ]
    return Table(header, rows)


def other_target(lookup: Lookup, target: str) -> Table:
    """Every strategy at the reference learning rate, for another target."""
    rows = [
        [task, f"`{arm[0]}`", lookup.reached(task, arm, target),
         *(times(lookup.speedup(task, arm, axis, target)) for axis in AXIS_NAMES),
         number(lookup.quality(task, arm, "accuracy_difference"), "+.3f")]
        for task in lookup.tasks
        for arm in _reference_arms(lookup, task)
    ]  # fmt: skip
    header = ["task", "strategy", "reached", *AXIS_NAMES.values(), "final accuracy against the baseline"]
    return Table(header, rows)


def jumps(lookup: Lookup) -> Table:
    """Accepted jumps of every run at the reference learning rate."""
    rows = []
    for run in lookup.results["runs"]:
        if run["accepted"] and run["learning_rate"] == lookup.reference:
            shown = [f"{step}: {scale:.3g}" for step, scale in run["accepted"][:_JUMPS]]
            more = len(run["accepted"]) - _JUMPS
            shown += [f"… {more} more"] * (more > 0)
            rows.append([run["task"], f"`{run['strategy']}`", str(run["seed"]), ", ".join(shown)])
    rows.sort(key=lambda row: (lookup.tasks.index(row[0]), row[1], int(row[2])))
    return Table(["task", "strategy", "seed", "accepted (step: scale)"], rows)


def fits(lookup: Lookup) -> Table:
    """Fit quality of predicting strategies: medians over runs."""
    rows = []
    for task in lookup.tasks:
        for arm in lookup.arms:
            of_arm = [run["fit"] for run in lookup.runs(task, arm) if run.get("fit")]
            if of_arm:
                names = [name for name in of_arm[0] if all(fit.get(name) is not None for fit in of_arm)]
                values = [f"{name} {statistics.median([fit[name] for fit in of_arm]):.3f}" for name in names]
                rows.append([task, f"`{arm[0]}`", str(len(of_arm)), ", ".join(values)])
    return Table(["task", "strategy", "runs", "fit"], rows)
