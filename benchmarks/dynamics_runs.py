"""The runs behind docs/dynamics.md: reinforcement learning and on-policy distillation from one base, step by step.

    .venv/bin/python benchmarks/dynamics_runs.py [--family chain_sum] [--seeds 0 1 2 3 4] [--steps 128]

For each seed: GRPO tunes the testbed's student on the family (`rl`), then that seed's own RL model teaches the same
student by plain on-policy distillation (`opd`): the paper's set-up, where the teacher is the RL-tuned version of the
student's base. Both go over the same questions with the same learning rate, optimizer, number of steps and answers a
step. Weights are kept every 4 steps in runs/dynamics/FAMILY/{rl,opd}-SEED/trajectory/. A finished run is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from effopd.cli import main as effopd
from effopd.distill.run_dir import RunDir, in_trajectory
from effopd.testbed import family_task, reference_settings, student_path
from effopd.testbed.rl import RLSettings, train_teacher

EVERY, QUESTIONS, ANSWERS = "4", 4096, 256


class KeepWeights(TrainerCallback):
    """The trajectory of a run whose trainer does not write one."""

    def __init__(self, run_dir: RunDir, tokenizer):
        self.run_dir, self.tokenizer = run_dir, tokenizer

    def keep(self, state, model) -> None:
        staged = self.run_dir.fresh_staging() / "trajectory"
        model.save_pretrained(staged)
        self.tokenizer.save_pretrained(staged)
        self.run_dir.publish(staged, self.run_dir.trajectory(state.global_step))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.keep(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if in_trajectory(EVERY, state.global_step, state.max_steps):
            self.keep(state, model)


def run_rl(out: Path, family: str, seed: int, steps: int) -> None:
    """GRPO with the testbed recipe's settings, but the learning rate and the answers a step of the distillation."""
    model = AutoModelForCausalLM.from_pretrained(student_path())
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    settings = RLSettings(
        steps=steps,
        prompts_per_step=ANSWERS // RLSettings.num_generations,
        learning_rate=reference_settings()["learning_rate"],
    )
    examples = family_task(family, "train", QUESTIONS, seed).examples
    train_teacher(model, tokenizer, examples, settings, seed, callbacks=[KeepWeights(RunDir(out), tokenizer)])


def run_opd(out: Path, teacher: Path, family: str, seed: int, steps: int) -> None:
    """`effopd train`, plain."""
    reference = reference_settings() | {"per_device_train_batch_size": ANSWERS}
    flags = {
        "model_name_or_path": "testbed:student", "teacher_model_name_or_path": teacher, "task": f"testbed:{family}",
        "train_size": QUESTIONS, "task_seed": seed, "seed": seed, "max_steps": steps, "trajectory": EVERY,
        "save_strategy": "no", "output_dir": out, "logging_steps": 16, **reference,
    }  # fmt: skip
    status = effopd(["train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    if status:
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="chain_sum")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=128)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        rl, opd = (RunDir(Path("runs/dynamics") / arguments.family / f"{kind}-{seed}") for kind in ("rl", "opd"))
        for run, start in (
            (rl, lambda rl=rl, seed=seed: run_rl(rl.root, arguments.family, seed, arguments.steps)),
            (opd, lambda rl=rl, opd=opd, seed=seed: run_opd(
                opd.root, rl.trajectory(arguments.steps), arguments.family, seed, arguments.steps)),
        ):  # fmt: skip
            if run.trajectory(arguments.steps).exists():
                print(f"{run.root}: finished before")
            else:
                print(f"{run.root}", flush=True)
                start()


if __name__ == "__main__":
    main()
