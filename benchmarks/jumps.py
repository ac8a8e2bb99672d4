"""Held-out KL and accuracy before and after each accepted jump.

    .venv/bin/python benchmarks/jumps.py runs/demo-chain_sum-0/effopd [RUN_DIR ...]

Reads `searches.jsonl` and `evals.jsonl` only. "Before" is the last evaluation at an earlier step,
up to `eval_steps` ordinary training steps before the jump. These steps lower the KL too, so the
listed change overstates the jump's effect.
"""

from __future__ import annotations

import sys
from pathlib import Path

from effopd.runs.records import read_evaluations, read_searches


def main(folders: list[str]) -> None:
    print("| run | step | scale | gate: start → accepted | KL before → after | accuracy before → after |")
    print("|---|---|---|---|---|---|")
    for folder in map(Path, folders):
        evaluations = read_evaluations(folder)
        for search in read_searches(folder):
            after = next((evaluation for evaluation in evaluations if evaluation.step == search.step), None)
            before = [evaluation for evaluation in evaluations if evaluation.step < search.step]
            if not search.accepted_scale or after is None:
                continue
            accepted = next(trial.score for trial in search.trials if trial.scale == search.accepted_scale)
            kl, accuracy = (before[-1].kl, after.kl), (before[-1].accuracy, after.accuracy)
            worse = " **worse**" if kl[1] > kl[0] else ""
            print(
                f"| {folder.parent.name}/{folder.name} | {search.step} | {search.accepted_scale:g} "
                f"| {search.start_score:.2f} → {accepted:.2f} | {kl[0]:.4f} → {kl[1]:.4f}{worse} "
                f"| {accuracy[0]:.3f} → {accuracy[1]:.3f} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
