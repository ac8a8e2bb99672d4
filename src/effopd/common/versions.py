"""Versions of Python and packages, and a hash of this package's source."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from effopd.common.plugins import plugin_packages

#: Packages that affect a training run or an evaluation.
TRAINING = ("effopd", "torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym", "math-verify")
#: Packages that affect an analysis of weights.
ANALYSIS = ("effopd", "torch", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")


def versions(packages: Sequence[str] | None = None) -> dict[str, str]:
    """Versions of Python and of the packages; default: `TRAINING`, and packages with plugins."""
    found = {name: _version(name) for name in (TRAINING if packages is None else packages)}
    return {"python": platform.python_version()} | found | (plugin_packages() if packages is None else {})


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def code() -> str:
    """First 12 hex digits of the SHA-256 of this package's Python source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
