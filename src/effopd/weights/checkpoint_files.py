"""The files of a checkpoint folder: find its weights, and map tensors to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effopd.errors import CheckpointError
from effopd.weights.safetensors_files import StoredTensor, read_header

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected the {path.name} that `save_pretrained` writes.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Copy the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}. Copy the file again.")
    return value


def find_weights(path: Path) -> Path:
    """The file that holds a folder's weights, or the index of its shards.

    Raises:
        CheckpointError: the folder does not exist, has no safetensors files, or has both a single
            file and an index.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder: expected a checkpoint folder with config.json and safetensors files. Download a "
            "model of the Hub first: hf download ORGANIZATION/MODEL --local-dir FOLDER."
        )
    layouts = [path / name for name in (WEIGHTS, INDEX) if (path / name).is_file()]
    if len(layouts) == 2:
        raise CheckpointError(
            f"{path} has both {WEIGHTS} and {INDEX}: expected one of them. Remove the one from an older save."
        )
    if not layouts:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        loose = sorted(p.name for p in path.glob("*.safetensors"))
        raise CheckpointError(f"{path} has no {WEIGHTS} and no {INDEX}. " + _way_out(pickles, loose))
    return layouts[0]


def _way_out(pickles: list[str], loose: list[str]) -> str:
    if pickles:
        return (
            f"It has pickle files ({', '.join(pickles[:3])}), which can run code when they are loaded. If you trust "
            "them, convert the folder once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    if loose:
        return f"It has {', '.join(loose[:3])} but no index; copy the index too."
    return "Expected a folder that `save_pretrained` wrote, or a run directory with a trajectory."


def stored_tensors(weights: Path) -> dict[str, StoredTensor]:
    """Name → `StoredTensor` of a weights file or of all shards of an index.

    Args:
        weights: a path from `find_weights`.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and its shards do not match.
        WeightsError: a tensor is quantized.
    """
    return _of_shards(weights) if weights.name == INDEX else read_header(weights)


def _of_shards(index: Path) -> dict[str, StoredTensor]:
    path = index.parent
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index}: expected a `weight_map` from tensor names to files, got none.")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in dict.fromkeys(names.values()):
        if not (path / file).is_file():
            lost = [name for name, where in names.items() if where == file]
            raise CheckpointError(
                f"{path / file} is missing, which {index.name} names for {len(lost)} tensors ({lost[0]}, …). Copy it "
                "again."
            )
        headers[file] = read_header(path / file)
    for name, file in names.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{index} says that tensor '{name}' is in {file}, but it is not. The index and the shards are from "
                "different saves; copy both again."
            )
    unlisted = [name for header in headers.values() for name in header if name not in names]
    if unlisted:
        raise CheckpointError(
            f"{path} has tensors that {index.name} does not list ({', '.join(unlisted[:3])}). The index and the "
            "shards are from different saves; copy both again."
        )
    return {name: headers[file][name] for name, file in names.items()}
