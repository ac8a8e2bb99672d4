"""Checks of model and adapter folders from JSON files and headers, before weights are loaded."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers.utils import cached_file

from effopd.common.optional import ensure
from effopd.errors import CompatibilityError
from effopd.weights.checkpoint_files import ADAPTER, INDEX, WEIGHTS, read_json

MODEL_CONFIG = "config.json"
#: A model folder has at least one of these.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
#: A Hub id; names with more components are paths.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Maximum length of a quoted message from another library, in characters.
_QUOTED = 300


def check_model_folder(flag: str, name: str) -> None:
    """Check that a name is a model folder, an adapter folder with its base, or can be a Hub id.

    Only JSON files are read.

    Raises:
        CompatibilityError: the name is a file, a folder without a valid `config.json`, an adapter
            whose base is missing, or neither a path nor a Hub id.
        MissingDependencyError: the folder is an adapter and peft is not installed.
    """
    path = Path(name)
    if path.is_file():
        raise CompatibilityError(
            f"{flag} {name!r} is a file: expected a model folder or a Hub id.{_gguf([path])} Pass the folder with "
            f"{MODEL_CONFIG} and the weights."
        )
    if not path.is_dir():
        check_hub_id(flag, name)
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
            f"{flag} {name!r}: {config} has no model_type: expected a model's configuration, "
            "as save_pretrained writes it."
        )


def check_hub_id(flag: str, name: str) -> None:
    """Check that the name of no existing path can be a Hub id. Nothing is read.

    Raises:
        CompatibilityError: it cannot; or with HF_HUB_OFFLINE=1, the cache lacks it and it looks
            like a mistyped path.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        where = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
        raise CompatibilityError(
            f"{flag} {name!r}: no such folder{where}, and not a valid Hub id. Expected the path of a model folder, or "
            "a Hub id such as Qwen/Qwen3-0.6B."
        ) from error
    if constants.HF_HUB_OFFLINE and (near := near_path(name)) and not is_cached(name):
        raise CompatibilityError(f"{flag} {name!r}: no such folder in {Path.cwd()}, nor in the local cache.{near}")


def near_path(name: str) -> str:
    """` Did you mean runs/opd-2?` for `runs/opd2` if there is a folder `runs`; else empty."""
    folder, _, last = name.rpartition("/")
    if not folder or not Path(folder).is_dir():
        return ""
    close = difflib.get_close_matches(last, [each.name for each in Path(folder).iterdir()], n=1)
    return f" Did you mean {folder}/{close[0]}?" if close else f" The folder {folder} has no {last!r}."


def is_cached(name: str) -> bool:
    """Whether the local cache of the Hub has files of a model."""
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def adapter_base(flag: str, name: str) -> str | None:
    """Base model of an adapter folder, "" if unnamed; `None` if `name` is not an adapter folder.

    Raises:
        CompatibilityError: `adapter_config.json` cannot be read.
    """
    file = Path(name) / ADAPTER
    return str(_json(flag, file).get("base_model_name_or_path") or "") if file.is_file() else None


def adapter_base_revision(flag: str, name: str) -> str | None:
    """Revision, on the Hub, of the base of an adapter folder; `None`: its main branch.

    Raises:
        CompatibilityError: `adapter_config.json` cannot be read.
    """
    return _json(flag, Path(name) / ADAPTER).get("revision") or None


def refuse_adapter(flag: str, name: str | None) -> None:
    """Refuse a folder that contains only an adapter, because training needs a full model.

    Raises:
        CompatibilityError: the folder is an adapter; the message explains how to merge it.
    """
    if name and (base := adapter_base(flag, name)) is not None and not (Path(name) / MODEL_CONFIG).is_file():
        raise CompatibilityError(f"{flag} {name!r}{_merge(base)}")


def check_whole_model(flag: str, name: str) -> None:
    """Check a folder's configuration and safetensors headers before training; a Hub id passes.

    Raises:
        CompatibilityError: the name is not a model folder, is an adapter, or its weights are
            missing, truncated or damaged.
    """
    refuse_adapter(flag, name)
    check_model_folder(flag, name)
    path = Path(name)
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise CompatibilityError(
            f"{flag} {name!r} holds no weights: expected *.safetensors or pytorch_model*.bin beside "
            f"{MODEL_CONFIG}.{_gguf(path.glob('*.gguf'))}"
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
            f"{flag} {name!r}: its weights cannot be read: {quoted(error)}. Expected complete safetensors files; "
            "copy them again."
        ) from error


def quoted(error: Exception) -> str:
    """Type and message of another library's error, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _QUOTED else text[:_QUOTED] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def hint(name: str, error: Exception) -> str:
    """Fix for an error of `from_pretrained(name)`; "" if none is known."""
    base, sizes_differ = adapter_base("", name), "size mismatch" in str(error) or "mismatched_sizes" in str(error)
    if base is None and not Path(name).exists() and is_on_hub(name, ADAPTER):
        return (
            " The repository holds an adapter, so its base must be reachable too. Training needs a full model: merge "
            "the adapter first."
        )
    if base is None:
        return f" {MODEL_CONFIG} and the weights are of different sizes." * sizes_differ
    if sizes_differ:
        return (
            f" The adapter was trained on a base whose sizes differ from {base!r}; usually its embeddings had been "
            "resized. Resize the base, save it, and name it in adapter_config.json: "
            "model.resize_token_embeddings(ROWS); model.save_pretrained(NEW_BASE)."
        )
    return "" if Path(base).is_dir() else _missing_base(name, base)


def is_on_hub(name: str, file: str, revision: str | None = None) -> bool:
    """Whether a Hub repository has a file, according to the cache or the network."""
    try:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
    except (OSError, ValueError):
        return False


def _json(flag: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompatibilityError(
            f"{flag}: {path} cannot be read: expected a JSON object, got {quoted(error)}"
        ) from error
    if not isinstance(value, dict):
        raise CompatibilityError(f"{flag}: {path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _missing_base(name: str, base: str) -> str:
    where = Path(name) / ADAPTER
    if not base:
        return f" {where} names no base model: write its absolute path or Hub id there, as base_model_name_or_path."
    return (
        f" It is an adapter, and {where} names {base!r} as its base (base_model_name_or_path), which is neither a "
        f"folder (looked in {Path.cwd()}) nor a model that could be loaded from the Hub. Write the base's absolute "
        "path or Hub id there."
    )


def _merge(base: str) -> str:
    return (
        f" is an adapter of {base or 'a base that its adapter_config.json does not name'!r}: expected a whole model. "
        "Merge the two first: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(NEW). Then "
        "copy the tokenizer's files into NEW, and pass that folder."
    )


def _gguf(paths: Any) -> str:
    return " GGUF files are not read: use the weights they were converted from." * any(
        path.suffix == ".gguf" for path in paths
    )


def _nearby(folder: Path) -> str:
    """Hint at the newest model in a subfolder, for example of an interrupted run."""
    inside = sorted(file.parent for file in folder.glob(f"checkpoints/*/{MODEL_CONFIG}"))
    inside += sorted(file.parent for file in folder.glob(f"checkpoints/*/{ADAPTER}"))
    inside = inside or sorted(file.parent for file in folder.glob(f"*/{MODEL_CONFIG}"))
    return f" There is one in {inside[-1]}." if inside else ""
