"""results.json → results.md and the terminal's table. Every sentence with a number is made from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

Results = Mapping[str, Any]
Row = Mapping[str, Any]
AXIS_NAMES = {"steps": "steps", "seconds": "net seconds", "generated_tokens": "sampled tokens"}
CONTROLS = ("noop", "fixed-k1", "random_direction")
PAPER_CLAIM = 3.0
#: Stands for the baseline at its best learning rate.
BEST = "best"
ALL = "all"


class Lookup:
    """Rows of results.json by what they are about."""

    def __init__(self, results: Results):
        self.results = results
        self.baseline: str = results["settings"]["baseline"]
        self.reference: float = results["settings"]["reference_learning_rate"]
        self.tasks = list(dict.fromkeys(run["task"] for run in results["runs"]))
        self.scopes = [*self.tasks, ALL] if len(self.tasks) > 1 else self.tasks
        self.arms = list(dict.fromkeys((run["strategy"], run["learning_rate"]) for run in results["runs"]))
        self._speedups = {
            (
                r["task"],
                r["strategy"],
                r["learning_rate"],
                r["against"] if r["against_learning_rate"] != "best" else BEST,
                r["target"],
                r["axis"],
            ): r
            for r in results["speedups"]
        }
        self._quality = {(r["task"], r["strategy"], r["learning_rate"], r["measure"]): r for r in results["quality"]}

    def at_reference(self) -> list[str]:
        """Strategies that ran at the reference learning rate, in the plan's order."""
        return [strategy for strategy, rate in self.arms if rate == self.reference]

    def speedup(
        self, task: str, arm: tuple[str, float], axis: str, target="reference_kl", against: str | None = None
    ) -> Row | None:
        """A row of `speedups`, if there is one; `against` is a strategy at the reference learning rate (default: the
        baseline) or `BEST`."""
        return self._speedups.get((task, *arm, against or self.baseline, target, axis))

    def quality(self, task: str, arm: tuple[str, float], measure: str) -> Row | None:
        """A row of `quality`, if there is one."""
        return self._quality.get((task, *arm, measure))

    def runs(self, task: str, arm: tuple[str, float]) -> list[Row]:
        """Runs of an arm on a task."""
        return [r for r in self.results["runs"] if r["task"] == task and (r["strategy"], r["learning_rate"]) == arm]

    def reached(self, task: str, arm: tuple[str, float], target="reference_kl") -> str:
        """`3 of 5`: how many runs arrived."""
        runs = [run["targets"][target] for run in self.runs(task, arm) if target in run["targets"]]
        return f"{sum(run['reached'] for run in runs)} of {len(runs)}"


def times(row: Row | None, interval: bool = True) -> str:
    """A speed-up in words: `1.92× [1.70, 3.43]`, `never`, `> any`."""
    if row is None or not row["n"]:
        return "–"
    median = _one(row["median"])
    if not interval or row["n"] < 2:
        return median
    return f"{median} [{_one(row['low'], '')}, {_one(row['high'], '')}]"


def _one(value: float | None, unit: str = "×") -> str:
    if value is None:
        return "> any"
    return "never" if value == 0 else f"{value:.2f}{unit}"


def number(row: Row | None, form: str = ".4f") -> str:
    """A median with its interval, `–` where there is none, `diverged` for what is not finite."""
    if row is None or not row["n"]:
        return "–"
    median, low, high = ("diverged" if row[end] is None else f"{row[end]:{form}}" for end in ("median", "low", "high"))
    return median if row["n"] < 2 else f"{median} [{low}, {high}]"


