"""LoRA flags: the adapter's PEFT configuration, and its checks against a model without weights."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from effopd.errors import ConfigError

_PLAIN = re.compile(r"[\w.-]+")


def adapter_config(model: ModelConfig) -> Any:
    """PEFT configuration of the flags; `None` without `use_peft`.

    A single plain target name is passed to PEFT as a set of one. TRL passes it as a string, which
    PEFT would match as a regular expression against the whole module name. A string that is not a
    plain name stays a regular expression.

    Raises:
        ConfigError: PEFT rejects the settings.
    """
    if not model.use_peft:
        return None
    try:
        config = get_peft_config(model)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--use_peft true: {' '.join(str(error).split())}") from error
    one = model.lora_target_modules
    if isinstance(one, str) and one != "all-linear" and _PLAIN.fullmatch(one):
        config.target_modules = {one}
    return config


def check_adapter(model: ModelConfig, student: PreTrainedModel) -> int | None:
    """Check that the names in the LoRA flags exist in the student and exclude its head.

    Args:
        student: a model on the meta device. PEFT modifies it.

    Returns:
        Number of parameters that the adapter trains; `None` without `use_peft`.

    Raises:
        ConfigError: the student lacks a name, PEFT cannot adapt a module, or the head is adapted.
    """
    config = adapter_config(model)
    if config is None:
        return None
    modules = [name for name, _ in student.named_modules() if name]
    for flag, names in (
        ("--lora_target_modules", config.target_modules),
        ("--lora_modules_to_save", config.modules_to_save),
    ):
        if names is not None and not isinstance(names, str):
            for name in names:
                if not any(module == name or module.endswith(f".{name}") for module in modules):
                    hint = _close(name, modules, _adaptable(student))
                    raise ConfigError(f"{flag}: the model has no module {name!r}. {hint}")
    parameters = [name for name, _ in student.named_parameters()]
    for name in config.target_parameters or ():
        if not any(parameter == name or parameter.endswith(f".{name}") for parameter in parameters):
            raise ConfigError(
                f"--lora_target_parameters: the model has no parameter {name!r}. {_close(name, parameters)}"
            )
    return _trained(_checked_by_peft(config, student, modules))


def _checked_by_peft(config: Any, student: PreTrainedModel, modules: list[str]) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        adapted = _adapted(config, student)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, re.error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--lora_target_modules {_shown(config)}: {reason[:300]} Expected names of linear layers, such as "
            f"{', '.join(_last_names(modules)[:8])}."
        ) from error
    head = adapted.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            f"--lora_target_modules {_shown(config)} includes the output head. The loss reads the head's weights "
            "directly, so an adapter on it is not trained. Leave the head out."
        )
    return adapted


def trained_parameters(config: Any, student: PreTrainedModel) -> int:
    """Number of parameters that an adapter trains.

    Args:
        config: PEFT configuration.
        student: a model on the meta device. PEFT modifies it.
    """
    return _trained(_adapted(config, student))


def _adapted(config: Any, student: PreTrainedModel) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return get_peft_model(student, config)


def _trained(adapted: Any) -> int:
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _shown(config: Any) -> str:
    names = config.target_modules
    return names if isinstance(names, str) else " ".join(sorted(names or ()))


def _last_names(modules: Iterable[str]) -> list[str]:
    """Distinct last parts of module names that occur more than once, without numbers."""
    last = [name.rpartition(".")[2] for name in modules]
    return [name for name in dict.fromkeys(last) if last.count(name) > 1 and not name.isdecimal()]


def _adaptable(student: PreTrainedModel) -> list[str]:
    """Distinct last parts of the names of modules with a matrix, without embeddings and head."""
    head = student.get_output_embeddings()
    found = [
        name.rpartition(".")[2]
        for name, module in student.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not isinstance(module, torch.nn.Embedding)
        and module is not head
    ]
    return list(dict.fromkeys(found))


def _close(name: str, names: Iterable[str], usual: Iterable[str] = ()) -> str:
    """Sentence with the names that are similar; if there are none, with the usual ones.

    Args:
        usual: last parts of names; empty: those of `names`.
    """
    last = list(dict.fromkeys(part.rpartition(".")[2] for part in names if not part.rpartition(".")[2].isdecimal()))
    if close := difflib.get_close_matches(name.rpartition(".")[2], last, n=3, cutoff=0.6):
        return f"Did you mean {' or '.join(close)}?"
    return f"It has, for example, {', '.join(list(usual or last)[:8])}."
