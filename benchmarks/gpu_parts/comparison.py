"""Part `comparison`: plain distillation and the look-ahead at three learning rates each.

Several runs share the GPU, because sampling with transformers leaves most of it idle. Their steps
can be compared, their seconds cannot.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from effopd.runs.records import read_evaluations, read_searches
from gpu_parts.plan import ARMS, REHEARSAL
from gpu_parts.results import Results
from gpu_parts.teacher import QUESTIONS, TASK, TEST_QUESTIONS, make_teacher, student_folder

#: Runs at a time; each takes about 12 GB of GPU memory. 0: one after another in this process.
WORKERS = int(os.environ.get("GPU_WORKERS", "0" if REHEARSAL else "3"))
#: Longest answer in tokens.
TOKENS = 6 if REHEARSAL else 128
#: Seconds without which a run is not started, and seconds kept for reading the curves.
_LEAST, _KEPT = 45.0, 8.0
SETTINGS: dict[str, Any] = TASK | {
    "train_size": QUESTIONS, "eval_size": TEST_QUESTIONS, "max_steps": 2 if REHEARSAL else 24,
    "per_device_train_batch_size": 4 if REHEARSAL else 64, "per_device_eval_batch_size": TEST_QUESTIONS,
    "max_completion_length": TOKENS, "eval_strategy": "steps", "eval_steps": 2 if REHEARSAL else 4,
    "eval_on_start": True, "eval_greedy": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "seed": 0, "use_cpu": REHEARSAL,
}  # fmt: skip


def measure(results: Results, state: Path) -> None:
    """Make the teacher, then train the arms without a result; partial curves if the time is up."""
    student, teacher = student_folder(state), state / "teacher"
    results.run("teacher", lambda: make_teacher(student, teacher), least=_LEAST)
    if results.result("teacher") is None:
        return
    _free_gpu()
    arms = [arm for arm in ARMS if not results.content["units"].get(arm, {}).get("complete")]
    folders = {arm: fresh(state, arm) for arm in arms}
    commands = {arm: ["train", *flags(arm, student, teacher, folder)] for arm, folder in folders.items()}
    if WORKERS:
        pool(results, commands, folders, WORKERS)
    else:
        for arm, command in commands.items():
            results.run(arm, lambda command=command, folder=folders[arm]: _in_process(command, folder))


def _in_process(command: list[str], folder: Path) -> dict[str, Any]:
    from effopd.commands.main import main

    if status := main(command):
        raise RuntimeError(f"effopd {command[0]} ended with {status}.")
    return curve(folder)


def pool(results: Results, commands: dict[str, list[str]], folders: dict[str, Path], workers: int) -> None:
    """Run effopd's commands, at most `workers` at a time, until the deadline; store the curves."""
    waiting, running = list(commands), {}
    try:
        while results.deadline.remaining > _KEPT:
            for arm, (process, folder, start) in list(running.items()):
                if process.poll() is not None:
                    del running[arm]
                    _store(results, arm, folder, time.perf_counter() - start, process.returncode)
            while waiting and len(running) < workers and results.deadline.remaining > _LEAST:
                arm = waiting.pop(0)
                with folders[arm].with_suffix(".log").open("w") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "effopd", *commands[arm]], stdout=log, stderr=subprocess.STDOUT
                    )
                running[arm] = process, folders[arm], time.perf_counter()
            if not running:
                break
            time.sleep(0.2)
    finally:
        for process, _, _ in running.values():
            process.kill()
        for arm, (_, folder, start) in running.items():
            _store(results, arm, folder, time.perf_counter() - start, None)
        for arm in waiting:
            results.log(f"comparison: {arm}: left for the next call")


def _store(results: Results, arm: str, folder: Path, seconds: float, status: int | None) -> None:
    """Store a curve: complete (status 0), partial (`None`: stopped) or with the end of its log."""
    if status:
        log = folder.with_suffix(".log").read_text(errors="replace")
        results.content["units"][arm] = {"error": f"effopd train ended with {status}:\n{log[-4000:]}"}
        results.save()
        results.log(f"comparison: {arm}: FAILED\n{log[-2000:]}")
    elif curve(folder)["curve"] or status == 0:
        results.put(arm, curve(folder), seconds=seconds, complete=status == 0)


def fresh(state: Path, arm: str) -> Path:
    """An empty place for a run."""
    folder = state / "runs" / arm.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def flags(arm: str, student: Path, teacher: Path, folder: Path) -> list[str]:
    """Flags of `effopd train` for an arm."""
    rate, strategy = ARMS[arm]
    settings = SETTINGS | {
        "model_name_or_path": student, "teacher_model_name_or_path": teacher, "output_dir": folder,
        "learning_rate": rate, "effopd.strategy": strategy,
    }  # fmt: skip
    return [text for name, value in settings.items() for text in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def curve(folder: Path) -> dict[str, Any]:
    """The evaluations and searches of a run so far."""
    rate = [(search.step, search.accepted_scale, search.candidates) for search in read_searches(folder)]
    rows = [
        {
            "step": row.step, "kl": row.kl, "kl_se": row.kl_se, "accuracy": row.accuracy,
            "seconds": row.costs.net_seconds, "search_seconds": row.costs.search_seconds,
            "generated_tokens": row.costs.net_generated_tokens, "forward_tokens": row.costs.net_forward_tokens,
        }
        for row in read_evaluations(folder)
    ]  # fmt: skip
    return {"curve": rows, "searches": rate}


def _free_gpu() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
