"""Summaries and figures in docs/demo/: the demo over several seeds.

    .venv/bin/python benchmarks/demo_seeds.py [--family chain_sum] [--seeds 0] [--keep docs/demo]
    .venv/bin/python benchmarks/readme_results.py

Runs `effopd quickstart` once per seed into runs/demo-FAMILY-SEED; a finished seed is only redrawn.
Copies the summaries and the first seed's figure to `--keep`, and prints a table with medians.
Seconds are CPU seconds, so that other processes do not count.
docs/tutorials/quickstart.md shows seed 0 of chain_sum; `readme_results.py` writes its output from
docs/demo/chain_sum-seed-0.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from rich.console import Console

from effopd.commands import quickstart_results
from effopd.commands.main import main as effopd
from effopd.commands.quickstart_settings import QuickstartArguments

AXES = ("steps", "seconds", "generated_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="chain_sum")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, default=Path("docs/demo"))
    parser.add_argument("--max_steps", type=int, default=48)
    parser.add_argument("--cost_clock", default="cpu", choices=["wall", "cpu"], help="as in `effopd quickstart`")
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    summaries = {}
    for seed in arguments.seeds:
        root = Path("runs") / f"demo-{arguments.family}-{seed}"
        demo = QuickstartArguments(seed=seed, family=arguments.family, max_steps=arguments.max_steps,
                                   cost_clock=arguments.cost_clock)  # fmt: skip
        if (root / "summary.json").exists():
            quickstart_results.conclude(root, demo, Console(soft_wrap=True))  # redraw from the rows
        else:
            effopd(["quickstart", "--seed", str(seed), "--family", arguments.family, "--output_dir", str(root),
                    "--max_steps", str(arguments.max_steps), "--cost_clock", arguments.cost_clock])  # fmt: skip
        summaries[seed] = json.loads((root / "summary.json").read_text())
        shutil.copy(root / "summary.json", arguments.keep / f"{arguments.family}-seed-{seed}.json")
        if seed == arguments.seeds[0]:
            shutil.copy(root / "figure.png", arguments.keep / f"{arguments.family}.png")
    print(table(summaries))


def table(summaries: dict[int, dict]) -> str:
    """Markdown table: one row per seed, then medians; a seed that misses the target counts as 0."""
    lines = [
        "| seed | speed-up: steps | seconds | sampled tokens | accepted jumps (step: scale) "
        "| final accuracy: plain | EffOPD |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, summary in summaries.items():
        speedup = summary["speedup"]
        cells = ["never" if speedup[a] is None else f"{speedup[a]:.2f}×" for a in AXES]
        jumps = ", ".join(f"{step}: {scale:g}" for step, scale in summary["effopd"]["accepted_scales"].items())
        accuracy = [
            "{:.3f} [{:.3f}, {:.3f}]".format(summary[arm]["final_accuracy"], *summary[arm]["final_accuracy_ci95"])
            for arm in ("plain", "effopd")
        ]
        lines.append(f"| {seed} | " + " | ".join([*cells, jumps, *accuracy]) + " |")
    for share in (row["gap_closed"] for row in next(iter(summaries.values()))["speedup_by_gap_closed"]):
        rows = [
            next(r for r in s["speedup_by_gap_closed"] if r["gap_closed"] == share)["speedup"]
            or dict.fromkeys(AXES, 0.0)
            for s in summaries.values()
        ]
        cells = [f"{statistics.median([row[axis] for row in rows]):.2f}×" for axis in AXES]
        lines.append(f"| median at {share:.0%} of the gap | " + " | ".join(cells) + " | | | |")
    medians = [statistics.median([s["speedup"][axis] or 0.0 for s in summaries.values()]) for axis in AXES]
    lines.append("| median | " + " | ".join(f"{m:.2f}×" for m in medians) + " | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