#: Accepted jumps shown of a run; all of them are in `results.json`.
_JUMPS = 8


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def summary_table(results: Results) -> list[Table]:
    """For the terminal: one table a task, strategies at the reference learning rate."""
    look, tables = Lookup(results), []
    for task in look.tasks:
        seeds = len({run["seed"] for run in results["runs"] if run["task"] == task})
        drawn = Table(
            title=escape(
                f"{task}: net speed-up to {look.baseline}'s final held-out KL, {seeds} seed(s), median [95 %]"
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
                *(_two_lines(look.speedup(task, arm, axis)) for axis in AXIS_NAMES),
                look.reached(task, arm).replace(" of ", "/"),
                *(number(look.quality(task, arm, name), form).partition(" [")[0] for name, form in last.items()),
            )
        tables.append(drawn)
    return tables


def _two_lines(row: Row | None) -> str:
    """The median above its interval, without brackets: a console takes `[never, 1.02]` for markup."""
    median, _, interval = times(row).partition(" [")
    if not interval or interval == "never, never]":
        return median
    return f"{median}\n{interval.rstrip(']').replace(', ', '–')}"


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
        "Against the baseline at the reference learning rate, and at its best one (smallest median seconds to the same "
        "target, chosen on the same seeds, which favours the baseline).",
        _rates(look),
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
        "## How it was measured",
        _method(look),
    ]
    return "\n\n".join(parts) + "\n"


# -- sentences --------------------------------------------------------------------------------------------------


def answers(look: Lookup) -> Iterator[str]:
    """The questions a reader has, answered from the numbers."""
    arm = ("effopd", look.reference)
    if ("lookahead", look.reference) in look.arms:
        yield from _net(look, "lookahead", "lookahead")
        yield from _net(look, "lookahead", "lookahead", "effopd")
        yield from _against_best(look, "lookahead", "lookahead")
    if arm not in look.arms:
        return
    yield from _net(look, "effopd", "EffOPD")
    yield _claim(look, arm)
    yield from _against_best(look, "effopd", "EffOPD")
    controls = [c for c in CONTROLS if (c, look.reference) in look.arms]
    for task in look.scopes:
        if any(look.speedup(task, (name, look.reference), "seconds") for name in controls):
            said = ", ".join(
                f"{name} {times(look.speedup(task, (name, look.reference), 'seconds'))}" for name in controls
            )
            yield f"**Controls, {task}**, net seconds: {said}; EffOPD {times(look.speedup(task, arm, 'seconds'))}."


def _net(look: Lookup, strategy: str, name: str, against: str | None = None) -> Iterator[str]:
    """The speed-up on every axis, by task."""
    for task in look.scopes:
        found = {axis: look.speedup(task, (strategy, look.reference), axis, against=against) for axis in AXIS_NAMES}
        steps = found["steps"]
        if steps:
            said = ", ".join(f"{times(row)} in {AXIS_NAMES[axis]}" for axis, row in found.items())
            over = f" over `{against}`" if against else ""
            yield f"**{name}: net speed-up{over} at the reference learning rate, {task}** (n = {steps['n']}): {said}."


def _claim(look: Lookup, arm: tuple[str, float]) -> str:
    verdicts = []
    for task in look.tasks:
        row = look.speedup(task, arm, "steps")
        if row and row["n"]:
            enough = row["median"] is None or row["median"] >= PAPER_CLAIM
            verdict = "reproduced" if enough else "not reproduced"
            verdicts.append(f"{task}: {verdict}, {times(row)} (n = {row['n']})")
    said = "; ".join(verdicts) or "no pair yet"
    return f"**The paper's “≈ {PAPER_CLAIM:.0f}× fewer steps”** (median ≥ {PAPER_CLAIM:.0f}): {said}."


def _against_best(look: Lookup, strategy: str, name: str) -> Iterator[str]:
    for task in look.tasks:
        best = look.results["best_learning_rate"].get(task)
        if best is None:
            continue
        rates = [rate for other, rate in look.arms if other == strategy and look.runs(task, (other, rate))]
        said = ", ".join(
            f"lr {rate:.3g} {times(look.speedup(task, (strategy, rate), 'seconds', against=BEST))}"
            for rate in sorted(rates)
        )
        own = times(look.speedup(task, (look.baseline, best), "seconds"))
        yield (
            f"**Against {look.baseline} at its best learning rate, {task}** ({best:.3g}, itself {own} the reference's "
            f"speed), net seconds: {name} at {said}."
        )


# -- tables -----------------------------------------------------------------------------------------------------


