"""The tiny student and teacher that ship with the package; `effopd.testbed` holds the recipe that
makes them.

The pair makes every claim of this package testable on two CPU cores in minutes. Importing this
module is light: no torch, no transformers.

Example:
    >>> from effopd.tasks.builtin_models import FAMILIES, student_path
    >>> sorted(FAMILIES)
    ['chain_sum', 'spell_backward']
    >>> (student_path() / "config.json").exists()
    True
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effopd.errors import CheckpointError, ConfigError, TaskError
from effopd.tasks.testbed_families import FAMILIES, family_task, verify

__all__ = [
    "FAMILIES",
    "card",
    "family_task",
    "reference_settings",
    "resolve_model",
    "spoken_name",
    "student_path",
    "teacher_path",
    "verify",
]

ASSETS = Path(__file__).parents[1] / "testbed" / "assets"

#: The reference run of plain on-policy distillation on this pair, as flags of
#: `trl.DistillationConfig`.
_REFERENCE: dict[str, Any] = {
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_train_batch_size": 256,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 24,
    "temperature": 1.0,
    "top_p": 1.0,
    "beta": 1.0,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "bf16": False,
    "activation_checkpointing": False,
}


def student_path() -> Path:
    """Folder of the shipped base student (Hugging Face format, fp32, with its tokenizer).

    Raises:
        CheckpointError: the package was installed without its assets.
    """
    return _asset("student")


def teacher_path() -> Path:
    """Folder of the shipped teacher: GRPO-tuned from the student, for both families.

    Raises:
        CheckpointError: the package was installed without its assets.
    """
    return _asset("teacher")


def resolve_model(name: str | None) -> str | None:
    """`testbed:student` and `testbed:teacher` as folders; every other name as it is.

    Raises:
        ConfigError: another name that begins with `testbed:`.
    """
    shipped = {"testbed:student": student_path, "testbed:teacher": teacher_path}
    if name is not None and name.startswith("testbed:") and name not in shipped:
        raise ConfigError(f"expected {' or '.join(shipped)}, got {name!r}.")
    return str(shipped[name]()) if name in shipped else name


def spoken_name(path: str) -> str:
    """The inverse of `resolve_model`: what a user calls the model in this folder."""
    return {str(ASSETS / name): f"testbed:{name}" for name in ("student", "teacher")}.get(path, path)


def card() -> dict[str, Any]:
    """How the shipped pair was made and what it measured: seed, versions, settings, seconds,
    accuracies, hashes.
    """
    return json.loads(_asset("card.json").read_text(encoding="utf-8"))


def reference_settings(family: str | None = None) -> dict[str, Any]:
    """Flags for `trl.DistillationConfig` with which plain distillation of the pair is the reference
    everywhere.

    `beta=1.0` is exact reverse KL. The card's `reference_opd` records what these settings measured.

    Args:
        family: a key of `FAMILIES`, or `None` for both mixed; the settings are the same for all.

    Raises:
        TaskError: an unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise TaskError(f"testbed family: expected one of {', '.join(FAMILIES)}, got {family!r}. Use one of these.")
    return dict(_REFERENCE)


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.exists():
        raise CheckpointError(
            f"the testbed's '{name}' is missing: expected {path}. Reinstall the package, or build the pair with: "
            f"effopd testbed build --output_dir {ASSETS}"
        )
    return path
