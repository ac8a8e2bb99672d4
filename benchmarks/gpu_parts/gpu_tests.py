"""Part `tests`: `pytest -m gpu`, with the outcome of every test stored as it ends."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_parts.results import Results, device

ROOT = Path(__file__).parents[2]


class Recorder:
    """pytest plugin that stores the outcomes so far after every test."""

    def __init__(self, results: Results):
        self.results, self.tests, self._start = results, {}, time.perf_counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the call's outcome, and that of a setup or teardown that did not pass."""
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            row["message"] = str(report.longrepr)[-2000:]
        self.tests[report.nodeid.split("::", 1)[-1]] = row
        self.store(complete=False)

    def store(self, *, complete: bool) -> None:
        """Store the counts and the tests."""
        outcomes = [row["outcome"] for row in self.tests.values()]
        counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
        result = {**counts, "tests": self.tests}
        self.results.content["units"]["pytest"] = {
            "result": result, "complete": complete, "seconds": round(time.perf_counter() - self._start, 2),
        }  # fmt: skip
        self.results.save()


def measure(results: Results, state: Path, select: str = "") -> None:
    """Run the tests, unless all of them have run already.

    Args:
        select: pytest's `-k`.
    """
    del state
    if not results.content["units"].get("pytest", {}).get("complete"):
        device()
        # kernels of cuBLAS in one order, for the tests that compare two runs
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the machine's other plugins
        recorder = Recorder(results)
        arguments = [str(ROOT / "tests" / "gpu"), "-m", "gpu", "-q", "-c", str(ROOT / "pyproject.toml")]
        arguments += ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "no:xdist", "--override-ini=addopts="]
        arguments += ["--import-mode=importlib", "--strict-markers", *(["-k", select] if select else [])]
        status = pytest.main(arguments, plugins=[recorder])
        ran = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and bool(recorder.tests)
        recorder.store(complete=ran)
