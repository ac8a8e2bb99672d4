"""Online against offline distillation on the testbed: teacher tokens, sampled tokens and memory.

    python benchmarks/offline.py run --seed 0 [--learning_rate 2e-4]  appends to docs/offline.json
    python benchmarks/offline.py memory                               one process per arm

Both arms minimize the reverse KL by the sampled-token policy gradient, from the built-in student,
with the same rate, batch and number of steps. The online arm samples and calls the teacher at every
step. The offline arm collects rollouts once and passes over them several times. The exact KL to the
teacher on held-out prompts is measured outside the ledgers, with a teacher that is loaded for this
measurement only. `memory` trains two steps with a random teacher of about 150 MB, because the
built-in one is smaller than the noise of a process's memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from effopd import OPDConfig, OPDTrainer
from effopd.distill.evaluate_student import evaluate_task
from effopd.distill.offline_cache import collect
from effopd.distill.offline_store import Header, ModelIdentity, RolloutStore, prompts_sha256
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.models.fingerprint import tokenizer_sha256
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.builtin_models import student_path, teacher_path
from effopd.tasks.generate import encode_prompts

RESULTS = Path(__file__).parents[1] / "docs" / "offline.json"
FAMILY, LENGTH, BATCH, STEPS, EVERY, HELD_OUT = "testbed:chain_sum", 24, 64, 12, 4, 96
#: Stored rollouts: with 12 steps of 64, every rollout is used four times.
STORED = 192


def settings(folder: Path, seed: int, rate: float, **more: Any) -> OPDConfig:
    """Settings shared by the arms."""
    values: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "max_completion_length": LENGTH, "seed": seed,
        "learning_rate": rate, "loss_type": "sampled", "save_strategy": "no", "eval_strategy": "no", "use_cpu": True,
        "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True, "per_device_eval_batch_size": 64,
        "eval_greedy": False, "health_tokens": 0,
    }  # fmt: skip
    return OPDConfig(output_dir=str(folder), **(values | more))


def load(folder: Path) -> Any:
    """A model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder).float()


def stored(
    folder: Path, student: Any, teacher: Any, tokenizer: Any, task: Any, seed: int, batch_size: int
) -> RolloutStore:
    """One answer of `student` per prompt of `task`, scored by `teacher`."""
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.examples])
    header = Header(
        teacher=ModelIdentity("teacher", None, "-"), student=ModelIdentity("student", None, "-"), sft_teacher=None,
        tokenizer=tokenizer_sha256(tokenizer), vocab_size=len(tokenizer), temperature=1.0,
        max_completion_length=LENGTH, seed=seed, batch_size=batch_size, dtype="float32", top_k=0, prompts=len(prompts),
        prompts_sha256=prompts_sha256(prompts), rows_per_file=len(prompts),
    )  # fmt: skip
    store = RolloutStore(folder)
    store.open(header)
    collect(store, header, student.eval(), teacher, tokenizer, task)
    return store


class Curve(TrainerCallback):
    """Held-out KL and the tokens spent so far, at step 0 and every `EVERY` steps."""

    def __init__(self, trainer: Any, task: Any, before: dict[str, int]):
        self._trainer, self._task, self._before = trainer, task, before
        self._teacher = load(teacher_path()).eval()
        self.rows: list[dict[str, float]] = []

    def measure(self, step: int) -> None:
        """Append a row."""
        trainer, ledger = self._trainer, self._trainer.ledger.snapshot()
        with trainer.ledger.paused():
            metrics, _ = evaluate_task(
                trainer.model, self._teacher, trainer.text_tokenizer, self._task, trainer.args,
                vocab_size=trainer.vocab_size, autocast=nullcontext,
            )  # fmt: skip
        teacher = ledger["cost/teacher_forward_tokens"] + self._before.get("teacher", 0)
        sampled = ledger["cost/rollout_generated_tokens"] + self._before.get("sampled", 0)
        row = {"step": step, "kl": metrics["kl"], "kl_se": metrics["kl_se"], "accuracy": metrics["accuracy"]}
        self.rows.append(row | {"teacher_tokens": teacher, "sampled_tokens": sampled})
        print(self.rows[-1], flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the start."""
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        """Measure every `EVERY` steps."""
        if state.global_step % EVERY == 0:
            self.measure(state.global_step)


def trainer_of(
    arm: str, folder: Path, seed: int, rate: float, teacher: Any, **more: Any
) -> tuple[Any, dict[str, int]]:
    """The arm's trainer, and the tokens that collecting cost."""
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    task = load_task(TaskConfig(task=FAMILY, train_size=STORED if arm == "offline" else STEPS * BATCH), "train")
    if arm == "online":
        args = settings(folder, seed, rate, **more)
        data = task.to_dataset()
        trainer = OPDTrainer(load(student_path()), teacher, args, train_dataset=data, processing_class=tokenizer)
        return trainer, {}
    rollouts = folder.parent / f"rollouts-{seed}"
    store = RolloutStore(rollouts)
    if not store.started:
        store = stored(rollouts, load(student_path()), teacher, tokenizer, task, seed, BATCH)
    costs = store.read()[1]
    args = settings(folder, seed, rate, rollouts=str(rollouts), **more)
    trainer = OfflineOPDTrainer(load(student_path()), args, processing_class=tokenizer)
    return trainer, {"teacher": costs.teacher_forward_tokens, "sampled": costs.generated_tokens}


def run(seed: int, rate: float) -> None:
    """Train both arms and append their curves to `RESULTS`."""
    held_out = load_task(TaskConfig(task=FAMILY, eval_size=HELD_OUT), "eval")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        for arm in ("offline", "online"):
            trainer, before = trainer_of(arm, Path(scratch) / arm, seed, rate, load(teacher_path()))
            curve = Curve(trainer, held_out, before)
            trainer.add_callback(curve)
            trainer.train()
            drift = [row["offline/ratio_mean"] for row in trainer.state.log_history if "offline/ratio_mean" in row]
            spread = [row["offline/ratio_std"] for row in trainer.state.log_history if "offline/ratio_std" in row]
            row = {"arm": arm, "seed": seed, "learning_rate": rate, "stored": STORED, "curve": curve.rows}
            results.append(row | {"ratio_mean": drift, "ratio_std": spread})
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def memory_arm(arm: str, folder: Path) -> None:
    """Train two steps in this process; print its peak memory in MB."""
    config = AutoConfig.from_pretrained(teacher_path())
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 3072, 5
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    big = AutoModelForCausalLM.from_config(config) if arm != "offline" else None
    trainer, _ = trainer_of(arm.removeprefix("collect-"), folder, 0, 1e-5, big, max_steps=2)
    if arm != "collect-offline":
        trainer.train()
    size = 0 if big is None else sum(p.numel() * p.element_size() for p in big.parameters()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"arm": arm, "peak_mb": peak, "teacher_mb": size}))


def memory() -> None:
    """Peak memory of both arms, each in its own process; the rollouts are collected before."""
    with tempfile.TemporaryDirectory() as scratch:
        for arm in ("collect-offline", "offline", "online"):
            command = [sys.executable, __file__, "memory-arm", "--arm", arm, "--folder", f"{scratch}/{arm}"]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            print(lines[-1], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "memory", "memory-arm"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--arm", default="online")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    given = parser.parse_args()
    if given.what == "run":
        run(given.seed, given.learning_rate)
    elif given.what == "memory":
        memory()
    else:
        memory_arm(given.arm, given.folder)
