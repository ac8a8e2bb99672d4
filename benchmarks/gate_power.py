"""Power and false accepts of the paper's gate (`not_worse` on 50 answers) on real moves.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/gate_power.py [--seeds 0 1] [--out
    docs/gate_power.json]

At every search of `effopd` runs on the testbed, W + sΔ is scored for the paper's scales s = 2, 4,
…, 10. Backward moves (s = -2, -6, -10) are added to obtain moves that harm. Δ is the real update
since the last search. Each candidate answers `--searches` disjoint sets of 50 training prompts. The
gate compares it with W on the same set in two ways:

- shared noise: both sampled with the same random numbers, as in the package;
- fresh noise: each sampled with its own random numbers.

The true change in accuracy is the mean paired difference over all sets (500 answers by default).
Moves are grouped by it; near the edge of a group, the group is uncertain (`change_se`). False
accepts are the accepted share of moves that harm, power is that of moves that help. Training
continues with its own search. Takes about 7 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback

from effopd.commands.quickstart import quiet
from effopd.commands.quickstart_settings import QuickstartArguments, settings
from effopd.common.files import write_atomically
from effopd.common.statistics import accuracy_interval
from effopd.common.versions import versions
from effopd.distill.callback import EffOPDCallback
from effopd.extrapolate.search import Score, first_failure_search
from effopd.launch.opd import build_trainer
from effopd.report.compare_gate import gate_table
from effopd.report.compare_lookup import table
from effopd.tasks import builtin_models as testbed
from effopd.tasks.evaluate import evaluate
from effopd.tasks.sampling import Sampling
from effopd.tasks.testbed_families import family_task

FORWARDS, BACKWARDS = (2.0, 4.0, 6.0, 8.0, 10.0), (-2.0, -6.0, -10.0)
NOISES = ("shared", "fresh")
#: Edges of the groups of true changes in accuracy.
EDGES = (-0.075, -0.025, -0.005, 0.005, 0.025, 0.075)
SIZE = 50


class Measuring:
    """The run's scorer, which records the gate's decisions before every search."""

    def __init__(self, scorer, trainer, callback, where: dict[str, Any], count: int):
        self._scorer, self._trainer, self._callback, self._where = scorer, trainer, callback, where
        self.task = family_task(where["family"], "train", SIZE * count, seed=where["seed"] + 99)
        self.rows: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self._step = -1

    def __getattr__(self, name: str):
        return getattr(self._scorer, name)

    def __call__(self, model) -> Score:
        if self._step != self._trainer.state.global_step:
            self._step = self._trainer.state.global_step
            self._measure(model)
        return self._scorer(model)

    def _grades(self, model, scale: float, seed: int) -> np.ndarray:
        """Grades [set, prompt] of W + sΔ.

        One seed for all sets: every answer has its own noise, the same at every scale.
        """
        self._callback.look_ahead.weights.move_to(scale)
        result = evaluate(
            model,
            self._trainer.processing_class,
            self.task,
            Sampling(max_new_tokens=24, batch_size=10 * SIZE, seed=seed),
        )
        return np.array(result.correct, dtype=np.float64).reshape(-1, SIZE)

    def _measure(self, model) -> None:
        seed = 1000 * self._where["seed"] + self._step
        start = {"shared": self._grades(model, 0.0, seed), "fresh": self._grades(model, 0.0, seed + 500)}
        found = {scale: self._grades(model, scale, seed) for scale in (*BACKWARDS, *FORWARDS)}
        self._callback.look_ahead.weights.move_to(0.0)
        where = self._where | {"step": self._step}
        true = {0.0: 0.0}
        for scale, grades in found.items():
            paired = grades - start["shared"]
            true[scale] = float(paired.mean())
            row = where | {"scale": scale, "start_accuracy": float(start["shared"].mean()), "change": true[scale]}
            row |= {"change_se": float(paired.std(ddof=1) / paired.size**0.5), "searches": len(grades)}
            row["changed_grades"] = float((paired != 0).mean())
            for noise in NOISES:
                row[f"accepted_{noise}"] = int((grades.mean(1) >= start[noise].mean(1)).sum())
            self.rows.append(row)
        for noise in NOISES:
            taken = [
                first_failure_search(
                    lambda s, i=i, noise=noise: Score((found[s] if s else start[noise])[i].mean()), FORWARDS
                ).accepted_scale
                for i in range(len(start["shared"]))
            ]
            self.searches.append(
                where
                | {"noise": noise, "scales": taken, "change": float(np.mean([true[scale] for scale in taken]))}
                | {"best_change": max(true[scale] for scale in (0.0, *FORWARDS))}
            )


def measure_run(family: str, seed: int, count: int, steps: int) -> Measuring:
    """Train one `effopd` run on the testbed and measure its searches."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = QuickstartArguments(
            family=family, seed=seed, max_steps=steps, eval_steps=steps, eval_size=64, prompts_per_step=256
        )
        trainer = build_trainer(settings("effopd", arguments, Path(folder) / "run"))
        trainer.remove_callback(PrinterCallback)
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback))
        watch = Measuring(callback.scorer, trainer, callback, {"family": family, "seed": seed}, count)
        callback.scorer = watch
        trainer.train()
    return watch


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accepted shares of moves by their true change, overall and by run.

    The overall shares have Wilson's 95 % interval over searches.
    """
    groups = []
    for low, high in zip((-np.inf, *EDGES), (*EDGES, np.inf), strict=True):
        moves = [row for row in rows if low <= row["change"] < high]
        if not moves:
            continue
        runs = sorted({(row["family"], row["seed"]) for row in moves})
        row: dict[str, Any] = {
            "from": low if np.isfinite(low) else None,
            "to": high if np.isfinite(high) else None,
            "moves": len(moves),
            "mean_change": float(np.mean([r["change"] for r in moves])),
        }
        for noise in NOISES:
            searches, passed = (sum(r[key] for r in moves) for key in ("searches", f"accepted_{noise}"))
            interval = accuracy_interval([[i < passed] for i in range(searches)])
            by_run = [
                sum(r[f"accepted_{noise}"] for r in moves if (r["family"], r["seed"]) == run)
                / sum(r["searches"] for r in moves if (r["family"], r["seed"]) == run)
                for run in runs
            ]
            row |= {"searches": searches, noise: interval.mean, f"{noise}_ci95": [interval.low, interval.high]}
            row[f"{noise}_by_run"] = by_run
        groups.append(row)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(testbed.FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--searches", type=int, default=10, help="sets of 50 prompts per move")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps per run; searches at 1, 2, 4, 8, …")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rows: list[dict[str, Any]] = []
    searches: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for family in arguments.families:
            watch = measure_run(family, seed, arguments.searches, arguments.steps)
            rows += watch.rows
            searches += watch.searches
            print(f"{family}, seed {seed}: {len(watch.rows)} moves", flush=True)
            if arguments.out is not None:  # after every run
                results = {
                    "settings": {k: v for k, v in vars(arguments).items() if k != "out"} | {"validation_size": SIZE},
                    "versions": versions(("torch", "transformers", "numpy")),
                    "by_true_change": grouped(rows),
                    "moves": rows,
                    "whole_searches": searches,
                }
                text = json.dumps(results, indent=1) + "\n"
                write_atomically(arguments.out, lambda path, text=text: path.write_text(text))
    print(table(*gate_table(grouped(rows))))


if __name__ == "__main__":
    main()
