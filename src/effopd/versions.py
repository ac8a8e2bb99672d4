"""Which software made a result."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

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
