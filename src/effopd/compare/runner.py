"""Execution of a grid: one process per run, several runs in parallel, finished runs skipped.

A run is `effopd train --config RUN/settings.yaml`, so it can be repeated by hand. The files in its
folder show its state:

    settings.yaml   the run's settings
    rows            the run has started
    done.json       the run is finished; written last
    failed.json     the run ended with an error; removed by the next attempt

An interrupted run resumes from its newest checkpoint if there is one, and restarts otherwise.

Timing: each process is limited to `threads` CPU threads, so parallel runs share no core if
workers × threads is at most the number of cores. `cost_clock: cpu` in the plan's base charges CPU
seconds, which do not include the time of other processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from effopd.common.files import read_rows, write_atomically
from effopd.common.versions import code
from effopd.compare.grid import Grid, PlannedRun
from effopd.errors import CheckpointError
from effopd.runs.records import EVALS, METRICS, SEARCHES
from effopd.runs.run_dir import RunDir

SETTINGS, DONE, FAILED, LOG = "settings.yaml", "done.json", "failed.json", "log.txt"


def is_done(run: PlannedRun) -> bool:
    """Whether the run is finished with the settings of the plan.

    Raises:
        CheckpointError: the folder holds a run with other settings, whose rows must not be mixed
            with this plan's.
    """
    path = run.path / SETTINGS
    if path.is_file():
        recorded = yaml.safe_load(path.read_text())
        differing = sorted(
            key for key in {*recorded, *run.settings} - {"output_dir"} if recorded.get(key) != run.settings.get(key)
        )
        if differing:
            raise CheckpointError(
                f"{run.path} holds a run with other settings: {', '.join(differing)} differ from the plan. Choose "
                "another output_dir, or move that folder away. Nothing was changed."
            )
    return (run.path / DONE).is_file()


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Lock the grid against a second `effopd compare`; yields the lock's file descriptor.

    Runs inherit the descriptor, so a run that outlives a killed `effopd compare` keeps the lock.

    Raises:
        CheckpointError: another process is running this grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another `effopd compare`, or a run left behind by a killed one, is running in {folder}. "
                "Wait for it or stop it."
            ) from error
        yield handle.fileno()


class Runner:
    """Pool of workers that execute runs of a grid.

    Args:
        grid: plan with the number of workers, threads, devices and the launcher.
        report: called as `report(event, run)` with event 'start', 'done' or 'failed', and 'running'
            every `every` seconds; called from worker threads, one at a time.
        lock: file descriptor that runs inherit (`only_one`).
        every: seconds between two reports of a running run.
    """

    def __init__(
        self,
        grid: Grid,
        report: Callable[[str, PlannedRun], None] = lambda event, run: None,
        lock: int | None = None,
        every: float = 60.0,
    ):
        self._grid, self._report, self._inherit = grid, report, () if lock is None else (lock,)
        self._every = every
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(grid.workers):
            self._slots.put(slot)

    def run(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Run all of `runs`; returns the failed ones (see their `log.txt` for the reason)."""
        failed: list[PlannedRun] = []
        with ThreadPoolExecutor(self._grid.workers) as pool:
            futures = {pool.submit(self._one, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    if not future.result():
                        failed.append(futures[future])
            except BaseException:
                self._stop(pool)
                raise
        return failed

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        """Terminate the children; their runs resume or restart next time."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()
        pool.shutdown(cancel_futures=True)

    def _one(self, run: PlannedRun) -> bool:
        slot = self._slots.get()
        try:
            return self._in_slot(run, slot)
        finally:
            self._slots.put(slot)

    def _in_slot(self, run: PlannedRun, slot: int) -> bool:
        resume = prepare(run)
        started = time.time()
        with (run.path / LOG).open("ab") as log:
            earlier = log.tell()  # where the output of this attempt begins
            with self._lock:
                if self._stopped:
                    return False
                self._report("start", run)
                child = subprocess.Popen(
                    command(self._grid, run, resume), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env=environment(self._grid, slot), pass_fds=self._inherit,
                )  # fmt: skip
                self._children.add(child)
            status = self._wait(child, run)
        with self._lock:
            self._children.discard(child)
            if status == 0:
                record = {
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
                    "process_seconds": time.time() - started,
                    "code": code(),
                }
                write_atomically(run.path / DONE, lambda path: path.write_text(json.dumps(record) + "\n"))
            elif not self._stopped:
                failure = {"status": status, "error": error_message(run.path / LOG, earlier)}
                write_atomically(run.path / FAILED, lambda path: path.write_text(json.dumps(failure) + "\n"))
            if not self._stopped:
                self._report("done" if status == 0 else "failed", run)
        return status == 0

    def _wait(self, child: subprocess.Popen[bytes], run: PlannedRun) -> int:
        """Exit status of the child; reports 'running' now and then until it ends."""
        while True:
            try:
                return child.wait(self._every)
            except subprocess.TimeoutExpired:
                with self._lock:
                    if not self._stopped:
                        self._report("running", run)


def progress_of(run: PlannedRun) -> str:
    """How far a running run is: last logged step and last held-out KL."""
    steps, evaluations = list(read_rows(run.path / METRICS)), list(read_rows(run.path / EVALS))
    if not evaluations:
        return "loading"
    step = max([row["step"] for row in (*steps[-1:], *evaluations[-1:])])
    kl = evaluations[-1].get("eval_kl")
    return f"step {step} of {run.settings.get('max_steps', '?')}" + ("" if kl is None else f", held-out KL {kl:.4g}")


def prepare(run: PlannedRun) -> bool:
    """Prepare the run's folder; returns whether the run can resume from a checkpoint.

    Without a checkpoint, the rows of an earlier attempt are deleted.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / FAILED).unlink(missing_ok=True)
    write_atomically(run.path / SETTINGS, lambda path: path.write_text(yaml.safe_dump(run.settings, sort_keys=False)))
    if RunDir(run.path).last_checkpoint() is not None:
        return True
    for name in (METRICS, EVALS, SEARCHES):
        (run.path / name).unlink(missing_ok=True)
    shutil.rmtree(run.path / "trajectory", ignore_errors=True)
    return False


def failure_of(run: PlannedRun) -> str | None:
    """Error message of a run whose last attempt failed, otherwise `None`."""
    path = run.path / FAILED
    return json.loads(path.read_text())["error"] if path.is_file() else None


#: Start of the command's error messages; a progress bar may precede it on the same line.
_MESSAGE = "effopd train: "


def error_message(log: Path, start: int = 0) -> str:
    """First two lines of a failed run's error message, or the last line of its output.

    Args:
        log: the run's log file.
        start: byte offset where the output of the last attempt begins.
    """
    output = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    messages = [i for i, line in enumerate(lines) if _MESSAGE in line]
    if not messages:
        return lines[-1] if lines else "no output"
    first, *more = lines[messages[-1] : messages[-1] + 2]
    return " ".join([first[first.index(_MESSAGE) :], *more])


def command(grid: Grid, run: PlannedRun, resume: bool) -> list[str]:
    """Command line of a run."""
    start = (
        [*grid.launcher, "-m", "effopd.commands.main"]
        if grid.launcher
        else [sys.executable, "-m", "effopd.commands.main"]
    )
    resuming = ["--resume_from_checkpoint", "true"] if resume else []
    return [*start, "train", "--config", str(run.path / SETTINGS), *resuming]


def environment(grid: Grid, slot: int) -> dict[str, str]:
    """Environment of worker `slot`: this process's, with its threads and devices."""
    threads = grid.threads or max(1, (os.cpu_count() or 1) // grid.workers)
    variables: dict[str, Any] = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if grid.devices:
        variables["CUDA_VISIBLE_DEVICES"] = grid.devices[slot]
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}
