"""A served teacher against one in memory on the testbed: final KL, tail mass, bytes, scales.

    python benchmarks/served_teacher.py run     writes docs/served_teacher.json and the table
    python benchmarks/served_teacher.py serve   serves testbed:teacher on port 8000

The same run (testbed pair, chain_sum, `line_search`, 6 steps of 32 prompts, one seed) with the
teacher in memory and behind a server, for K = V, 64 and 8. The server is that of the tests, with
vLLM's protocol. The final KL is exact: the trained student against the teacher's logits,
on the same held-out prompts and sampling seed for every arm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.teacher_server import TeacherServer  # noqa: E402
from pages import rewrite  # noqa: E402

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer  # noqa: E402
from effopd.common.files import read_rows  # noqa: E402
from effopd.distill.evaluate_student import evaluate_trainer  # noqa: E402
from effopd.distill.served.trainer import ServedOPDTrainer  # noqa: E402
from effopd.tasks import TaskConfig, load_task  # noqa: E402
from effopd.tasks.builtin_models import student_path, teacher_path  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "served_teacher.json", ROOT / "docs" / "teachers.md"
STEPS, BATCH, LENGTH, RATE, SEED, HELD_OUT = 6, 32, 24, 3e-5, 0, 96


def load(folder: Path) -> Any:
    """A model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder).float()


def train(folder: Path, url: str | None, top_k: int | None) -> dict[str, Any]:
    """One arm: its trainer's costs and the exact KL of the trained student."""
    tokenizer = AutoTokenizer.from_pretrained(student_path())
    task = load_task(TaskConfig("testbed:chain_sum", train_size=1024), "train")
    more: dict[str, Any] = {} if url is None else {"teacher_server": url, "teacher_top_k": top_k}
    args = OPDConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, max_completion_length=LENGTH,
        learning_rate=RATE, seed=SEED, save_strategy="no", eval_strategy="no", use_cpu=True, report_to="none",
        activation_checkpointing=False, disable_tqdm=True, per_device_eval_batch_size=64, eval_greedy=False,
        health_tokens=0, **more,
    )  # fmt: skip
    common: dict[str, Any] = {"train_dataset": task.to_dataset(), "processing_class": tokenizer}
    trainer: Any = (
        OPDTrainer(load(student_path()), load(teacher_path()), args, **common)
        if url is None
        else ServedOPDTrainer(load(student_path()), args, **common)
    )
    trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig("line_search"), task=task))
    trainer.train()
    held_out = load_task(TaskConfig("testbed:chain_sum", eval_size=HELD_OUT), "eval")
    measured, _ = evaluate_trainer(trainer, held_out, load(teacher_path()))
    steps = list(read_rows(folder / "metrics.jsonl"))
    return {
        "final_kl": measured["kl"], "final_kl_se": measured["kl_se"],
        "losses": [row["loss"] for row in steps],
        "scales": [row["accepted_scale"] for row in read_rows(folder / "searches.jsonl")],
        "tail_mass": [row.get("served/tail_mass") for row in steps],
        "student_tail_mass": [row.get("served/student_tail_mass") for row in steps],
        "tail_kl": [row.get("served/tail_kl") for row in steps],
        "received_bytes": None if url is None else trainer.served.client.received_bytes,
        "teacher_tokens": trainer.costs.teacher_tokens,
        "vocab_size": trainer.vocab_size,
    }  # fmt: skip


def run() -> None:
    """All arms, the JSON file and the table."""
    arms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        arms["in memory"] = train(Path(root) / "local", None, None)
        size = arms["in memory"]["vocab_size"]
        tokenizer = AutoTokenizer.from_pretrained(teacher_path())
        for name, top_k in (("served, K = V", size), ("served, K = 64", 64), ("served, K = 8", 8)):
            with TeacherServer(load(teacher_path()), tokenizer, max_model_len=512) as server:
                arms[name] = train(Path(root) / f"k{top_k}", server.url, top_k)
            print(name, json.dumps(arms[name]), flush=True)
    RESULTS.write_text(json.dumps(arms, indent=1) + "\n")
    rewrite(PAGE, {"served teacher": table(arms)})


def table(arms: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| teacher | final exact KL (nats per token) | largest loss difference | teacher's mass in T, mean | "
        "student's, mean | received |",
        "|---|---|---|---|---|---|",
    ]
    local = arms["in memory"]
    for name, arm in arms.items():
        cells = ["–"] * 4
        if arm["received_bytes"] is not None:
            gap = max(abs(a - b) for a, b in zip(arm["losses"], local["losses"], strict=True))
            masses = (sum(arm[key]) / len(arm[key]) for key in ("tail_mass", "student_tail_mass"))
            cells = [f"{gap:.1e}", *(f"{mass:.1e}" for mass in masses), f"{arm['received_bytes'] / 1e6:.1f} MB"]
        lines.append(f"| {name} | {arm['final_kl']:.4f} ± {arm['final_kl_se']:.4f} | {' | '.join(cells)} |")
    jumps = ["", "Accepted scales:", ""]
    jumps += [f"- {name}: {', '.join(f'{scale:.4g}' for scale in arm['scales'])}" for name, arm in arms.items()]
    return "\n".join([*lines, *jumps])


def serve(port: int) -> None:
    """Serve the testbed's teacher until the process is interrupted."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())
    with TeacherServer(load(teacher_path()), tokenizer, max_model_len=512, port=port) as server:
        print(server.url, flush=True)
        server.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table", "serve"))
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    if given.what == "serve":
        serve(given.port)
    elif given.what == "table":
        rewrite(PAGE, {"served teacher": table(json.loads(RESULTS.read_text()))})
    else:
        run()
