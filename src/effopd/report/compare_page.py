"""results.json → results.md and the terminal's table. Every sentence with a number is made from the numbers."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from effopd.bench.results import ALL, BEST, SAME, whole_of

Results = Mapping[str, Any]
Row = Mapping[str, Any]
AXIS_NAMES = {
    "steps": "steps",
    "seconds": "net seconds",
    "generated_tokens": "sampled tokens",
    "forward_tokens": "forward tokens",
}
CONTROLS = ("noop", "fixed-k1", "random_direction")
PAPER_CLAIM = 3.0
#: Fewer seeds than this have a range instead of an interval.
FEW = 5


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
                r["against"],
                r["against_learning_rate"] if r["against_learning_rate"] in (BEST, SAME) else None,
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
        self,
        task: str,
        arm: tuple[str, float],
        axis: str,
        target="reference_kl",
        against: str | None = None,
        rate: str | None = None,
    ) -> Row | None:
        """A row of `speedups`, if there is one: against a strategy (default: the baseline) at the reference learning rate, at
        its best (`BEST`, the baseline only) or at the arm's own (`SAME`)."""
        return self._speedups.get((task, *arm, against or self.baseline, rate, target, axis))

    def quality(self, task: str, arm: tuple[str, float], measure: str) -> Row | None:
        """A row of `quality`, if there is one."""
        return self._quality.get((task, *arm, measure))

    def runs(self, task: str, arm: tuple[str, float]) -> list[Row]:
        """Runs of an arm on a task."""
        return [r for r in self.results["runs"] if r["task"] == task and (r["strategy"], r["learning_rate"]) == arm]

    def best(self, task: str, target: str = "reference_kl") -> float | None:
        """The baseline's best learning rate for a target."""
        return self.results["best_learning_rate"].get(task, {}).get(target)

    def again(self, task: str, arm: tuple[str, float], target="reference_kl") -> str:
        """How often runs that arrived were seen off the target later."""
        shares = [run["targets"][target]["above_again"] for run in self.runs(task, arm) if target in run["targets"]]
        seen = [share for share in shares if share is not None]
        return f"{statistics.mean(seen):.0%} of the later evaluations off it again" if seen else "–"

    def reached(self, task: str, arm: tuple[str, float], target="reference_kl") -> str:
        """`3 of 5`: how many runs arrived."""
        runs = [run["targets"][target] for run in self.runs(task, arm) if target in run["targets"]]
        return f"{sum(run['reached'] for run in runs)} of {len(runs)}"


def times(row: Row | None) -> str:
    """A speed-up in words: `1.92× [1.70, 3.43]` with its interval, `1.92× (1.70–3.43, n = 3)` with the range of few seeds,
    `never`, `> any`."""
    if row is None or not row["n"]:
        return "–"
    median, low, high, n = _one(row["median"]), _one(row["low"], ""), _one(row["high"], ""), row["n"]
    if n >= FEW:
        return f"{median} [{low}, {high}]"
    return f"{median} (n = 1)" if n == 1 else f"{median} ({low}–{high}, n = {n})"


def _one(value: float | None, unit: str = "×") -> str:
    if value is None:
        return "> any"
    return "never" if value == 0 else f"{value:.2f}{unit}"


def number(row: Row | None, form: str = ".4f") -> str:
    """A median with its interval or, of few seeds, its range; `–` where there is none, `diverged` for what is not finite."""
    if row is None or not row["n"]:
        return "–"
    median, low, high = ("diverged" if row[end] is None else f"{row[end]:{form}}" for end in ("median", "low", "high"))
    if row["n"] >= FEW:
        return f"{median} [{low}, {high}]"
    return median if row["n"] == 1 else f"{median} ({low} to {high})"


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
    return f"{_one(row['median'])}\n{_one(row['low'], '')}–{_one(row['high'], '')}"


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
    verdicts = []
    for task in look.tasks:
        row = look.speedup(task, arm, "steps")
        if row and row["n"]:
            low, median = (math.inf if row[end] is None else row[end] for end in ("low", "median"))
            verdict = (
                "reproduced"
                if low >= PAPER_CLAIM
                else "in the median, not with its interval"
                if median >= PAPER_CLAIM
                else "not reproduced"
            )
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
                times(look.speedup(task, arm, "steps")),
                times(look.speedup(task, arm, "seconds")),
                times(look.speedup(task, arm, "seconds", rate=BEST)),
                times(look.speedup(task, arm, "seconds", rate=SAME)),
                times(look.speedup(task, arm, "seconds", "gap_90")),
                times(look.speedup(task, arm, "seconds", "gap_90", rate=BEST)),
            ]
        )
    header = ["task", "strategy", "learning rate", "reached", "steps", "net seconds", "… against the best", "… against the same rate",
              "90 %: net seconds", "… against the best"]  # fmt: skip
    return table(header, rows)


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


def _method(look: Lookup) -> str:
    settings = look.results["settings"]
    seeds = sorted({run["seed"] for run in look.results["runs"]})
    clocks = {
        "cpu": "CPU seconds of the run's own process, to which other processes on the machine add some per cent (identical work differs by 4 to 5 % here)",
        "wall": "seconds on the clock",
    }
    lines = [
        f"{len(look.results['runs'])} finished runs"
        + (f" of {settings['planned_runs']} planned" if "planned_runs" in settings else "")
        + f", seeds {', '.join(map(str, seeds))}; reference learning rate {look.reference:.3g}.",
        f"Smoothing: trailing median of {settings['smoothing_window']} evaluations. A run's cost is that of its first "
        "evaluation at the target, the baseline's too.",
        "Brackets: 95 % interval, percentile bootstrap of the median over seeds; with five seeds it is their range, which covers "
        "the true median in 93.75 % of cases. Parentheses: the range of fewer seeds (87.5 % with four, 75 % with three, 50 % with "
        "two), no interval. “never”: does not arrive; “> any”: the baseline does not; “–”: nothing to compare.",
        "Search share: search seconds / net seconds, of the whole run and until the target was reached. Off it again: of the "
        "evaluations after the first at the target, how many were not at it. Extra memory: what the look-ahead holds beside the model.",
        "KL area: mean of smoothed KL / KL at step 0 over the baseline's whole budget of the same seed; lower is better.",
    ]
    if "clock" in settings:
        lines.append(
            f"Seconds: {clocks[settings['clock']]}; {settings['workers']} run(s) at a time"
            + (f", {settings['threads']} thread(s) each." if settings.get("threads") else ".")
        )
    for note in settings.get("elsewhere", []):
        spread = f"{note['low']:.2f}–{note['high']:.2f}, " if note["n"] > 1 else ""
        paired = (
            f"; for {note['paired']} of them by that of their own task and seed, so that they are divided by seconds of the machine "
            "that made them"
            if note.get("paired")
            else ""
        )
        lines.append(
            f"{note['runs']} of the runs were made on another machine. Their seconds are multiplied by {note['factor']:.3f}: "
            f"the ratio of seconds per forward token of runs made on both ({spread}n = {note['n']}){paired}."
        )
    codes = Counter(run.get("code") or "not recorded" for run in look.results["runs"])
    if len(codes) > 1:
        said = ", ".join(f"{name}: {count} runs" for name, count in codes.items())
        lines.append(f"States of the code that made the runs (hash of the package's source): {said}.")
    for failure in settings.get("failed", []):
        lines.append(f"Failed and left out: {failure}")
    lines.append(
        "Software of this report: " + ", ".join(f"{k} {v}" for k, v in look.results["versions"].items()) + "."
    )
    return "\n".join(f"- {line}" for line in lines)
