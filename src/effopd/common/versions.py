"""Which software made a result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

#: Decide a training run or an evaluation.
TRAINING = ("effopd", "torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym", "math-verify")
#: Decide an analysis of weights.
ANALYSIS = ("effopd", "torch", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")


def versions(packages: Sequence[str] = TRAINING) -> dict[str, str]:
    """Versions of Python and of the packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code() -> str:
    """A short hash of this package's source: which state of the code made a result."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
