"""Decisions of twelve steps on the built-in pair: `python tests/golden/decisions.py` records them
anew, all or those of the named strategies.

Record only after a change that is meant to change a decision, and say so in docs/log.md.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

FILE = Path(__file__).with_name("decisions.json")
FAMILIES = ("chain_sum", "spell_backward")
#: Names of the strategies in the file → extra flags. Every strategy searches several times in
#: twelve steps.
STRATEGIES: dict[str, dict[str, object]] = {
    "none": {},
    "line_search": {"score_rollouts": 16},
    "newton_search": {"score_rollouts": 16},
    "effopd": {"validation_size": 24},
    "effopd-released": {"validation_size": 24},
    "noop": {"validation_size": 24},
    "fixed": {},
    "random_direction": {"validation_size": 24},
    "alpha_opd": {"validation_size": 24, "args": '{"every": 2, "until": 8}'},
    "relex": {"args": '{"every": 2, "until": 8}'},
}


#: Runs: all strategies on one family, those that search on rollouts of training on both.
RUNS = [
    (family, name)
    for family in FAMILIES
    for name in STRATEGIES
    if family == FAMILIES[0] or name in ("line_search", "newton_search")
]


def machine() -> dict[str, str]:
    """What the last digits of a forward pass depend on; `model` is that of the processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": capability, "model": _processor()}


def _processor() -> str:
    """Vendor, family and model number of the processor; empty without `/proc/cpuinfo`."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return " ".join(found.get(name, "") for name in ("vendor_id", "cpu family", "model")).strip()


def command(family: str, strategy: str, folder: Path) -> list[str]:
    """The command line of one run: 12 steps of 32 rollouts, seed 0, an evaluation every 4 steps."""
    flags = {
        "model_name_or_path": "testbed:student", "teacher_model_name_or_path": "testbed:teacher",
        "task": f"testbed:{family}", "train_size": 512, "eval_size": 32, "output_dir": folder,
        "max_steps": 12, "learning_rate": 3e-5, "seed": 0, "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32, "max_completion_length": 24, "activation_checkpointing": "false",
        "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": "true", "logging_steps": 1,
        "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true", "effopd.strategy": strategy,
    } | {f"effopd.{name}": value for name, value in STRATEGIES[strategy].items()}  # fmt: skip
    return ["effopd", "train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def decisions(family: str, strategy: str, folder: Path) -> dict[str, list]:
    """Run it; per search its scale and trials, per step the loss and the rate, per evaluation KL
    and accuracy.
    """
    with mock.patch.object(sys, "argv", command(family, strategy, folder)):
        try:
            runpy.run_module("effopd", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, end.code
    return {
        "searches": [
            {
                "step": row["step"],
                "scale": row["accepted_scale"],
                "best_scale": row["best_scale"],
                "trials": [[trial["scale"], trial.get("score")] for trial in row["trials"]],
            }
            for row in rows(folder / "searches.jsonl")
        ],
        "steps": [
            [row["step"], row["loss"], row["learning_rate"]] for row in rows(folder / "metrics.jsonl") if "loss" in row
        ],
        "evals": [[row["step"], row["eval_kl"], row["eval_accuracy"]] for row in rows(folder / "evals.jsonl")],
    }


def main() -> None:
    torch.set_num_threads(1)
    named = sys.argv[1:] or list(STRATEGIES)
    found = json.loads(FILE.read_text())["runs"] if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as folder:
        for family, strategy in RUNS:
            if strategy in named:
                found[f"{family}/{strategy}"] = decisions(family, strategy, Path(folder) / family / strategy)
    FILE.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
