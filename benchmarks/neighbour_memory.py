"""Peak memory of each method of docs/neighbours.md, with random models of 49,152 tokens.

    python benchmarks/neighbour_memory.py run     # docs/neighbours/memory.json, then the table
    python benchmarks/neighbour_memory.py page    # the table only

Every method of recipes/compare-neighbours.yaml trains two steps in a process of its own: a student
of 7 million parameters and a teacher of 66 million, in float32. A step has 8 answers of up to 48
tokens; horizons are scaled from 24 tokens to 48. The number is the largest resident memory of the
process (`ru_maxrss`), libraries included, and the larger of `REPEATS` runs. DisCorD is not
measured: a random teacher gives no correct answer, and its steps are those of Lightning OPD.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from neighbour_runs import DGRPO
from neighbours import METHODS, NEWTON, PARTS, PLACE, RECIPES
from pages import DOCS, rewrite
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effopd.common.files import write_atomically
from effopd.compare.grid import load_grid
from effopd.report.compare_lookup import table
from effopd.tasks.builtin_models import student_path

RESULTS = PLACE / "memory.json"
STEPS, BATCH, LENGTH, VOCABULARY = 2, 8, 48, 49152
#: Runs of each method: the system can reclaim memory of mapped files, so one run can look small.
REPEATS = 2
#: Role → hidden size, layers and seed of a random model.
MODELS = {"student": (128, 2, 0), "teacher": (768, 3, 1), "second-teacher": (768, 3, 2)}
#: Settings that every run takes instead of the plan's.
SHARED = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "max_completion_length": LENGTH, "eval_strategy": "no",
    "eval_on_start": False, "train_size": BATCH * STEPS, "task": "testbed:chain_sum", "learning_rate": 1e-5,
    "health_tokens": 0,
}  # fmt: skip
#: Settings in tokens, scaled from the plan's `max_completion_length` to `LENGTH`.
TOKENS = ("horizon_tokens", "prune_start_length", "prune_min_length", "prune_step", "prune_margin")


def build(folder: Path) -> None:
    """Write the random models."""
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    for name, (width, layers, seed) in MODELS.items():
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def settings_of(arm: Mapping[str, Any], base: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of an arm's run with the random models and their stored answers."""
    ours = {name: value for name, value in arm.items() if name not in ("learning_rate_factors", "variant_of")}
    ours |= {name: round(ours[name] * LENGTH / base["max_completion_length"]) for name in TOKENS if name in ours}
    models = {f"{prefix}model_name_or_path": str(folder / role) for prefix, role in _ROLES.items()}
    if "rollouts" in ours:
        ours |= {"rollouts": str(folder / "stored"), "evaluation_teacher": False, "charge_rollouts": False}
        del models["teacher_model_name_or_path"]
    if "traces" in ours:
        ours |= {"traces": str(folder / "stored"), "charge_rollouts": False}
    if "curriculum_teachers" in ours:
        ours["curriculum_teachers"] = [str(folder / role) for role in ("second-teacher", "teacher")]
    return {**base, **models, **ours, **SHARED}


_ROLES = {"": "student", "teacher_": "teacher"}


def peak(command: list[str], log: Path) -> float:
    """Largest resident memory of a process in MB.

    Raises:
        SystemExit: it failed.
    """
    with log.open("wb") as file:
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-m", "effopd.commands.main", *command], os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"effopd {' '.join(command)}: status {status}.\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss * 1024 / 1e6


def run() -> None:
    """Measure every arm; write `RESULTS`."""
    grid, peaks = load_grid(RECIPES / f"{PARTS[0].plan}.yaml"), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(folder)
        cache = [
            "cache", "--model_name_or_path", str(folder / "student"), "--teacher_model_name_or_path",
            str(folder / "teacher"), "--task", SHARED["task"], "--train_size", str(BATCH * STEPS), "--seed", "0",
            "--max_completion_length", str(LENGTH), "--batch_size", str(BATCH), "--output_dir", str(folder / "stored"),
        ]  # fmt: skip
        peaks["collection"] = peak(cache, folder / "log")
        arms = dict(grid.strategies)
        arms[DGRPO] = {"algorithm": "dgrpo", "num_generations": 8}
        for name, arm in arms.items():
            if name == "discord" or name.endswith(NEWTON):
                continue
            values = settings_of(arm, grid.base, folder) | {"output_dir": str(folder / "run")}
            (folder / "settings.yaml").write_text(yaml.safe_dump(values))
            command = "rl" if name == DGRPO else "train"
            found = []
            for _ in range(REPEATS):
                found.append(peak([command, "--config", str(folder / "settings.yaml")], folder / "log"))
                shutil.rmtree(folder / "run")
            peaks[name] = max(found)
            print(f"{name}: {', '.join(f'{each:.0f}' for each in found)} MB", flush=True)
    text = json.dumps({name: round(value) for name, value in peaks.items()}, indent=1) + "\n"
    write_atomically(RESULTS, lambda path: path.write_text(text))


def memory_table() -> str:
    """Per method: peak memory, and its difference to plain OPD."""
    peaks = json.loads(RESULTS.read_text())
    names = {method.arm: method.name for method in METHODS}
    names |= {"newton_search": f"{names['plain']} + newton_search", "collection": "collecting for Lightning OPD"}
    rows = [
        [name, f"{peaks[arm]:,}", f"{peaks[arm] - peaks['plain']:+,}"] for arm, name in names.items() if arm in peaks
    ]
    return table(["method", "peak MB", "over plain OPD, MB"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "page"])
    if parser.parse_args().what == "run":
        run()
    rewrite(DOCS / "neighbours.md", {"memory": memory_table()})
