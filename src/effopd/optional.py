"""The one place that guards packages which may be missing, and says what to install."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from effopd.errors import MissingDependencyError

#: importable module -> (what needs it, what brings it)
_NEEDS = {
    "matplotlib": ("drawing figures", "effopd[plots]"),
    "math_verify": ("verifying math answers", "math-verify"),
    "reasoning_gym": ("reasoning-gym tasks", "reasoning-gym"),
}


def is_available(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str) -> ModuleType:
    """Import and return an optional module.

    Raises:
        MissingDependencyError: the module is not installed; the message gives the `pip install` line.
    """
    purpose, package = _NEEDS[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package '{module.partition('.')[0]}', which could not be imported ({error}). "
            f"Install it with: pip install '{package}'"
        ) from error
