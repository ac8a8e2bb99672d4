"""Models and tokenizers from a folder or the Hub. Whatever is wrong with the files becomes one typed error.

transformers reports a damaged folder with many types: OSError, ValueError, KeyError, RuntimeError, safetensors' own. Here all
of them are a `CompatibilityError` that names the flag, the folder and what to do. Two faults that transformers lets pass are
errors, too: weights that lack tensors (it fills them with random numbers), and a folder without a tokenizer (it makes up an
empty one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from effopd.common.optional import ensure
from effopd.errors import CompatibilityError, ConfigError, EffOPDError
from effopd.weights.checkpoint_files import ADAPTER, INDEX, WEIGHTS, read_json

MODEL_CONFIG = "config.json"
#: A folder with a tokenizer has at least one of these.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "vocab.model",
)  # fmt: skip
#: A model folder has at least one of these.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
#: What can follow a name as a Hub id; longer paths are files.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Longest quotation of another library's message.
_QUOTED = 300


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
            f"{flag} {name!r} cannot be read: expected a model folder or a Hub id, got {_quoted(error)}"
            f"{_hint(name, error)}"
        ) from error


def check_model_folder(flag: str, name: str) -> None:
    """Refuse a name that exists and is no model folder, and an adapter whose base is not there. Only JSON is read.

    Raises:
        CompatibilityError: a file, a folder without `config.json`, one whose `config.json` is no configuration, or an adapter
            that names a missing base.
        MissingDependencyError: an adapter, and peft is not installed.
    """
    path = Path(name)
    if path.is_file():
        raise CompatibilityError(
            f"{flag} {name!r} is a file: expected a model folder or a Hub id.{_gguf([path])} Give the folder with "
            f"{MODEL_CONFIG} and the weights."
        )
    if not path.is_dir():
        return
    base = adapter_base(flag, name)
    if base is not None:
        ensure("peft")
        if (path / MODEL_CONFIG).is_file():
            return  # transformers takes the weights beside the adapter as its base
        if not _HUB_ID.fullmatch(base) and not (base and Path(base).is_dir()):
            raise CompatibilityError(f"{flag} {name!r} cannot be read.{_missing_base(name, base)}")
        return
    config = path / MODEL_CONFIG
    if not config.is_file():
        raise CompatibilityError(
            f"{flag} {name!r} has no {MODEL_CONFIG}: expected a model folder, as save_pretrained writes it."
            f"{_gguf(path.glob('*.gguf'))}{_nearby(path)}"
        )
    if not isinstance(_json(flag, config).get("model_type", None), str) and not _json(flag, config).get("auto_map"):
        raise CompatibilityError(
            f"{flag} {name!r}: {config} has no model_type: expected a model's configuration, as save_pretrained writes it."
        )


def adapter_base(flag: str, name: str) -> str | None:
    """The base that an adapter folder names, "" if it names none; `None` if `name` is no adapter folder.

    Raises:
        CompatibilityError: its `adapter_config.json` cannot be read.
    """
    file = Path(name) / ADAPTER
    return str(_json(flag, file).get("base_model_name_or_path") or "") if file.is_file() else None


def refuse_adapter(flag: str, name: str | None) -> None:
    """Training starts from whole models: refuse a folder that holds an adapter only.

    Raises:
        CompatibilityError: it does; the message names its base and how to merge the two.
    """
    if name and (base := adapter_base(flag, name)) is not None and not (Path(name) / MODEL_CONFIG).is_file():
        raise CompatibilityError(f"{flag} {name!r}{_merge(base)}")


def check_whole_model(flag: str, name: str) -> None:
    """Refuse a folder that training could not start from, before anything is loaded: configuration, and the headers of its
    safetensors files. A Hub id passes.

    Raises:
        CompatibilityError: no model folder, an adapter, or weights that are missing, cut short or damaged.
    """
    refuse_adapter(flag, name)
    check_model_folder(flag, name)
    path = Path(name)
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise CompatibilityError(
            f"{flag} {name!r} holds no weights: expected *.safetensors (or pytorch_model*.bin) beside its {MODEL_CONFIG}."
            f"{_gguf(path.glob('*.gguf'))}"
        )
    index, whole = path / INDEX, path / WEIGHTS
    try:
        files = (
            sorted({path / str(file) for file in read_json(index)["weight_map"].values()}) if index.is_file() else []
        )
        for file in [whole] if whole.is_file() else files:
            with safe_open(file, framework="pt"):  # checks that the tensors fill the file
                pass
    except Exception as error:  # safetensors' own, OSError, KeyError
        raise CompatibilityError(
            f"{flag} {name!r}: its weights cannot be read: {_quoted(error)}. Expected whole safetensors files; copy them again."
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
                f"{flag} {source!r} has no tokenizer: expected tokenizer.json or tokenizer_config.json beside the weights. "
                "Copy the tokenizer's files of the model it was trained from into it: "
                "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
            )
        return AutoTokenizer.from_pretrained(source, **({"padding_side": "left"} | load))


def load_model(flag: str, name: str, **load: Any) -> PreTrainedModel:
    """A causal language model with all of its weights, an adapter's on top of its base's, on the accelerator if there is one.

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
            f"{', '.join(missing[:3])}: expected all of them. The files are those of another architecture, or incomplete."
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.eval() if accelerator is None else model.eval().to(accelerator)


