"""The runs of docs/dynamics.md: reinforcement learning and on-policy distillation from one base.

    .venv/bin/python benchmarks/dynamics_runs.py [--family chain_sum] [--seeds 0 1 2 3 4] [--steps
    128]

For each seed, `effopd rl` (GRPO, the paper's preset) tunes the testbed's student on the family.
That RL model then teaches the same student with plain `effopd train`. This is the paper's setup, in
which the teacher is the RL-tuned version of the student's base. Both use the same questions,
learning rate, optimizer, number of steps and answers per step. Weights are saved every 4 steps in
runs/dynamics/FAMILY/{rl,opd}-SEED/trajectory/. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from effopd.commands.main import main as effopd
from effopd.runs.run_dir import RunDir
from effopd.tasks.builtin_models import reference_settings

EVERY, QUESTIONS, ANSWERS = 4, 4096, 256


def run(command: str, run_dir: RunDir, flags: dict) -> None:
    """Run one command, unless its run is finished."""
    reference = reference_settings()
    shared = {
        "model_name_or_path": "testbed:student", "train_size": QUESTIONS, "eval_size": ANSWERS, "trajectory": EVERY,
        "save_strategy": "no", "logging_steps": EVERY, "report_to": "none", "disable_tqdm": True,
        "output_dir": run_dir.root, "eval_strategy": "steps", "eval_steps": 16, "eval_on_start": True,
        "per_device_eval_batch_size": ANSWERS, **{name: value for name, value in reference.items() if name != "beta"},
        "per_device_train_batch_size": ANSWERS,
    }  # fmt: skip
    if run_dir.trajectory(flags["max_steps"]).exists():
        print(f"{run_dir.root}: finished before")
        return
    print(run_dir.root, flush=True)
    settings = shared | flags
    if effopd([command, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]):
        raise SystemExit(f"{run_dir.root} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="chain_sum")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=128)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        rl, opd = (RunDir(Path("runs/dynamics") / arguments.family / f"{kind}-{seed}") for kind in ("rl", "opd"))
        flags = {"task": f"testbed:{arguments.family}", "task_seed": seed, "seed": seed, "max_steps": arguments.steps}
        run("rl", rl, flags | {"algorithm": "grpo"})
        run("train", opd, flags | {"teacher_model_name_or_path": rl.trajectory(arguments.steps)})


if __name__ == "__main__":
    main()
