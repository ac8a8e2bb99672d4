"""LoRA by flags: the adapter's configuration, and whether its names are names of the model, before
weights are loaded.
"""

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
    """PEFT's configuration of the flags, or `None` without `use_peft`.

    One target is a list of one: TRL turns it into text, which PEFT reads as a regular expression
    for the whole name. A text that is no plain name stays one.

    Raises:
        ConfigError: PEFT does not take the settings.
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


def check_adapter(model: ModelConfig, student: PreTrainedModel) -> None:
    """Every name of the LoRA flags is one of the student's, and none of them is the head.

    Args:
        student: on the meta device; it is changed.

    Raises:
        ConfigError: it is not.
    """
    config = adapter_config(model)
    if config is None:
        return
    modules = [name for name, _ in student.named_modules() if name]
    for flag, names in (
        ("--lora_target_modules", config.target_modules),
        ("--lora_modules_to_save", config.modules_to_save),
    ):
        if names is not None and not isinstance(names, str):
            for name in names:
                if not any(module == name or module.endswith(f".{name}") for module in modules):
                    raise ConfigError(f"{flag}: the model has no module {name!r}.{_close(name, modules)}")
    parameters = [name for name, _ in student.named_parameters()]
    for name in config.target_parameters or ():
        if not any(parameter == name or parameter.endswith(f".{name}") for parameter in parameters):
            raise ConfigError(
                f"--lora_target_parameters: the model has no parameter {name!r}.{_close(name, parameters)}"
            )
    _check_by_peft(config, student, modules)


def _check_by_peft(config: Any, student: PreTrainedModel, modules: list[str]) -> None:
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            adapted: Any = get_peft_model(student, config)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, re.error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--lora_target_modules {_shown(config)}: {reason[:300]} Expected names of linear layers, such as "
            f"{', '.join(_last_names(modules)[:8])}."
        ) from error
    head = adapted.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            f"--lora_target_modules {_shown(config)} adapts the output head, whose weights "
            "the loss reads directly, so the "
            "adapter would not be trained. Leave the head out."
        )


def trained_parameters(config: Any, student: PreTrainedModel) -> int:
    """How many parameters an adapter trains.

    Args:
        config: PEFT's configuration.
        student: on the meta device; it is changed.
    """
    from peft import get_peft_model

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(student, config)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _shown(config: Any) -> str:
    names = config.target_modules
    return names if isinstance(names, str) else " ".join(sorted(names or ()))


def _last_names(modules: Iterable[str]) -> list[str]:
    """Last parts of the names of a layer's modules, each once."""
    last = [name.rpartition(".")[2] for name in modules]
    return [name for name in dict.fromkeys(last) if last.count(name) > 1 and not name.isdecimal()]


def _close(name: str, names: list[str]) -> str:
    last = list(dict.fromkeys(part.rpartition(".")[2] for part in names if not part.rpartition(".")[2].isdecimal()))
    close = difflib.get_close_matches(name.rpartition(".")[2], last, n=3, cutoff=0.4) or last[:6]
    return f" Did you mean {' or '.join(close)}?"
