"""Why stored answers stop helping: reuse, staleness, or the learning rate.

    python benchmarks/offline_reuse.py run     # docs/offline_reuse.json, then the table
    python benchmarks/offline_reuse.py page    # the table of docs/offline.md only

Every arm takes `STEPS` steps of `BATCH` answers on the built-in pair, with the sampled-token loss.
The arms differ in the number of stored answers, and so in passes; in their age; and in the rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from offline import FAMILY, load, settings, stored
from pages import DOCS, rewrite
from transformers import AutoTokenizer, TrainerCallback

from effopd import OPDTrainer
from effopd.common.files import write_atomically
from effopd.distill.evaluate_student import evaluate_task
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.report.compare_lookup import table
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.builtin_models import student_path, teacher_path

RESULTS = DOCS / "offline_reuse.json"
BATCH, STEPS, EVERY, HELD_OUT = 32, 48, 8, 96


class Arm(NamedTuple):
    """An arm: its rate, and the stored answers of each phase; phases share the steps equally.

    Without phases the arm samples at every step. Later phases store answers of the current student.
    """

    name: str
    rate: float
    phases: tuple[int, ...] = ()


ARMS = (
    Arm("online", 3e-4),
    Arm("stored once, used once", 3e-4, (1536,)),
    Arm("stored once, used 3 times", 3e-4, (512,)),
    Arm("stored twice, each used 3 times", 3e-4, (256, 256)),
    Arm("online, lower rate", 1e-4),
    Arm("stored once, used 3 times, lower rate", 1e-4, (512,)),
)


class Evaluations(TrainerCallback):
    """Held-out KL and accuracy every `EVERY` steps of the arm."""

    def __init__(self, teacher: Any, task: Any):
        self.trainer: Any = None
        self.before = 0
        self._teacher, self._task = teacher, task
        self.rows: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Append a row."""
        step = self.before + state.global_step
        if step % EVERY == 0:
            trainer = self.trainer
            with trainer.ledger.paused():
                metrics, _ = evaluate_task(
                    trainer.model, self._teacher, trainer.text_tokenizer, self._task, trainer.args,
                    vocab_size=trainer.vocab_size, autocast=nullcontext,
                )  # fmt: skip
            self.rows.append({"step": step, **{name: metrics[name] for name in ("kl", "kl_se", "accuracy")}})


def run(arm: Arm, seed: int, scratch: Path) -> dict[str, Any]:
    """Train an arm; JSON-ready row with its curve, teacher tokens and the spread of π_θ/π_ref."""
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    model, teacher = load(student_path()), load(teacher_path()).eval()
    watch = Evaluations(teacher, load_task(TaskConfig(task=FAMILY, eval_size=HELD_OUT), "eval"))
    parts, tokens, spread = max(1, len(arm.phases)), 0, []
    steps = STEPS // parts
    for phase in range(parts):
        size = arm.phases[phase] if arm.phases else STEPS * BATCH
        task = load_task(TaskConfig(task=FAMILY, train_size=size, task_seed=100 * phase + seed), "train")
        folder = scratch / f"{arm.name}-{seed}-{phase}"
        more = {"max_steps": steps, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": HELD_OUT}
        trainer: Any
        if arm.phases:
            store = stored(folder / "rollouts", model, teacher, tokenizer, task, seed, BATCH)
            tokens += store.read()[1].teacher_forward_tokens
            args = settings(folder, seed, arm.rate, rollouts=str(folder / "rollouts"), **more)
            trainer = OfflineOPDTrainer(model, args, processing_class=tokenizer)
        else:
            args = settings(folder, seed, arm.rate, **more)
            trainer = OPDTrainer(model, teacher, args, train_dataset=task.to_dataset(), processing_class=tokenizer)
        watch.trainer, watch.before = trainer, phase * steps
        trainer.add_callback(watch)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        tokens += 0 if arm.phases else trainer.ledger.snapshot()["cost/teacher_forward_tokens"]
        spread += [row["offline/ratio_std"] for row in trainer.state.log_history if "offline/ratio_std" in row]
    return {"arm": arm.name, "seed": seed, "curve": watch.rows, "teacher_tokens": tokens, "ratio_std": spread}


def blocks(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The page's table: final KL, accuracy and teacher tokens of every arm, medians over seeds."""
    lines = []
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm.name]
        if not mine:
            continue
        finals = [statistics.mean(point["kl"] for point in row["curve"][-2:]) for row in mine]
        spread = f" ({min(finals):.4f} to {max(finals):.4f})" if len(mine) > 1 else ""
        lowest = [min(row["curve"], key=lambda point: point["kl"]) for row in mine]
        spreads = [max(row["ratio_std"]) for row in mine if row["ratio_std"]]
        lines.append([
            arm.name, f"{arm.rate:.0e}", str(len(mine)), f"{sum(arm.phases) or STEPS * BATCH:,}",
            f"{statistics.median(row['teacher_tokens'] for row in mine):,.0f}",
            f"{statistics.median(finals):.4f}{spread}",
            f"{statistics.median(point['kl'] for point in lowest):.4f}",
            f"{statistics.median(point['step'] for point in lowest):.0f}",
            f"{statistics.median(row['curve'][-1]['accuracy'] for row in mine):.2f}",
            f"{statistics.median(spreads):.2f}" if spreads else "",
        ])  # fmt: skip
    head = ["arm", "rate", "seeds", "answers", "teacher tokens", "KL at the end", "lowest KL", "at step", "accuracy"]
    return {"reuse": table([*head, "largest std of π_θ/π_ref"], lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="run: seeds to add")
    parser.add_argument("--only", default="", help="run: only arms whose name contains this text")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if arguments.what == "run":
        with tempfile.TemporaryDirectory() as scratch:
            for seed in arguments.seeds:
                for arm in ARMS:
                    if arguments.only in arm.name and not any(
                        (row["arm"], row["seed"]) == (arm.name, seed) for row in rows
                    ):
                        rows.append(run(arm, seed, Path(scratch)))
                        print(rows[-1], flush=True)
                        write_atomically(RESULTS, lambda path: path.write_text(json.dumps(rows) + "\n"))
    rewrite(DOCS / "offline.md", blocks(rows))


if __name__ == "__main__":
    main()
