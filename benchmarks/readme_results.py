"""The README's results, from the published JSON files in docs/.

    effopd compare --report runs/compare --out docs
    effopd compare --report runs/compare-ablation --out docs/ablation
    .venv/bin/python benchmarks/readme_results.py

Rewrites the paragraph of the status, the section "How much faster" and the demo's output in README.md, and
docs/batch_size.md; a test asks that they are what this command writes.
"""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batch_size import PAGE, compared, page
from rich.console import Console

from effopd.commands import quickstart
from effopd.compare.cross_targets import own_rate, runs_of
from effopd.report.compare_lookup import Lookup, factor, number, table, times

ROOT = Path(__file__).parents[1]
START, END = "## How much faster", "## Install"
CHAIN, SPELL = TASKS = ("testbed:chain_sum", "testbed:spell_backward")


class Figures:
    """Everything that the README quotes from the headline grid, as text."""

    def __init__(self, results: dict[str, Any]):
        self.look = Lookup(results)
        self.reference = self.look.reference
        self.rates = sorted({rate for strategy, rate in self.look.arms if strategy == "line_search"})
        self.own = {
            (row["task"], row["strategy"], row["learning_rate"]): row
            for row in own_rate(runs_of(results), self.look.baseline)
            if row["axis"] == "steps"
        }

    def fast(self, task: str, strategy: str, rate: float | None = None, to: str | None = None, axis="seconds") -> str:
        """A speed-up with its interval, at the reference rate unless told otherwise."""
        return times(self.look.speedup(task, (strategy, rate or self.reference), axis, rate=to))

    def best(self, task: str, target: str = "reference_kl") -> float:
        """Plain OPD's best learning rate."""
        rate = self.look.best(task, target)
        assert rate is not None
        return rate

    def at(self, rate: float) -> str:
        """A learning rate as a multiple of the reference."""
        return factor(rate, self.reference)

    def anywhere(self, task: str, target: str = "reference_kl", axis: str = "seconds") -> str:
        """Against plain OPD at its best: the medians of `line_search` over its learning rates, and the worst single seed."""
        found = (self.look.speedup(task, ("line_search", rate), axis, target, rate="best") for rate in self.rates)
        rows = [row for row in found if row]
        medians = [row["median"] for row in rows]
        return f"{min(medians):.2f}–{max(medians):.2f}× (worst seed {min(row['low'] for row in rows):.2f}×)"

    def same(self, task: str, strategy: str, rate: float) -> str:
        """Steps against plain OPD at the same rate, to its own end there."""
        row = self.own[task, strategy, rate]
        return times(row) + (f", {row['reached']} of {row['n']}" if row["reached"] < row["n"] else "")

    def again(self, task: str, strategy: str, *rates: float) -> str:
        """How often runs that arrived were off the target later: one share, or the range over rates where any arrived."""
        said = [self.look.again(task, (strategy, rate)).split(" ")[0] for rate in rates]
        shares = sorted({int(share.rstrip("%")) for share in said if share != "–"})
        return f"{shares[0]}%" if len(shares) == 1 else f"{shares[0]}–{shares[-1]}%"


def status(f: Figures) -> str:
    """The paragraph under the status line: what the headline is, and what it is not."""
    look, tuned = f.look, next(rate for rate in f.rates if f.at(rate) == "×3")
    rows = [look.speedup(task, ("line_search", f.reference), "steps") for task in TASKS]
    parts = " and ".join(f"1/{row['median']:.0f}" for row in rows if row)
    own, best = ([times(row).split(" ")[0] for row in found] for found in (
        [f.own[task, "line_search", tuned] for task in TASKS],
        [look.speedup(task, ("line_search", f.reference), "seconds", rate="best") for task in TASKS],
    ))  # fmt: skip
    return f"""There, at a learning rate of {f.reference:.0e}, which is too low for plain OPD, `line_search` gets to plain OPD's final KL in {parts} of the steps. At {f.at(tuned)} of that rate, where plain OPD ends lowest, it gets to that end no sooner (medians: {own[0]} and {own[1]}). It is {best[0]} and {best[1]} as fast, in seconds, as plain OPD at the best learning rate of a sweep, without the sweep; plain OPD with a tuned rate and a smaller batch is faster still."""


