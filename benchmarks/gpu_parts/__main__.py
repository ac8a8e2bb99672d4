"""Runs the unfinished parts one after another, each in a process with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_parts import results
from gpu_parts.model_pieces import receive
from gpu_parts.plan import PARTS, REHEARSAL, Deadline, allowed

#: Seconds kept at the end of a call for writing results.
_RESERVE = 10.0
LOG = "log.txt"


def run(asked: Sequence[str], out: Path, state: Path, seconds: float) -> list[str]:
    """Run parts until the time is up; return one line per part about its state.

    Raises:
        SystemExit: a name is not a part.
    """
    if unknown := set(asked) - {"receive", *PARTS}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; expected receive or some of {', '.join(PARTS)}.")
    deadline = Deadline(seconds - _RESERVE)
    stored = state / "results"
    for folder in (out, stored):
        folder.mkdir(parents=True, exist_ok=True)
    has_model = REHEARSAL or receive(Path(".gpu"), state, _log(out))
    lines = ["the model is there" if has_model else "the model is not complete"] if "receive" in asked else []
    pending = [part for part in PARTS if (part in asked or not asked) and (has_model or not PARTS[part].model)]
    pending = [part for part in pending if results.unfinished(stored, part)]
    for i, part in enumerate(pending):
        limit = allowed(part, pending[i + 1 :], deadline.remaining)
        if limit == 0.0:
            lines.append(f"{part}: no time left")
            continue
        status = _part(part, limit, out, state)
        _copy(stored, out)
        left = results.unfinished(stored, part)
        lines.append(f"{part}: {'finished' if not left else f'{status}; without a result: ' + ', '.join(left)}")
    waiting = [part for part in asked or PARTS if part in PARTS and PARTS[part].model and not has_model]
    lines += [f"{part}: waits for the model" for part in waiting]
    lines += [f"failed: {unit}" for unit in results.failed(stored, PARTS)]
    _copy(stored, out)
    return lines


def _part(part: str, limit: float, out: Path, state: Path) -> str:
    """Run a part; at its time limit, end all of its processes."""
    _log(out)(f"== {part}, at most {limit:.0f} s")
    with (out / LOG).open("a") as log:
        process = subprocess.Popen(
            command(part, state, limit - 5), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
            status = f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            _end(process)
    _log(out)(f"== {part}: {status}")
    return status


def command(part: str, state: Path, seconds: float) -> list[str]:
    """The process of a part."""
    return [sys.executable, "-m", "gpu_parts.part", part, str(state), f"{seconds:.0f}"]


def _end(process: subprocess.Popen) -> None:
    """End a process group: ask first, for the partial results, then kill what is left."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        end = time.monotonic() + 4
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)


def _copy(stored: Path, out: Path) -> None:
    for path in stored.glob("*.json"):
        shutil.copy(path, out / path.name)


def _log(out: Path):
    def log(text: str) -> None:
        print(text, flush=True)
        with (out / LOG).open("a") as file:
            print(text, file=file)

    return log


def main() -> None:
    out, state = Path(os.environ["OUT"]).resolve(), Path(os.environ["GPU_STATE"]).resolve()
    lines = run(sys.argv[1:], out, state, float(os.environ.get("GPU_SECONDS", "540")))
    tail = (out / LOG).read_text(errors="replace").splitlines()[-40:] if (out / LOG).exists() else []
    print("\n".join([*tail, "-- parts", *(lines or ["every part is finished"])]))


if __name__ == "__main__":
    main()
