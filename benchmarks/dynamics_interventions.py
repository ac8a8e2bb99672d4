"""Analysis and interventions for docs/dynamics.md, on the runs of `dynamics_runs.py`.

    .venv/bin/python benchmarks/dynamics_interventions.py [--family chain_sum] [--seeds 0 1 2 3 4]
    [--only analyze alpha …]

`effopd analyze` writes all seeds to runs/dynamics/FAMILY/analysis. `effopd intervene` runs once per
seed, because each seed has its own teacher, and writes to runs/dynamics/FAMILY/interventions-SEED.
It samples one answer at temperature 1 for each of 400 held-out prompts; all points of a seed share
prompts and sampling noise. Finished work is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from effopd.commands.main import main as effopd

INTERVENTIONS: dict[str, list[str]] = {
    "trajectory": [],
    "alpha": [],
    "embedding": [],
    "swap": [],
    "window": ["--half_width", "0"],
    "rank": ["--rank_norm", "shared"],
    "norm_scaling": ["--early_steps", "4", "12", "32"],
    "random": [],
    "linearity": ["--scales", "2", "4", "8", "16"],
}
STEPS = 128


def run(arguments: list[str]) -> None:
    print("effopd", *arguments, flush=True)
    if effopd(arguments):
        raise SystemExit(1)


def analyze(root: Path, seeds: list[int]) -> None:
    trained = [flag for s in seeds for k in ("opd", "rl") for flag in ("--trained", f"{k}={root / f'{k}-{s}'}")]
    run(["analyze", "--base", "testbed:student", *trained, "--out", str(root / "analysis"), "--base_spectrum"])


def intervene(name: str, root: Path, family: str, seed: int) -> None:
    teacher = root / f"rl-{seed}" / "trajectory" / f"step-{STEPS:06d}"
    run(["intervene", name, *INTERVENTIONS[name], "--base", "testbed:student", "--teacher", str(teacher),
         "--trained", f"opd={root / f'opd-{seed}'}", f"rl={root / f'rl-{seed}'}",
         "--task", f"testbed:{family}", "--eval_size", "400", "--task_seed", "0", "--seed", str(seed),
         "--batch_size", "400", "--max_new_tokens", "24", "--out", str(root / f"interventions-{seed}")])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="chain_sum")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", choices=["analyze", *INTERVENTIONS], default=["analyze", *INTERVENTIONS])
    arguments = parser.parse_args()
    root = Path("runs/dynamics") / arguments.family
    for seed in arguments.seeds:
        for name in INTERVENTIONS:
            if name in arguments.only:
                intervene(name, root, arguments.family, seed)
    if "analyze" in arguments.only:
        analyze(root, arguments.seeds)


if __name__ == "__main__":
    main()