def section(docs: dict[str, Any]) -> str:
    """The section, with its heading, from the published JSON files by name."""
    f, base = Figures(docs["results"]), docs["results"]["settings"]["base"]
    rows = [
        [
            label,
            f"`{task.split(':')[1]}`",
            *(f.fast(task, strategy, axis=axis) for axis in ("steps", "seconds", "forward_tokens")),
            *(f.fast(task, strategy, to="best", axis=axis) for axis in ("seconds", "forward_tokens")),
        ]
        for strategy, label in (("effopd", "`effopd`, the paper's search"), ("line_search", "**`line_search`, ours**"))
        for task in TASKS
    ]
    header = [
        "strategy",
        "task",
        "steps",
        "net seconds",
        "forward tokens",
        "against plain OPD at its best rate: net seconds",
        "… forward tokens",
    ]
    ours = [
        [run["targets"]["reference_kl"]["steps"] for run in f.look.runs(task, ("line_search", f.reference))]
        for task in TASKS
    ]
    reach = [statistics.median(steps) for steps in ours]
    arms = [(strategy, task) for strategy in ("line_search", "effopd") for task in TASKS]
    rates = [rate for rate in f.rates if all((task, strategy, rate) in f.own for strategy, task in arms)]
    same = [[f.at(rate), *(f.same(task, strategy, rate) for strategy, task in arms)] for rate in rates]
    parts = (rates_matter, replaces_the_sweep, ends_where)
    return f"""{START}

How much sooner a run gets to the held-out exact reverse KL at which plain OPD ends after {base["max_steps"]} steps at {f.reference:.0e} (×1). Medians over five seeds, paired by seed, with 95 % bootstrap intervals (of five seeds: their range); “never” counts as slower than any. Search is charged, evaluation is not. Runs are evaluated every {base["eval_steps"]} steps, so large factors are coarse: `line_search` arrives after {reach[0]} and {reach[1]} steps.
`chain_sum` and `spell_backward` are toy tasks of reasoning-gym, {base["per_device_train_batch_size"]} prompts per step; forward tokens are all that go through a model outside sampling, those of the search counted as if they went backward too.

{table(header, rows)}

![learning rates](docs/results/learning_rates.png)

Speed-up in steps with both at **the same learning rate**, to the KL at which plain OPD ends there (“4 of 5”: runs that arrive):

{table(["learning rate", *(f"`{strategy}`, `{task.split(':')[1]}`" for strategy, task in arms)], same)}

{"".join(f"- {part(f, docs)}" + chr(10) for part in parts)}- {gate(f, docs)}
- {small_batch(docs)}
- {ablation(docs["ablation"])}

The rules of `line_search` were chosen on these tasks and seeds. [docs/results.md](docs/results.md) has every strategy, learning rate, target and interval; `effopd compare recipes/compare-testbed.yaml` runs it all, `benchmarks/readme_results.py` writes this section.

"""


def rates_matter(f: Figures, docs: dict[str, Any]) -> str:
    """Plain OPD's own gain from tuning, and who leaves the target again."""
    tuned = {
        task: f"{f.fast(task, 'plain', f.best(task))} (`{task.split(':')[1]}`, {f.at(f.best(task))})" for task in TASKS
    }
    own = {s: sorted(rate for strategy, rate in f.look.arms if strategy == s) for s in ("effopd", "line_search")}
    ten = next(rate for rate in f.rates if f.at(rate) == "×10")
    return (
        f"**The learning rate matters more than the paper's search.** At the best of its rates plain OPD is {tuned[CHAIN]} and "
        f"{tuned[SPELL]} as fast as at ×1. Once there, EffOPD is off the target again in {f.again(CHAIN, 'effopd', f.reference)} and "
        f"{f.again(SPELL, 'effopd', f.reference)} of the later evaluations from ×1 (mean over runs), and in {f.again(CHAIN, 'effopd', *own['effopd'])} and "
        f"{f.again(SPELL, 'effopd', *own['effopd'])} over its rates. Plain OPD at ×10 is in {f.again(CHAIN, 'plain', ten)} and "
        f"{f.again(SPELL, 'plain', ten)}, `line_search` over its rates in {f.again(CHAIN, 'line_search', *own['line_search'])} and "
        f"{f.again(SPELL, 'line_search', *own['line_search'])}."
    )


