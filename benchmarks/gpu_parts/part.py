"""Process of one part: `python -m gpu_parts.part PART STATE SECONDS`."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

from gpu_parts.plan import Deadline
from gpu_parts.results import Results

#: Part → module with a function `measure(results, state)`.
MODULES = {
    "tests": "gpu_parts.gpu_tests",
    "steps_random": "gpu_parts.steps",
    "steps_smollm2": "gpu_parts.steps",
    "comparison": "gpu_parts.comparison",
    "spectra": "gpu_parts.spectra_units",
}


def run_part(part: str, state: Path, seconds: float) -> Results:
    """Measure the unfinished units of a part; its results are in `state/results`."""
    results = Results(state / "results", part, Deadline(seconds))
    importlib.import_module(MODULES[part]).measure(results, state)
    return results


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    part, state, seconds = sys.argv[1:]
    results = run_part(part, Path(state), float(seconds))
    sys.exit(any("error" in entry for entry in results.content["units"].values()))


if __name__ == "__main__":
    main()
