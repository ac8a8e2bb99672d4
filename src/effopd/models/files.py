"""Load models and tokenizers from a folder or the Hub, with one typed error for all failures.

For damaged files, transformers raises many types: OSError, ValueError, KeyError, RuntimeError and
safetensors' own. Here all become a `CompatibilityError` that names the flag, the folder and the
fix. Two faults that transformers accepts are also errors: missing tensors, which it initializes at
random, and a missing tokenizer, which it replaces with an empty one.
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
from effopd.models.folders import (
    MODEL_CONFIG,
    adapter_base,
    adapter_base_revision,
    check_model_folder,
    hint,
    is_on_hub,
    quoted,
)
from effopd.models.hub import check_reachable

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
    """Turn every failure of `from_pretrained(name)` in the block into a `CompatibilityError`.

    Args:
        flag: the flag that gave the name, for the message (`--model`).
        name: model folder or Hub id.

    Raises:
        CompatibilityError: any exception except `EffOPDError` and `OutOfMemoryError`; or the model
            is neither a folder nor cached, and the Hub lacks it or cannot be reached.
    """
    check_reachable(flag, name)
    try:
        yield
    except (EffOPDError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # parsers in transformers raise many types
        raise CompatibilityError(
            f"{flag} {name!r} cannot be read: expected a model folder or a Hub id, got {quoted(error)}"
            f"{hint(name, error)}"
        ) from error


def load_tokenizer(flag: str, name: str, **load: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of a model, with left padding; for an adapter without one, that of its base.

    Args:
        flag: the flag that gave the name, for error messages.
        name: model folder or Hub id.
        load: keyword arguments of `from_pretrained`.

    Raises:
        CompatibilityError: the tokenizer is missing or cannot be read.
        MissingDependencyError: see `check_model_folder`.
    """
    check_model_folder(flag, name)
    source = name
    if (base := adapter_base(flag, name)) and not _has_tokenizer(name):
        source, load = base, load | {"revision": adapter_base_revision(flag, name)}
    revision = load.get("revision")
    with reading(flag, name):
        if not _has_tokenizer(source, revision):
            if not Path(source).is_dir():
                cached_file(source, MODEL_CONFIG, revision=revision)  # raises if there is no such repository
            raise CompatibilityError(
                f"{flag} {source!r} has no tokenizer: expected tokenizer.json or tokenizer_config.json beside the "
                "weights. Copy the tokenizer of the original model into the folder: "
                "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
            )
        return AutoTokenizer.from_pretrained(source, **({"padding_side": "left"} | load))


def load_model(flag: str, name: str, **load: Any) -> PreTrainedModel:
    """Causal language model in eval mode, on the accelerator if there is one.

    An adapter folder loads the base model with the adapter.

    Args:
        flag: the flag that gave the name, for error messages.
        name: model folder, adapter folder or Hub id.
        load: keyword arguments of `from_pretrained`.

    Raises:
        CompatibilityError: the model cannot be loaded, or tensors are missing.
        MissingDependencyError: see `check_model_folder`.
    """
    check_model_folder(flag, name)
    if adapter_base(flag, name):
        load["revision"] = adapter_base_revision(flag, name)  # that of the base: the adapter is a folder
    with reading(flag, name):
        model, info = _class_of(name, load).from_pretrained(name, output_loading_info=True, **load)
    if missing := sorted(info["missing_keys"]):
        raise CompatibilityError(
            f"{flag} {name!r}: the weights lack {len(missing)} tensors of {type(model).__name__}, e.g. "
            f"{', '.join(missing[:3])}. The files are incomplete or belong to another architecture. Copy them again."
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.eval() if accelerator is None else model.eval().to(accelerator)


def _class_of(name: str, load: dict[str, Any]) -> Any:
    """Auto class for causal LMs, or the class of a vision-language model that generates text."""
    if adapter_base("", name) is None:
        config = AutoConfig.from_pretrained(name, **{k: v for k, v in load.items() if k != "dtype"})
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        generates = kind is not None and not config.is_encoder_decoder and getattr(kind, "can_generate", bool)()
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and generates:
            return kind
    return AutoModelForCausalLM


def check_dtype(value: str) -> None:
    """Check that `value` is `auto` or the name of a floating-point dtype of torch.

    Raises:
        ConfigError: it is neither.
    """
    if value != "auto" and not getattr(getattr(torch, value, None), "is_floating_point", False):
        raise ConfigError(f"--dtype: expected auto, float32, bfloat16 or float16, got {value!r}.")


def absolute_base(model: Any) -> None:
    """Make local base paths in the adapters' configurations absolute.

    A saved `adapter_config.json` then works from any working directory.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        base = getattr(config, "base_model_name_or_path", None)
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())


def _has_tokenizer(name: str, revision: str | None = None) -> bool:
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    return any(is_on_hub(name, file, revision) for file in _TOKENIZER_FILES)