def replaces_the_sweep(f: Figures, docs: dict[str, Any]) -> str:
    """`line_search` from any rate against plain OPD at its best."""
    ninety = list(dict.fromkeys(f.at(f.best(task, "gap_90")) for task in TASKS))
    return (
        f"**`line_search` replaces the sweep of the rate.** From any of {len(f.rates)} rates between {f.at(f.rates[0])} and {f.at(f.rates[-1])} "
        f"its median speed is {f.anywhere(CHAIN)} and {f.anywhere(SPELL)} that of plain OPD at its best rate, in forward tokens "
        f"{f.anywhere(CHAIN, axis='forward_tokens')} and {f.anywhere(SPELL, axis='forward_tokens')}. To 90 % of the way, where plain OPD's best "
        f"rate is {' and '.join(ninety)}, it is {f.anywhere(CHAIN, 'gap_90')} and {f.anywhere(SPELL, 'gap_90')}: it saves the sweep, nothing more. "
        "Higher starts, rates in between and, away from ×1, rates that decay were not compared."
    )


def ends_where(f: Figures, docs: dict[str, Any]) -> str:
    """Final KL on many answers."""
    final = docs["final_quality"]
    seeds = {len({r["seed"] for r in final if (r["task"], r["learning_rate"], r["strategy"]) == arm})
             for arm in {(r["task"], r["learning_rate"], r["strategy"]) for r in final}}  # fmt: skip

    def ends(task: str, strategy: str) -> dict[float, float]:
        own = [row for row in final if (row["task"], row["strategy"]) == (task, strategy)]
        return {
            rate: statistics.median(row["kl"] for row in own if row["learning_rate"] == rate)
            for rate in sorted({row["learning_rate"] for row in own})
        }

    said = []
    for task in TASKS:
        ours, plain = ends(task, "line_search"), ends(task, "plain")
        lowest = min(plain, key=lambda rate: plain[rate])
        others = [value for rate, value in plain.items() if rate != lowest]
        said.append(
            f"`{task.split(':')[1]}`: {min(ours.values()):.4f}–{max(ours.values()):.4f} from every start, plain OPD {plain[lowest]:.4f} at "
            f"{f.at(lowest)} and {min(others):.4f}–{max(others):.4f} at its other rates"
        )
    return (
        f"**It ends where a well-tuned run ends.** Final KL on {final[0]['size']} answers (`benchmarks/final_quality.py`, medians of "
        f"{min(seeds)}–{max(seeds)} seeds on the same questions; constant rates), {'; '.join(said)}."
    )


def small_batch(docs: dict[str, Any]) -> str:
    """Plain OPD with the small batch at the rate where it always arrives, against `line_search` with the large one."""
    both = compared(docs["results"], docs["ablation"])
    rows = [row for row in both if row["strategy"] == "plain"]
    reference = docs["results"]["settings"]["reference_learning_rate"]
    steady = next(rate for rate in sorted({row["learning_rate"] for row in rows})
                  if all(row["reached"] == row["n"] for row in rows if row["learning_rate"] == rate))  # fmt: skip

    def said(axis: str) -> str:
        return " and ".join(times(row) for row in rows if row["learning_rate"] == steady and row["axis"] == axis)

    ours = " and ".join(times(row) for row in both
                        if (row["strategy"], row["learning_rate"], row["axis"]) == ("line_search", reference, "seconds"))  # fmt: skip
    size = docs["ablation"]["settings"]["base"]["per_device_train_batch_size"]
    return (
        f"**A small batch is the stronger baseline.** Plain OPD with {size} prompts per step at {factor(steady, reference)} gets to the table's "
        f"target {said('generated_tokens')} sooner in sampled tokens than `line_search` with "
        f"{docs['results']['settings']['base']['per_device_train_batch_size']} from ×1, {said('forward_tokens')} in forward tokens and "
        f"{said('seconds')} in net seconds; `line_search` with {size}, from ×1, {ours} ([docs/batch_size.md](docs/batch_size.md))."
    )


