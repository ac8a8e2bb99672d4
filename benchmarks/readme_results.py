"""Generated tables and figure of the README and three docs pages, from the JSON files in docs/.

    effopd compare --report runs/compare --out docs
    effopd compare --report runs/compare-ablation --out docs/ablation
    .venv/bin/python benchmarks/readme_results.py            # rewrite the tables
    .venv/bin/python benchmarks/readme_results.py --figure   # redraw both figures too

The pages are README.md and, in docs/, findings.md, rivals.md, held_out.md, gate.md, batch_size.md
and tutorials/quickstart.md.
Only the blocks between markers are generated (`pages.py`); the rest is written by hand.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import readme_figure
import rivals
import targets_figure
from batch_size import held_out_blocks, parts_blocks, readme_table, settings_table, speed_table, tail_blocks
from pages import DOCS, rewrite
from rich.console import Console

from effopd.commands import quickstart_results
from effopd.compare.axes import axis_name
from effopd.compare.cross_targets import own_rate, runs_of
from effopd.report.compare_envelope import TABLE_SHARES, at, curves
from effopd.report.compare_lookup import Lookup, factor, number, table, times

CHAIN, SPELL = TASKS = ("testbed:chain_sum", "testbed:spell_backward")
NAMES = [f"`{task.split(':')[1]}`" for task in TASKS]
LABELS = {
    "effopd": "`effopd`, the paper's search",
    "line_search": "**`line_search`, ours**",
    "fixed-k1": "`fixed`: always W + 2Δ, unscored",
}


class Figures:
    """Cells of the tables, from results.json of the grid with large batches."""

    def __init__(self, results: Mapping[str, Any]):
        self.look = Lookup(results)
        self.reference = self.look.reference
        self.rates = sorted({rate for strategy, rate in self.look.arms if strategy == "line_search"})
        self.own = {
            (row["task"], row["strategy"], row["learning_rate"]): row
            for row in own_rate(runs_of(results), self.look.baseline)
            if row["axis"] == "steps"
        }

    def speed(self, task: str, strategy: str, axis: str = "seconds", **kwargs) -> str:
        """Speed-up with its interval at the reference rate; `kwargs` as in `Lookup.speedup`."""
        return times(self.look.speedup(task, (strategy, self.reference), axis, **kwargs))

    def at(self, rate: float) -> str:
        """A learning rate as a multiple of the reference."""
        return factor(rate, self.reference)

    def any_rate(self, task: str, target: str, axis: str) -> tuple[str, str]:
        """Over plain OPD at its best: range of medians over line_search's rates, and worst seed."""
        rows = [self.look.speedup(task, ("line_search", r), axis, target, rate="best") for r in self.rates]
        medians, lows = ([row[key] for row in rows if row] for key in ("median", "low"))
        return f"{min(medians):.2f}–{max(medians):.2f}×", f"{min(lows):.2f}×"

    def same_rate(self, task: str, strategy: str, rate: float) -> str:
        """Speed-up in steps over plain OPD at the same rate, to its final KL at that rate."""
        row = self.own[task, strategy, rate]
        return times(row) + (f", {row['reached']} of {row['n']}" if row["reached"] < row["n"] else "")

    def off_again(self, task: str, strategy: str, *rates: float) -> str:
        """Share of evaluations after reaching the target that are above it; range over rates."""
        cells = [self.look.again(task, (strategy, rate)).split(" ")[0] for rate in rates]
        shares = sorted({int(cell.rstrip("%")) for cell in cells if cell != "–"})
        return f"{shares[0]} %" if len(shares) == 1 else f"{shares[0]}–{shares[-1]} %"


def findings(docs: Mapping[str, Any]) -> dict[str, str]:
    """Generated blocks of docs/findings.md."""
    f = Figures(docs["results"])
    return {
        "speed": speed(f),
        "same rate": same_rate(f),
        "plain rates": plain_rates(f),
        "any rate": any_rate(f),
        "off again": off_again(f),
        "final quality": final_quality(f, docs["final_quality"]),
        "small batch": small_batch(docs),
        "figure target": figure_targets(f),
        "envelope": envelope(f),
    }


def speed(f: Figures) -> str:
    """Speed-ups at the reference learning rate, and against plain OPD at its best."""
    axes = {"steps": "steps", "seconds": "net seconds", "forward_tokens": "forward tokens"}
    rows = [
        [label, NAMES[i], *(f.speed(task, strategy, axis) for axis in axes),
         *(f.speed(task, strategy, axis, rate="best") for axis in list(axes)[1:])]
        for strategy, label in LABELS.items() for i, task in enumerate(TASKS)
    ]  # fmt: skip
    best = [f"against the best rate: {axes[axis]}" for axis in list(axes)[1:]]
    return table(["strategy", "task", *axes.values(), *best], rows)


def same_rate(f: Figures) -> str:
    """Speed-up in steps over plain OPD at the same learning rate, to its final KL at that rate."""
    arms = [(strategy, task) for strategy in ("line_search", "effopd") for task in TASKS]
    rates = [rate for rate in f.rates if all((task, strategy, rate) in f.own for strategy, task in arms)]
    head = [f"`{strategy}`, {NAMES[TASKS.index(task)]}" for strategy, task in arms]
    rows = [[f.at(rate), *(f.same_rate(task, strategy, rate) for strategy, task in arms)] for rate in rates]
    return table(["learning rate", *head], rows)