def _class_of(name: str, load: dict[str, Any]) -> Any:
    """What loads a model: a causal language model, or a vision-language one that generates text, as training does."""
    if adapter_base("", name) is None:
        config = AutoConfig.from_pretrained(name, **{k: v for k, v in load.items() if k != "dtype"})
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        generates = kind is not None and not config.is_encoder_decoder and getattr(kind, "can_generate", bool)()
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and generates:
            return kind
    return AutoModelForCausalLM


def check_dtype(value: str) -> None:
    """Raises `ConfigError` unless `value` is `auto` or the name of one of torch's floating-point types."""
    if value != "auto" and not getattr(getattr(torch, value, None), "is_floating_point", False):
        raise ConfigError(f"--dtype: expected auto, float32, bfloat16 or float16, got {value!r}.")


def absolute_base(model: Any) -> None:
    """Adapters of `model` that were made on a local folder name it by its absolute path from now on, so that their
    `adapter_config.json` is read right from any working directory."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        base = getattr(config, "base_model_name_or_path", None)
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())


def _has_tokenizer(name: str) -> bool:
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    return any(_on_hub(name, file) for file in _TOKENIZER_FILES)


def _on_hub(name: str, file: str) -> bool:
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None
    except (OSError, ValueError):
        return False


def _json(flag: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompatibilityError(
            f"{flag}: {path} cannot be read: expected a JSON object, got {_quoted(error)}"
        ) from error
    if not isinstance(found, dict):
        raise CompatibilityError(f"{flag}: {path}: expected a JSON object, got {type(found).__name__}.")
    return found


def _quoted(error: Exception) -> str:
    """Another library's message in one line, with its type."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _QUOTED else text[:_QUOTED] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hint(name: str, error: Exception) -> str:
    base, sizes_differ = adapter_base("", name), "size mismatch" in str(error) or "mismatched_sizes" in str(error)
    if base is None and not Path(name).exists() and _on_hub(name, ADAPTER):
        return " The repository holds an adapter, whose base must be reachable, too; training starts from whole models: merge it."
    if base is None:
        return f" {MODEL_CONFIG} and the weights are of different sizes." * sizes_differ
    if sizes_differ:
        return (
            f" The adapter was trained on a base of other sizes than {base!r} has now; most often its embeddings had been "
            "resized. Resize the base first, save it, and name it in adapter_config.json: "
            "model.resize_token_embeddings(ROWS); model.save_pretrained(NEW_BASE)."
        )
    return "" if Path(base).is_dir() else _missing_base(name, base)


def _missing_base(name: str, base: str) -> str:
    where = Path(name) / ADAPTER
    if not base:
        return f" {where} names no base model: write its absolute path or Hub id there, as base_model_name_or_path."
    return (
        f" It is an adapter, and {where} names {base!r} as its base (base_model_name_or_path), which is neither a folder "
        f"(looked in {Path.cwd()}) nor a model that could be loaded from the Hub. Write the base's absolute path or Hub id there."
    )


def _merge(base: str) -> str:
    return (
        f" is an adapter of {base or 'a base that its adapter_config.json does not name'!r}: expected a whole model. Merge the "
        "two first: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(NEW); copy the tokenizer's files "
        "into NEW, and name that folder."
    )


def _gguf(paths: Any) -> str:
    return " GGUF files are not read: use the weights they were converted from." * any(
        path.suffix == ".gguf" for path in paths
    )


def _nearby(folder: Path) -> str:
    """The newest model inside a folder that is none itself, such as a run that was stopped before its end."""
    inside = sorted(file.parent for file in folder.glob(f"checkpoints/*/{MODEL_CONFIG}"))
    inside += sorted(file.parent for file in folder.glob(f"checkpoints/*/{ADAPTER}"))
    inside = inside or sorted(file.parent for file in folder.glob(f"*/{MODEL_CONFIG}"))
    return f" There is one in {inside[-1]}." if inside else ""
