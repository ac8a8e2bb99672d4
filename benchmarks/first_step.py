"""Table of docs/search.md: best length of the first step, from the published comparisons.

    .venv/bin/python benchmarks/first_step.py    # rewrites the table

The best length (1 + s)·η is that of the first search, along one step of Adam at the rate η. Next to
it stands the constant rate at which plain OPD is first at 10 % of the starting KL. Runs without an
accepted first search are left out and counted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from pages import DOCS, rewrite

from effopd.compare.cross_targets import runs_of
from effopd.compare.grid_run import GridRun
from effopd.report.compare_lookup import table

#: Results of a comparison → student, prompts per step.
GRIDS = {
    "results.json": ("testbed", 256),
    "ablation/results.json": ("testbed", 32),
    "real_model/results.json": ("SmolLM2-135M", 16),
}
#: The strategy whose first jump goes all of the way to the best scale.
WHOLE_JUMPS = "line_search"
#: Target of the fastest constant rate, as a share of the starting KL.
SHARE = 0.1


def best_lengths(runs: Sequence[GridRun], rows: Sequence[dict]) -> tuple[list[float], int]:
    """(1 + s)·η of accepted first searches, and the number of runs without one."""
    lengths = []
    for run, row in zip(runs, rows, strict=True):
        step, scale = (row["accepted"] or [(0, 0.0)])[0]
        if step == 2:
            lengths.append((1 + scale) * run.learning_rate)
    return lengths, len(runs) - len(lengths)


def fastest_rate(runs: Sequence[GridRun]) -> float:
    """Learning rate of plain OPD with the fewest steps to the target, median over seeds."""
    steps: dict[float, list[float]] = {}
    for run in runs:
        cost = run.cost(SHARE * run.evaluations[0].kl, "kl", higher_is_better=False)
        steps.setdefault(run.learning_rate, []).append(cost.steps if cost else float("inf"))
    return min(steps, key=lambda rate: statistics.median(steps[rate]))


def rows() -> list[list[str]]:
    """One row per comparison, task and learning rate."""
    lines = []
    for name, (student, prompts) in GRIDS.items():
        stored = json.loads((DOCS / name).read_text())
        pairs = list(zip(runs_of(stored), stored["runs"], strict=True))
        for task in dict.fromkeys(run.task for run, _ in pairs):
            plain = fastest_rate([run for run, _ in pairs if run.task == task and run.strategy == "plain"])
            ours = [(run, row) for run, row in pairs if run.task == task and run.strategy == WHOLE_JUMPS]
            for rate in sorted({run.learning_rate for run, _ in ours}):
                at_rate = [(run, row) for run, row in ours if run.learning_rate == rate]
                lengths, missing = best_lengths([run for run, _ in at_rate], [row for _, row in at_rate])
                if lengths:
                    middle = statistics.median(lengths)
                    count = f"{len(lengths)}" + (f" of {len(lengths) + missing}" if missing else "")
                    lines.append([
                        student, task.split(":")[1], f"{prompts}", f"{rate:.1g}", count,
                        f"{middle:.2g} ({min(lengths):.2g}–{max(lengths):.2g})", f"{middle / 4:.2g}", f"{plain:.1g}",
                    ])  # fmt: skip
    return lines


def blocks() -> dict[str, str]:
    """The block of the page by name."""
    head = ["student", "task", "prompts per step", "rate η", "runs", "best length: median (range)", "a quarter of it"]
    return {"first step": table([*head, "fastest constant rate"], rows())}


if __name__ == "__main__":
    rewrite(DOCS / "search.md", blocks())