def plain_rates(f: Figures) -> str:
    """Fastest learning rate of plain OPD for a target, and its speed-up over the reference rate."""
    rows = []
    for target, label in (("reference_kl", "final KL of plain OPD at ×1"), ("gap_90", "90 % of the way")):
        cells = []
        for task in TASKS:
            rate = f.look.best(task, target)
            assert rate is not None
            cells += [f.at(rate), times(f.look.speedup(task, (f.look.baseline, rate), "seconds", target))]
        rows.append([label, *cells])
    return table(
        ["target", *(cell for name in NAMES for cell in (f"{name}: best rate", "net speed-up over ×1"))], rows
    )


def any_rate(f: Figures) -> str:
    """`line_search` at each of its learning rates against plain OPD at its best."""
    rows = [
        [label, axis, *(cell for task in TASKS for cell in f.any_rate(task, target, key))]
        for target, label in (("reference_kl", "final KL of plain OPD at ×1"), ("gap_90", "90 % of the way"))
        for key, axis in (("seconds", "net seconds"), ("forward_tokens", "forward tokens"))
    ]
    return table(["target", "cost", *(c for name in NAMES for c in (f"{name}: medians", "worst seed"))], rows)


def off_again(f: Figures) -> str:
    """Share of evaluations after reaching the target that are above it again."""
    rates = {s: sorted(rate for strategy, rate in f.look.arms if strategy == s) for s in ("effopd", "line_search")}
    ten = next(rate for rate in f.rates if f.at(rate) == "×10")
    arms = {
        "`effopd` at ×1": ("effopd", f.reference),
        "`effopd`, over its rates": ("effopd", *rates["effopd"]),
        "plain OPD at ×10": ("plain", ten),
        "`line_search`, over its rates": ("line_search", *rates["line_search"]),
    }
    return table(
        ["run", *NAMES], [[label, *(f.off_again(task, *arm) for task in TASKS)] for label, arm in arms.items()]
    )


def final_quality(f: Figures, rows: list[dict[str, Any]]) -> str:
    """Medians of the final KL on many answers, over seeds."""
    lines = []
    for name, task in zip(NAMES, TASKS, strict=True):
        ends: dict[str, dict[float, float]] = {
            strategy: {
                rate: statistics.median(
                    row["kl"]
                    for row in rows
                    if (row["task"], row["strategy"], row["learning_rate"]) == (task, strategy, rate)
                )
                for rate in sorted(
                    {row["learning_rate"] for row in rows if (row["task"], row["strategy"]) == (task, strategy)}
                )
            }
            for strategy in ("line_search", "plain")
        }
        plain = ends["plain"]
        lowest = min(plain, key=plain.__getitem__)
        others = [value for rate, value in plain.items() if rate != lowest]
        ours = ends["line_search"].values()
        lines.append(
            [
                name,
                f"{min(ours):.4f}–{max(ours):.4f}",
                f"{plain[lowest]:.4f} at {f.at(lowest)}",
                f"{min(others):.4f}–{max(others):.4f}",
            ]
        )
    return table(["task", "`line_search`, every rate", "plain OPD, best rate", "plain OPD, other rates"], lines)


def gate(docs: Mapping[str, Any]) -> str:
    """Share of moves that the accuracy gate accepts, by their true change in accuracy."""
    groups = {(row["from"], row["to"]): row for row in docs["gate_power"]["by_true_change"]}
    kinds = {
        "raises accuracy by 2.5 to 7.5 points": (0.025, 0.075),
        "lowers it by 0.5 to 2.5 points": (-0.025, -0.005),
        "lowers it by 2.5 to 7.5 points": (-0.075, -0.025),
    }
    rows = [[kind, f"{groups[size]['shared']:.0%}", f"{groups[size]['fresh']:.0%}"] for kind, size in kinds.items()]
    nothing = {
        noise: [row["first_accepted"] for row in docs["gate_noise"][noise]
                if row["gate"] == "not_worse" and row.get("validation_size", 50) == 50]
        for noise in ("shared_noise", "fresh_noise")
    }  # fmt: skip
    ranges = [f"{min(shares):.0%}–{max(shares):.0%}" for shares in nothing.values()]
    return table(
        ["move", "shared random numbers", "fresh random numbers"], [*rows, ["changes nothing measurable", *ranges]]
    )


