"""Overhead of `effopd compare` beyond its runs, and effect of parallel runs on measured cost.

    .venv/bin/python benchmarks/compare_overhead.py [--steps 16] [--seeds 0 1] [--out DIR]

Runs the same grid three times, with one thread per run: plain OPD and EffOPD on the testbed for a
few steps. The first pass charges wall-clock seconds, one run at a time. The second charges CPU
seconds, one run at a time. The third charges CPU seconds, two runs at a time. Reported, over runs:

    clock       CPU seconds / wall-clock seconds of the same run, alone
    neighbour   CPU seconds beside another run / alone
    ratio       cost ratio plain / EffOPD beside other runs, divided by the same ratio alone
    overhead    share of the elapsed time without a run's process, one run at a time

Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from pathlib import Path

from effopd.common.files import read_rows
from effopd.compare.grid import Grid, PlannedRun, load_grid
from effopd.compare.runner import DONE, Runner
from effopd.runs.records import EVALS

RECIPE = Path(__file__).parents[1] / "recipes" / "compare-testbed.yaml"


def grid(root: Path, name: str, steps: int, seeds: list[int], workers: int, clock: str) -> tuple[Grid, float]:
    """Run the small grid from scratch; return its plan and the elapsed seconds."""
    plan = load_grid(RECIPE)
    strategies = {key: {k: v for k, v in plan.strategies[key].items() if k == "effopd"} for key in ("plain", "effopd")}
    plan = dataclasses.replace(
        plan,
        output_dir=str(root / name),
        seeds=seeds,
        tasks=plan.tasks[:1],
        strategies=strategies,
        workers=workers,
        base=plan.base | {"max_steps": steps, "eval_steps": steps, "cost_clock": clock},
    )
    shutil.rmtree(plan.output_dir, ignore_errors=True)
    start = time.perf_counter()
    failed = Runner(plan, lambda event, run: print(f"  {event:<6} {run.name}", flush=True)).run(plan.runs())
    if failed:
        raise SystemExit(f"failed: {', '.join(run.name for run in failed)}")
    return plan, time.perf_counter() - start


def seconds(run: PlannedRun) -> float:
    return list(read_rows(run.path / EVALS))[-1]["cost/net_seconds"]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/compare-overhead"))
    arguments = parser.parse_args()
    made = {}
    for name, workers, clock in (("wall", 1, "wall"), ("alone", 1, "cpu"), ("together", 2, "cpu")):
        print(f"{name}: {workers} at a time, {clock} clock")
        made[name] = grid(arguments.out, name, arguments.steps, arguments.seeds, workers, clock)
    cost = {name: [seconds(run) for run in plan.runs()] for name, (plan, _) in made.items()}
    runs = made["alone"][0].runs()
    pairs = [(runs.index(a), runs.index(b)) for a in runs for b in runs
             if (a.strategy, b.strategy) == ("plain", "effopd") and a.seed == b.seed]  # fmt: skip
    ratios = {name: [values[a] / values[b] for a, b in pairs] for name, values in cost.items()}
    plan, elapsed = made["alone"]
    inside = sum(json.loads((run.path / DONE).read_text())["process_seconds"] for run in plan.runs())
    result = {
        "steps": arguments.steps,
        "runs": len(runs),
        "clock": spread([c / w for c, w in zip(cost["alone"], cost["wall"], strict=True)]),
        "neighbour": spread([t / a for t, a in zip(cost["together"], cost["alone"], strict=True)]),
        "ratio": spread([t / a for t, a in zip(ratios["together"], ratios["alone"], strict=True)]),
        "overhead": (elapsed - inside) / elapsed,
        "seconds": cost,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
