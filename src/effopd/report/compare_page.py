"""results.json → results.md and the terminal's table. Every sentence with a number is made from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich import box
from rich.markup import escape
from rich.table import Table

from effopd.compare.cross_targets import own_rate, runs_of
from effopd.compare.results import ALL, BEST, SAME, whole_of
from effopd.report.compare_answers import answers, gate_section
from effopd.report.compare_lookup import AXIS_NAMES, Lookup, Results, Row, number, one, table, times
from effopd.report.compare_method import method

#: Accepted jumps shown of a run; all of them are in `results.json`.
_JUMPS = 8


def summary_table(results: Results) -> list[Table]:
    """For the terminal: one table a task, strategies at the reference learning rate."""
    look, tables = Lookup(results), []
    for task in look.tasks:
        seeds = len({run["seed"] for run in results["runs"] if run["task"] == task})
        drawn = Table(
            title=escape(
                f"{task}: net speed-up to {look.baseline}'s final held-out KL, {seeds} seed(s), median, low–high"
            ),
            box=box.SIMPLE,
            pad_edge=False,
            collapse_padding=True,
        )
        drawn.add_column("", no_wrap=True)
        for name in ("steps", "net\nseconds", "sampled\ntokens", "reached", "final\nKL", "accuracy", "search"):
            drawn.add_column(name, justify="right", no_wrap=True)
        for strategy in look.at_reference():
            arm = (strategy, look.reference)
            if not look.runs(task, arm):
                continue
            last = {"final_kl": ".4f", "final_accuracy": ".3f", "search_share": ".1%"}
            drawn.add_row(
                escape(strategy),
                *(_two_lines(look.speedup(task, arm, axis)) for axis in list(AXIS_NAMES)[:3]),
                look.reached(task, arm).replace(" of ", "/"),
                *(number(look.quality(task, arm, name), form).split(" ")[0] for name, form in last.items()),
            )
        tables.append(drawn)
    return tables


def _two_lines(row: Row | None) -> str:
    """The median above its interval, without brackets: a console takes `[never, 1.02]` for markup."""
    if row is None or row["n"] < 2 or (row["median"], row["low"], row["high"]) == (0, 0, 0):
        return times(row).partition(" (")[0]
    return f"{one(row['median'])}\n{one(row['low'], '')}–{one(row['high'], '')}"


def render(results: Results, figures: Mapping[str, str]) -> str:
    """The page.

    Args:
        figures: path of each figure, relative to the page, by name.
    """
    look = Lookup(results)
    parts = [
        "# Who is faster, by how much, and how sure that is",
        "Made by `effopd compare --report`; every number comes from `results.json` beside this page.",
        "\n".join(f"- {sentence}" for sentence in answers(look)),
        *(f"![{name.replace('_', ' ')}]({path})" for name, path in figures.items()),
        "## All strategies at the reference learning rate",
        f"Speed-up = {look.baseline}'s cost / the strategy's cost until the smoothed held-out reverse KL first reaches "
        f"{look.baseline}'s final one of the same seed; search charged, evaluation not. “never” is part of the "
        "median: it counts as slower than any run that arrives. Where curves still fall at the end, a strategy exactly "
        "like the baseline misses the baseline's last value in about every other seed: “never” whose interval holds 1× "
        "is no evidence of being slower.",
        *(section for task in look.tasks for section in (f"### {task}", _strategies(look, task))),
        *(_pooled(look) if len(look.tasks) > 1 else []),
        "## Learning rates",
        f"Against {look.baseline} at the reference learning rate, at its best one for the target (smallest median seconds, "
        "chosen on the same seeds, which favours it), and at the same one. The last columns are for another target: 90 % of "
        "the way from the start to the teacher, for which another rate may be the best.",
        _rates(look),
        *_edges(look),
        "## At the same learning rate",
        f"Speed-up over {look.baseline} at the arm's own learning rate, to the final smoothed KL of {look.baseline} at that rate and "
        "seed. At the reference rate these are the numbers above; where the rate suits the baseline, its own end is far lower.",
        _own_rate(look),
        *_variants(look),
        "## As good as the baseline's best end",
        f"Time to the final smoothed KL of {look.baseline} at the learning rate where it ends lowest ("
        + ", ".join(f"{task}: {rate:.3g}" for task, rate in look.results["lowest_learning_rate"].items() if rate)
        + "), against its own fastest rate to there.",
        _to_lowest(look),
        "## Final quality at equal steps",
        f"Final smoothed KL and accuracy minus {look.baseline}'s, of the same seed: at the same learning rate, and at the one where "
        f"{look.baseline} ends lowest. Below 0 is better for the KL, above 0 for the accuracy.",
        _ends(look),
        "## 90 % of the way",
        "The same with a target that no run's last steps decide: a tenth of the KL at step 0. Ratios are against "
        f"{look.baseline}'s own cost to get there.",
        _other_target(look, "gap_90"),
        "## Accuracy instead of KL",
        f"The same with {look.baseline}'s final smoothed accuracy as the target. Accuracies of a few hundred sampled "
        "answers are far noisier than the KL on them.",
        _other_target(look, "reference_accuracy"),
        "## What was accepted",
        _jumps(look),
        *_fits(look),
        *gate_section(look),
        "## How it was measured",
        method(look),
    ]
    return "\n\n".join(parts) + "\n"


# -- tables -----------------------------------------------------------------------------------------------------


def _strategies(look: Lookup, task: str) -> str:
    header = [
        "strategy", *AXIS_NAMES.values(), "reached", "off it again", "final KL", "final accuracy", "KL area (steps)",
        "KL area (net seconds)", "search share", "… until the target", "searches that jumped", "extra memory, MB",
    ]  # fmt: skip
    rows = []
    for strategy in look.at_reference():
        arm = (strategy, look.reference)
        runs = look.runs(task, arm)
        if runs:
            asked, jumped = sum(run["searches"] for run in runs), sum(len(run["accepted"]) for run in runs)
            memory = max(run["memory_bytes"] or 0 for run in runs)
            rows.append(
                [
                    f"`{strategy}`",
                    *(times(look.speedup(task, arm, axis)) for axis in AXIS_NAMES),
                    look.reached(task, arm),
                    look.again(task, arm).split(" ")[0],
                    number(look.quality(task, arm, "final_kl")),
                    number(look.quality(task, arm, "final_accuracy"), ".3f"),
                    number(look.quality(task, arm, "auc_steps"), ".3f"),
                    number(look.quality(task, arm, "auc_seconds"), ".3f"),
                    number(look.quality(task, arm, "search_share"), ".1%"),
                    number(look.quality(task, arm, "search_share_to_target"), ".1%"),
                    f"{jumped} of {asked}" if asked else "–",
                    f"{memory / 1e6:.1f}" if memory else "–",
                ]
            )
    return table(header, rows)


def _pooled(look: Lookup) -> list[str]:
    rows = []
    for strategy in look.at_reference():
        found = {axis: look.speedup(ALL, (strategy, look.reference), axis) for axis in AXIS_NAMES}
        if found["steps"]:
            rows.append([f"`{strategy}`", str(found["steps"]["n"]), *map(times, found.values())])
    text = "Geometric mean over tasks, seed by seed (of seeds that ran on all of them); a seed that never arrives on one task never arrives."
    return [f"### {ALL} tasks", text, table(["strategy", "seeds", *AXIS_NAMES.values()], rows)]


def _swept(look: Lookup) -> list[tuple[str, str, float]]:
    """(task, strategy, learning rate) of strategies that ran at several rates."""
    swept = [s for s in dict.fromkeys(s for s, _ in look.arms) if len({r for t, r in look.arms if t == s}) > 1]
    return [
        (task, strategy, rate)
        for task in look.tasks
        for strategy in swept
        for rate in sorted(rate for s, rate in look.arms if s == strategy)
        if look.runs(task, (strategy, rate))
    ]


def _rates(look: Lookup) -> str:
    rows = []
    for task, strategy, rate in _swept(look):
        arm, marks = (strategy, rate), []
        if strategy == look.baseline:
            marks = [
                f" (best{goal})"
                for target, goal in (("reference_kl", ""), ("gap_90", " to 90 %"))
                if rate == look.best(task, target)
            ]
        rows.append(
            [
                task,
                f"`{strategy}`",
                f"{rate:.3g}" + "".join(marks),
                look.reached(task, arm),
                look.again(task, arm).split(" ")[0],
                times(look.speedup(task, arm, "steps")),
                times(look.speedup(task, arm, "seconds")),
                times(look.speedup(task, arm, "seconds", rate=BEST)),
                times(look.speedup(task, arm, "forward_tokens", rate=BEST)),
                times(look.speedup(task, arm, "seconds", rate=SAME)),
                times(look.speedup(task, arm, "seconds", "gap_90")),
                times(look.speedup(task, arm, "seconds", "gap_90", rate=BEST)),
                times(look.speedup(task, arm, "forward_tokens", "gap_90", rate=BEST)),
            ]
        )
    header = ["task", "strategy", "learning rate", "reached", "off it again", "steps", "net seconds", "… against the best",
              "… in forward tokens", "… against the same rate", "90 %: net seconds", "… against the best",
              "… in forward tokens"]  # fmt: skip
    return table(header, rows)


def _own_rate(look: Lookup) -> str:
    found: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in own_rate(runs_of(look.results), look.baseline):
        found.setdefault((row["task"], row["strategy"], row["learning_rate"]), {})[row["axis"]] = row
    rows = [
        [task, f"`{strategy}`", f"{rate:.3g}", f"{axes['steps']['reached']} of {len(look.runs(task, (strategy, rate)))}",
         *(times(axes[axis]) for axis in AXIS_NAMES)]
        for task, strategy, rate in _swept(look)
        if strategy != look.baseline and (axes := found.get((task, strategy, rate)))
    ]  # fmt: skip
    return table(["task", "strategy", "learning rate", "reached", *AXIS_NAMES.values()], rows)


def _edges(look: Lookup) -> list[str]:
    """A best rate at the end of a sweep may not be the best."""
    said = [
        f"{task}: {look.best(task):.3g}" for task in look.tasks
        if len(rates := look.results["swept"][task]) > 1 and look.best(task) in (rates[0], rates[-1])
    ]  # fmt: skip
    if not said:
        return []
    return [
        f"The best rate is at the end of the sweep ({', '.join(said)}): beyond it {look.baseline} may be faster still."
    ]


def _variants(look: Lookup) -> list[str]:
    """What each part is worth: strategies that differ from another one in one setting."""
    rows = []
    for task in look.scopes:
        for arm in look.arms:
            whole = whole_of(arm, look.arms, look.baseline)
            if whole is None:
                continue
            found = [look.speedup(task, arm, axis, against=whole[0], rate=SAME) for axis in AXIS_NAMES]
            far = look.speedup(task, arm, "seconds", "gap_90", whole[0], SAME)
            if any(found) or far:
                rows.append(
                    [
                        task,
                        f"`{whole[0]}`",
                        f"`{arm[0].removeprefix(whole[0] + '-')}`",
                        f"{arm[1]:.3g}",
                        *map(times, found),
                        times(far),
                        number(look.quality(task, arm, "kl_difference_whole"), "+.4f"),
                    ]
                )
    if not rows:
        return []
    header = ["task", "strategy", "variant", "learning rate", *AXIS_NAMES.values(), "90 %: net seconds", "final KL"]
    text = (
        "Speed of each variant of a strategy / speed of the strategy itself, seed by seed, at the same learning rate, to the target "
        f"above ({look.baseline}'s final smoothed KL at the reference learning rate) and to 90 % of the way; final smoothed KL minus "
        "the strategy's. Below 1×, or above 0: the variant lost something. “> any”: only the variant arrives; “never”: only the "
        "strategy itself does."
    )
    return ["## What each part is worth", text, table(header, rows)]


def _to_lowest(look: Lookup) -> str:
    rows = [
        [
            task,
            f"`{strategy}`",
            f"{rate:.3g}",
            look.reached(task, (strategy, rate), "best_kl"),
            *(times(look.speedup(task, (strategy, rate), axis, "best_kl", rate=BEST)) for axis in AXIS_NAMES),
        ]
        for task, strategy, rate in _swept(look)
    ]
    return table(["task", "strategy", "learning rate", "reached", *AXIS_NAMES.values()], rows)


def _ends(look: Lookup) -> str:
    rows = [
        [
            task,
            f"`{strategy}`",
            f"{rate:.3g}",
            number(look.quality(task, (strategy, rate), "final_kl")),
            number(look.quality(task, (strategy, rate), "kl_difference_same"), "+.4f"),
            number(look.quality(task, (strategy, rate), "kl_difference_lowest"), "+.4f"),
            number(look.quality(task, (strategy, rate), "accuracy_difference_same"), "+.3f"),
            number(look.quality(task, (strategy, rate), "accuracy_difference_lowest"), "+.3f"),
        ]
        for task, strategy, rate in _swept(look)
    ]
    header = [
        "task",
        "strategy",
        "learning rate",
        "final KL",
        "KL: same rate",
        "KL: lowest end",
        "accuracy: same rate",
        "accuracy: lowest end",
    ]
    return table(header, rows)


def _other_target(look: Lookup, target: str) -> str:
    rows = []
    for task in look.tasks:
        for strategy in look.at_reference():
            arm = (strategy, look.reference)
            if look.runs(task, arm):
                rows.append(
                    [
                        task,
                        f"`{strategy}`",
                        look.reached(task, arm, target),
                        *(times(look.speedup(task, arm, axis, target)) for axis in AXIS_NAMES),
                        number(look.quality(task, arm, "accuracy_difference"), "+.3f"),
                    ]
                )
    header = ["task", "strategy", "reached", *AXIS_NAMES.values(), "final accuracy against the baseline"]
    return table(header, rows)


def _jumps(look: Lookup) -> str:
    rows = []
    for run in look.results["runs"]:
        if run["accepted"] and run["learning_rate"] == look.reference:
            jumps = ", ".join(f"{step}: {scale:.3g}" for step, scale in run["accepted"][:_JUMPS])
            more = len(run["accepted"]) - _JUMPS
            jumps += f", … {more} more" if more > 0 else ""
            rows.append([run["task"], f"`{run['strategy']}`", str(run["seed"]), jumps])
    rows.sort(key=lambda row: (look.tasks.index(row[0]), row[1], int(row[2])))
    return table(["task", "strategy", "seed", "accepted (step: scale)"], rows)


def _fits(look: Lookup) -> list[str]:
    """What predicting strategies say about their own fits."""
    rows = []
    for task in look.tasks:
        for arm in look.arms:
            fits = [run["fit"] for run in look.runs(task, arm) if run.get("fit")]
            if fits:
                names = [name for name in fits[0] if all(fit.get(name) is not None for fit in fits)]
                said = ", ".join(f"{name} {statistics.median([fit[name] for fit in fits]):.3f}" for name in names)
                rows.append([task, f"`{arm[0]}`", str(len(fits)), said])
    if not rows:
        return []
    text = (
        "Medians over runs of the medians over tensors. r2 is in-sample and means little alone; q2 is leave-one-out; "
        "q2_null is the same with the accuracies shuffled."
    )
    return [
        "## What the predicting strategies' fits are worth",
        text,
        table(["task", "strategy", "runs", "fit"], rows),
    ]
