"""Peak memory of a training run by method: every tensor that the run allocates beside the weights.

    python benchmarks/method_memory.py run     # docs/neighbours/memory.json, then the table
    python benchmarks/method_memory.py page    # the table of docs/neighbours.md only

Every method trains `STEPS` steps in a process of its own, with the same random pair on the CPU: two
Llama models of 20 million parameters and 49,152 tokens, 16 answers of 32 tokens per step. PyTorch's
profiler records every allocation of the CPU allocator; the peak is that of their running sum from
the start of training. So gradients, optimizer state, activations, logits and sampling count; the
weights, and what a process holds besides tensors, do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from memory_estimate import command, write_pair
from pages import DOCS, rewrite
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer

from effopd.commands.main import main as effopd
from effopd.common.files import write_atomically
from effopd.report.compare_lookup import table

RESULTS = DOCS / "neighbours" / "memory.json"
SIZE, ROWS, ANSWER, STEPS = "20M", 16, 32, 2
NEWTON = ["--effopd.strategy", "newton_search"]
#: Method → its flags; `{rollouts}` is the folder of stored answers.
METHODS: dict[str, list[str]] = {
    "full reverse KL": [],
    "full reverse KL + newton_search": NEWTON,
    "forward KL (β = 0)": ["--beta", "0"],
    "Jensen–Shannon (β = 0.5)": ["--beta", "0.5", "--normalize_beta", "true"],
    "Revisiting OPD": ["--loss_type", "teacher_top_k"],
    "sampled token": ["--loss_type", "sampled"],
    "vOPD": ["--loss_type", "sampled", "--baseline", "value"],
    "optimal baseline": ["--loss_type", "sampled", "--baseline", "optimal"],
    "8 samples per prefix": ["--loss_type", "sampled", "--samples_per_prefix", "8"],
    "fixed negative advantage": ["--loss_type", "negative_advantage"],
    "ESR, a quarter of the length": ["--rollout_horizon", "esr", "--horizon_tokens", str(ANSWER // 4)],
    "Lightning OPD": ["--rollouts", "{rollouts}"],
}


class Peak:
    """`Trainer.train` under the profiler; afterwards `bytes` is the peak of the run's tensors."""

    bytes = 0

    def __enter__(self) -> Peak:
        self._train = Trainer.train

        def profiled(trainer: Any, *given: Any, **named: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                result = self._train(trainer, *given, **named)
            changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
            now = 0
            for change in sorted(changes, key=lambda event: event.start_ns()):
                now += change.nbytes()
                self.bytes = max(self.bytes, now)
            return result

        Trainer.train = profiled
        return self

    def __exit__(self, *given: Any) -> None:
        Trainer.train = self._train


def store(folder: Path) -> None:
    """Write the pair's stored answers, by `effopd cache`."""
    flags = command(folder, checkpointing=False, rows=ROWS, answer=ANSWER)
    kept = ("--model_name_or_path", "--teacher_model_name_or_path", "--task", "--as_chat")
    pairs = [flag for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] in kept for flag in pair]
    more = ["--prompt_suffix", "", "--max_completion_length", str(ANSWER), "--output_dir", str(folder / "rollouts")]
    if status := effopd(["cache", *pairs, *more]):
        raise SystemExit(status)


def measure(method: str, folder: Path) -> None:
    """Train with a method in this process; print the peak in bytes."""
    torch.set_num_threads(1)
    flags = command(folder, checkpointing=False, rows=ROWS, answer=ANSWER)
    if "--rollouts" in METHODS[method]:
        at = flags.index("--teacher_model_name_or_path")
        del flags[at : at + 2]
    with Peak() as peak:
        status = effopd(["train", *flags, *(flag.format(rollouts=folder / "rollouts") for flag in METHODS[method])])
    if status:
        raise SystemExit(status)
    print("peak", peak.bytes)


def run(folder: Path) -> None:
    """Measure every method, each in a process of its own, and write `RESULTS`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_pair(folder, SIZE)
    store(folder)
    results = {}
    for method, more in METHODS.items():
        order = [sys.executable, __file__, "measure", "--method", method, "--folder", str(folder)]
        lines = subprocess.run(order, check=True, capture_output=True, text=True).stdout.splitlines()
        peak = int(next(line for line in lines if line.startswith("peak ")).split()[1])
        results[method] = {"peak_bytes": peak, "teacher": "--rollouts" not in more}
        print(f"{method}: {peak / 1e6:.0f} MB", flush=True)
        shutil.rmtree(folder / "run")
    weights = sum(path.stat().st_size for path in (folder / "student").glob("*.safetensors"))
    content = {"weights_bytes": weights, "rows": ROWS, "answer": ANSWER, "steps": STEPS, "methods": results}
    write_atomically(RESULTS, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    shutil.rmtree(folder)


def page() -> None:
    """Rewrite the table of docs/neighbours.md."""
    content = json.loads(RESULTS.read_text())
    plain = content["methods"]["full reverse KL"]["peak_bytes"]
    rows = [
        [
            method,
            f"{content['weights_bytes'] * (1 + measured['teacher']) / 1e6:.0f}",
            f"{measured['peak_bytes'] / 1e6:.0f}",
            f"{measured['peak_bytes'] / plain:.2f}×",
        ]
        for method, measured in content["methods"].items()
    ]
    columns = ["method", "weights of student and teacher, MB", "peak beside the weights, MB", "over full reverse KL"]
    rewrite(DOCS / "neighbours.md", {"memory": table(columns, rows)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "page", "measure"])
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("runs/method_memory"), help="scratch, deleted at the end")
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.method, given.folder)
        return
    if given.what == "run":
        run(given.folder)
    page()


if __name__ == "__main__":
    main()
