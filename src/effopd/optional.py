"""The one place that guards optional packages and names the extra that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from effopd.errors import MissingDependencyError

#: importable module -> (what needs it, extra that brings it)
_EXTRAS = {
    "matplotlib": ("drawing figures", "plots"),
    "math_verify": ("verifying math answers", "math"),
    "reasoning_gym": ("reasoning-gym tasks", "tasks"),
    "peft": ("LoRA training", "peft"),
    "vllm": ("vLLM rollouts", "vllm"),
}


def is_available(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str) -> ModuleType:
    """Import and return an optional module.

    Raises:
        MissingDependencyError: the module is not installed; the message gives the `pip install` line.
    """
    purpose, extra = _EXTRAS[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package '{module.partition('.')[0]}', which could not be imported ({error}). "
            f"Install it with: pip install 'effopd[{extra}]'"
        ) from error