def small_batch(docs: Mapping[str, Any]) -> str:
    """`line_search` with small batches against plain OPD with small batches."""
    results = docs["ablation"]
    look, rates = Lookup(results), len(results["swept"][CHAIN])
    line_search = sorted(rate for strategy, rate in look.arms if strategy == "line_search")
    rows = [
        [
            "net speed-up over plain OPD at the same rate, ×1",
            *(times(look.speedup(task, ("line_search", look.reference), "seconds")) for task in TASKS),
        ],
        *(
            [
                f"from {factor(rate, look.reference)}, over plain OPD at the best of {rates} rates",
                *(times(look.speedup(task, ("line_search", rate), "seconds", rate="best")) for task in TASKS),
            ]
            for rate in line_search
        ),
        [
            "share of the time to the target spent in searches, from ×1",
            *(
                number(look.quality(task, ("line_search", look.reference), "search_share_to_target"), ".0%")
                for task in TASKS
            ),
        ],
        ["runs made of those planned", *[f"{len(results['runs'])} of {results['settings']['planned_runs']}"] * 2],
    ]
    return table(["`line_search`, small batches", *NAMES], rows)


def figure_targets(f: Figures) -> str:
    """Steps at which `line_search` from the reference rate reaches the target."""
    steps = [
        [run["targets"]["reference_kl"]["steps"] for run in f.look.runs(task, ("line_search", f.reference))]
        for task in TASKS
    ]
    every = f.look.results["settings"]["base"]["eval_steps"]
    rows = [
        ["steps of `line_search` to the target, median", *(f"{statistics.median(each):g}" for each in steps)],
        ["steps of plain OPD", *[str(f.look.results["settings"]["base"]["max_steps"])] * 2],
        ["steps between evaluations", *[str(every)] * 2],
    ]
    return table(["quantity", *NAMES], rows)


def envelope(f: Figures) -> str:
    """`line_search` at the reference rate against the best-tuned run of both grids, by target."""
    part = f.look.results["joined_envelope"]
    names = ["line_search", *(name for name in part["opening"] if name.startswith("line_search"))]
    lines = []
    for axis in ("seconds", "generated_tokens", "student_backward_tokens"):
        for strategy in names:
            for name, task in zip(NAMES, TASKS, strict=True):
                row = next(row for arm, row in curves(part, task, axis, strategy) if arm[1] == f.reference)
                points = [times(at(row, part["shares"].index(share))) for share in TABLE_SHARES]
                lines.append([axis_name(axis), f"`{strategy}`", name, *(p.replace(", n = 3", "") for p in points)])
    return table(["cost", "strategy", "task", *(f"to {100 * share:.3g} %" for share in TABLE_SHARES)], lines)


def demo(summary: dict[str, Any]) -> str:
    """Output of `effopd quickstart`, without the final paths."""
    console = Console(soft_wrap=True, width=80, file=io.StringIO(), force_terminal=False)
    console.print(quickstart_results.table_of(summary))
    console.print(quickstart_results.speedup_text(summary))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "```\n" + "\n".join(lines).strip("\n") + "\n```"


GRIDS = ("results", "ablation")
#: Grids with 1024 held-out prompts, one per task.
TAILS = ("tail", "tail_spell_backward")


def _base(docs: Mapping[str, Any], grid: str) -> dict[str, Any]:
    return docs[grid]["settings"]["base"]


def published(docs: Path = DOCS) -> dict[str, Any]:
    """JSON files behind the tables, by name."""
    files = {
        "results": "results.json", "final_quality": "final_quality.json", "ablation": "ablation/results.json",
        "gate_noise": "gate_noise.json", "gate_power": "gate_power.json", "demo": "demo/chain_sum-seed-0.json",
        "rivals": "rivals/results.json", "other_teacher": "other_teacher/results.json",
        "tail": "tail/results.json", "tail_spell_backward": "tail_spell_backward/results.json",
        "held_out": "held_out/results.json", "early": "early/results.json", "parts": "mini_batches/results.json",
    }  # fmt: skip
    return {name: json.loads((docs / path).read_text()) for name, path in files.items()}


def blocks(docs: Mapping[str, Any]) -> dict[Path, dict[str, str]]:
    """Page → generated blocks."""
    grids = docs["results"], docs["ablation"]
    return {
        DOCS.parent / "README.md": {
            "rivals": readme_table([docs[name] for name in (*TAILS, "held_out")], docs["early"])
        },
        DOCS / "findings.md": findings(docs),
        DOCS / "rivals.md": rivals.blocks(docs["rivals"], docs["other_teacher"]),
        DOCS / "held_out.md": held_out_blocks(docs["held_out"]),
        DOCS / "gate.md": {"gate": gate(docs)},
        DOCS / "batch_size.md": {
            "settings": settings_table(*grids),
            "speed": speed_table(*grids),
            **tail_blocks([docs[name] for name in TAILS], docs["early"]),
            **parts_blocks(docs["parts"], [docs[name] for name in TAILS]),
        },
        DOCS / "tutorials" / "quickstart.md": {"demo": demo(docs["demo"])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--figure", action="store_true", help="redraw docs/readme.png and docs/targets.png too (needs matplotlib)"
    )
    arguments = parser.parse_args()
    docs = published()
    for page, content in blocks(docs).items():
        rewrite(page, content)
    if arguments.figure:
        readme_figure.draw([docs[name] for name in TAILS], DOCS / "readme.png")
        grids = [docs[name] for name in (*TAILS, "held_out")]
        targets_figure.draw(grids, docs["early"], DOCS / "targets.png")


if __name__ == "__main__":
    main()