def ablation(results: dict[str, Any]) -> str:
    """`line_search` in the setting of `recipes/compare-ablation.yaml`, and what its parts are worth there."""
    look, base = Lookup(results), results["settings"]["base"]

    def fast(rate: float, to: str | None = None) -> str:
        return " and ".join(
            times(look.speedup(task, ("line_search", rate), "seconds", rate=to)) for task in look.tasks
        )

    shares = " and ".join(
        number(look.quality(task, ("line_search", look.reference), "search_share_to_target"), ".0%")
        for task in look.tasks
    )
    others = sorted(rate for strategy, rate in look.arms if strategy == "line_search" and rate != look.reference)
    elsewhere = "; ".join(f"from {factor(rate, look.reference)} {fast(rate, 'best')}" for rate in others)
    return (
        f"**With {base['per_device_train_batch_size']} prompts `line_search` is about as fast as a tuned run.** Searches take {shares} of the time "
        f"to the target. In net seconds `line_search` is {fast(look.reference)} as fast as plain OPD at the same rate; against the best of "
        f"{len(results['swept'][look.tasks[0]])} rates {fast(look.reference, 'best')} from ×1, {elsewhere} ({len(results['runs'])} of "
        f"{results['settings']['planned_runs']} planned runs; its parts: [docs/ablation/results.md](docs/ablation/results.md))."
    )


def gate(f: Figures, docs: dict[str, Any]) -> str:
    """What EffOPD's gate accepts."""
    power = docs["gate_power"]
    groups = {(row["from"], row["to"]): row for row in power["by_true_change"]}
    kinds = {
        "raise accuracy by 2.5 to 7.5 points": (0.025, 0.075),
        "lower it by 0.5 to 2.5": (-0.025, -0.005),
        "lower it by 2.5 to 7.5": (-0.075, -0.025),
    }
    said = listed(f"{groups[size]['shared']:.0%} of those that {kind}" for kind, size in kinds.items())
    afresh = listed(f"{groups[size]['fresh']:.0%}" for size in kinds.values())
    runs = len({(row["family"], row["seed"]) for row in power["moves"]})
    nothing = [row["first_accepted"] for row in docs["gate_noise"]["shared_noise"] if row["gate"] == "ge"]
    anew = [
        row["first_accepted"]
        for row in docs["gate_noise"]["fresh_noise"]
        if (row["gate"], row["validation_size"]) == ("ge", 50)
    ]
    return (
        f"**EffOPD's gate tells gains from losses of several points, not smaller ones.** Of real moves of {runs} run{'s' * (runs > 1)} it accepts "
        f"{said}. All candidates share their random numbers here; with fresh ones, {afresh} (`benchmarks/gate_power.py`). Random moves "
        f"too short to matter pass in {min(nothing):.0%}–{max(nothing):.0%} of searches, with fresh ones in {min(anew):.0%}–{max(anew):.0%} "
        "(`benchmarks/gate_noise.py`). Jumping 2Δ at every trigger "
        f"without asking (`fixed-k1`) is {f.fast(CHAIN, 'fixed-k1')} and {f.fast(SPELL, 'fixed-k1')} in net seconds, where the search is "
        f"{f.fast(CHAIN, 'effopd')} and {f.fast(SPELL, 'effopd')}."
    )


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}"


def demo(summary: dict[str, Any]) -> str:
    """What `effopd quickstart` prints of a demo, without the paths at its end."""
    console = Console(soft_wrap=True, width=80, file=io.StringIO(), force_terminal=False)
    console.print(quickstart._table(summary))
    console.print(quickstart._verdict(summary))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join(lines).strip("\n")


def published(docs: Path) -> dict[str, Any]:
    """The JSON files that the README quotes."""
    files = {
        "results": "results.json", "final_quality": "final_quality.json", "ablation": "ablation/results.json",
        "gate_noise": "gate_noise.json", "gate_power": "gate_power.json", "demo": "demo/chain_sum-seed-0.json",
    }  # fmt: skip
    return {name: json.loads((docs / path).read_text()) for name, path in files.items()}


def rewritten(readme: str, docs: dict[str, Any]) -> str:
    """The README with what these results say."""
    before, after = readme[: readme.index(START)], readme[readme.index(END) :]
    before = re.sub(r"(?m)^There, at .*\n(?:.+\n)*", lambda _: status(Figures(docs["results"])) + "\n", before)
    after = re.sub(
        r"(What the demo prints:\n\n```\n).*?(\n```)",
        lambda m: m[1] + demo(docs["demo"]) + m[2],
        after,
        flags=re.DOTALL,
    )
    return before + section(docs) + after


def main() -> None:
    docs, readme = published(ROOT / "docs"), ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(), docs))
    (ROOT / "docs" / PAGE).write_text(page(docs["results"], docs["ablation"]))


if __name__ == "__main__":
    main()