def _strategies(look: Lookup, task: str) -> str:
    header = [
        "strategy", *AXIS_NAMES.values(), "reached", "final KL", "final accuracy", "KL area (steps)",
        "KL area (net seconds)", "search share",
    ]  # fmt: skip
    rows = []
    for strategy in look.at_reference():
        arm = (strategy, look.reference)
        if look.runs(task, arm):
            rows.append(
                [
                    f"`{strategy}`",
                    *(times(look.speedup(task, arm, axis)) for axis in AXIS_NAMES),
                    look.reached(task, arm),
                    number(look.quality(task, arm, "final_kl")),
                    number(look.quality(task, arm, "final_accuracy"), ".3f"),
                    number(look.quality(task, arm, "auc_steps"), ".3f"),
                    number(look.quality(task, arm, "auc_seconds"), ".3f"),
                    number(look.quality(task, arm, "search_share"), ".1%"),
                ]
            )
    return table(header, rows)


def _pooled(look: Lookup) -> list[str]:
    rows = []
    for strategy in look.at_reference():
        found = {axis: look.speedup(ALL, (strategy, look.reference), axis) for axis in AXIS_NAMES}
        if found["steps"]:
            rows.append([f"`{strategy}`", str(found["steps"]["n"]), *map(times, found.values())])
    text = (
        "Strategies that ran on every task, all seeds of all tasks together, resampled within each task. Where tasks "
        "differ, the median lies between them and describes neither."
    )
    return [f"### {ALL} tasks", text, table(["strategy", "pairs", *AXIS_NAMES.values()], rows)]


def _rates(look: Lookup) -> str:
    swept = [s for s in dict.fromkeys(s for s, _ in look.arms) if len({r for t, r in look.arms if t == s}) > 1]
    rows = []
    for task in look.tasks:
        best = look.results["best_learning_rate"].get(task)
        for strategy in swept:
            for rate in sorted(rate for s, rate in look.arms if s == strategy):
                arm = (strategy, rate)
                if not look.runs(task, arm):
                    continue
                label = f"{rate:.3g}" + (" (best)" if strategy == look.baseline and rate == best else "")
                rows.append(
                    [
                        task,
                        f"`{strategy}`",
                        label,
                        look.reached(task, arm),
                        times(look.speedup(task, arm, "steps")),
                        times(look.speedup(task, arm, "seconds")),
                        times(look.speedup(task, arm, "seconds", against=BEST)),
                        number(look.quality(task, arm, "final_kl")),
                    ]
                )
    header = ["task", "strategy", "learning rate", "reached", "steps", "net seconds", "net seconds, against the best",
              "final KL"]  # fmt: skip
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


def _method(look: Lookup) -> str:
    settings = look.results["settings"]
    seeds = sorted({run["seed"] for run in look.results["runs"]})
    clocks = {
        "cpu": "CPU seconds of the run's own process, to which other processes add little (a few per cent at worst)",
        "wall": "seconds on the clock",
    }
    lines = [
        f"{len(look.results['runs'])} finished runs"
        + (f" of {settings['planned_runs']} planned" if "planned_runs" in settings else "")
        + f", seeds {', '.join(map(str, seeds))}; reference learning rate {look.reference:.3g}.",
        f"Smoothing: trailing median of {settings['smoothing_window']} evaluations. A run's cost is that of its first "
        "evaluation at the target, the baseline's too.",
        "Intervals: percentile bootstrap of the median over seeds (within each task where tasks are pooled). With five "
        "seeds or fewer that is their range, which covers the true median in 93.75 % of cases with five, 87.5 % with "
        "four, 75 % with three and 50 % with two.",
        "KL area: mean of smoothed KL / KL at step 0 over the baseline's whole budget of the same seed; lower is better.",
    ]
    if "clock" in settings:
        lines.append(
            f"Seconds: {clocks[settings['clock']]}; {settings['workers']} run(s) at a time"
            + (f", {settings['threads']} thread(s) each." if settings.get("threads") else ".")
        )
    lines.append("Software: " + ", ".join(f"{k} {v}" for k, v in look.results["versions"].items()) + ".")
    return "\n".join(f"- {line}" for line in lines)
