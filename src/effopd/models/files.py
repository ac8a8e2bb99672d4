"""Models and tokenizers from a folder or the Hub. Whatever is wrong with the files becomes one
typed error.

transformers reports a damaged folder with many types: OSError, ValueError, KeyError, RuntimeError,
safetensors' own. Here all of them are a `CompatibilityError` that names the flag, the folder and
what to do. Two faults that transformers lets pass are errors, too: weights that lack tensors (it
fills them with random numbers), and a folder without a tokenizer (it makes up an empty one).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from effopd.errors import CompatibilityError, ConfigError, EffOPDError
from effopd.models.folders import MODEL_CONFIG, adapter_base, check_model_folder, hint, is_on_hub, quoted

#: A folder with a tokenizer has at least one of these.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "sentencepiece.bpe.model",
    "vocab.model",
)


@contextmanager
def reading(flag: str, name: str) -> Iterator[None]:
    """Around one or more `from_pretrained(name)`: every failure becomes a `CompatibilityError`.

    Args:
        flag: where the name comes from, as the user wrote it (`--model`).

    Raises:
        CompatibilityError: anything but our own errors and a lack of memory.
    """
    try:
        yield
    except (EffOPDError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hosts raise whatever their parsers raise
        raise CompatibilityError(
            f"{flag} {name!r} cannot be read: expected a model folder or a Hub id, got {quoted(error)}"
            f"{hint(name, error)}"
        ) from error


def load_tokenizer(flag: str, name: str, **load: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left; of an adapter without one, its base's.

    Args:
        load: keyword arguments of `from_pretrained`.

    Raises:
        CompatibilityError: there is none, or it cannot be read.
        MissingDependencyError: as for `check_model_folder`.
    """
    check_model_folder(flag, name)
    source = name
    if (base := adapter_base(flag, name)) and not _has_tokenizer(name):
        source = base
    with reading(flag, name):
        if not _has_tokenizer(source):
            if not Path(source).is_dir():
                cached_file(source, MODEL_CONFIG)  # says so where the name itself is nothing
            raise CompatibilityError(
                f"{flag} {source!r} has no tokenizer: expected tokenizer.json or "
                "tokenizer_config.json beside the weights. "
                "Copy the tokenizer's files of the model it was trained from into it: "
                "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
            )
        return AutoTokenizer.from_pretrained(source, **({"padding_side": "left"} | load))


def load_model(flag: str, name: str, **load: Any) -> PreTrainedModel:
    """A causal language model with all of its weights, an adapter's on top of its base's, on the
    accelerator if there is one.

    Args:
        load: keyword arguments of `from_pretrained`.

    Raises:
        CompatibilityError: it cannot be loaded, or its weights lack tensors.
        MissingDependencyError: as for `check_model_folder`.
    """
    check_model_folder(flag, name)
    with reading(flag, name):
        model, info = _class_of(name, load).from_pretrained(name, output_loading_info=True, **load)
    if missing := sorted(info["missing_keys"]):
        raise CompatibilityError(
            f"{flag} {name!r}: the weights lack {len(missing)} tensors of {type(model).__name__}, e.g. "
            f"{', '.join(missing[:3])}: expected all of them. The files are those of another "
            "architecture, or incomplete."
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.eval() if accelerator is None else model.eval().to(accelerator)


def _class_of(name: str, load: dict[str, Any]) -> Any:
    """What loads a model: a causal language model, or a vision-language one that generates text, as
    training does.
    """
    if adapter_base("", name) is None:
        config = AutoConfig.from_pretrained(name, **{k: v for k, v in load.items() if k != "dtype"})
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        generates = kind is not None and not config.is_encoder_decoder and getattr(kind, "can_generate", bool)()
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and generates:
            return kind
    return AutoModelForCausalLM


def check_dtype(value: str) -> None:
    """Raises `ConfigError` unless `value` is `auto` or the name of one of torch's floating-point
    types.
    """
    if value != "auto" and not getattr(getattr(torch, value, None), "is_floating_point", False):
        raise ConfigError(f"--dtype: expected auto, float32, bfloat16 or float16, got {value!r}.")


def absolute_base(model: Any) -> None:
    """Adapters of `model` that were made on a local folder name it by its absolute path from now
    on, so that their `adapter_config.json` is read right from any working directory."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        base = getattr(config, "base_model_name_or_path", None)
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())


def _has_tokenizer(name: str) -> bool:
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    return any(is_on_hub(name, file) for file in _TOKENIZER_FILES)
