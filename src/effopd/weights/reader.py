"""Checkpoints on disk, one tensor at a time.

A folder in the Hugging Face format: `config.json` and safetensors files. Opening reads headers only; `load` reads one tensor's
bytes into memory of its own, so nothing stays mapped and memory does not grow with the number of tensors read. Left out:
pickle files (they run code when loaded) and quantised weights.
"""

from __future__ import annotations

import json
import re
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from effopd.errors import CheckpointError, WeightsError
from effopd.weights.naming import Part, parts_of

if TYPE_CHECKING:
    from effopd.weights.adapter import Adapter

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 2**20
#: Stored by older versions of transformers; masks and tables, not weights.
_BUFFERS = re.compile(
    r"(?:^|\.)(?:attn\.(?:masked_)?bias|position_ids|rotary_emb\.inv_freq|rotary_emb\.(?:cos|sin)_cached)$"
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: where its bytes are."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """A checkpoint folder, lazily.

    Args:
        path: a folder with `config.json` and `model.safetensors`, or shards with their index.

    Attributes:
        config: `config.json`.
        shapes, dtypes, files: by tensor name.

    Raises:
        CheckpointError: the folder, the configuration, a shard or a tensor of the index is missing; a file is cut short
            or is no safetensors file; there are only pickle files.
        WeightsError: a tensor is quantised.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        weights = find_weights(self.path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        stored = _sharded(weights) if weights.name == INDEX else read_header(weights)
        self._stored = {name: s for name, s in stored.items() if not _BUFFERS.search(name)}
        if not self._stored:
            raise CheckpointError(f"{weights} holds no tensors: expected the weights of a model.")
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        self.files = {name: stored.file for name, stored in self._stored.items()}
        self._alive: weakref.WeakValueDictionary[tuple[str, str], Tensor] = weakref.WeakValueDictionary()

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor in its stored dtype, checked to be finite. Do not edit it in place: while someone holds it, the
        same object is handed out again.

        Raises:
            WeightsError: no such tensor, or it holds NaN or infinity.
            CheckpointError: the file has changed or cannot be read.
        """
        key = (name, str(device))
        known = self._alive.get(key)
        if known is not None:
            return known
        if name not in self._stored:
            raise WeightsError(f"{self.path} has no tensor '{name}'; it has {', '.join(list(self._stored)[:3])}, …")
        tensor = read_tensor(self._stored[name], name).to(device)
        self._alive[key] = tensor
        return tensor

    def parts(self) -> list[Part]:
        """Every matrix and vector, see `parts_of`."""
        return parts_of(self.config, self.shapes)


def open_checkpoint(path: str | Path) -> Checkpoint | Adapter:
    """A `Checkpoint`, or an `Adapter` if the folder has an `adapter_config.json`."""
    if (Path(path) / ADAPTER).is_file():
        from effopd.weights.adapter import Adapter

        return Adapter(path)
    return Checkpoint(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, or no JSON object.
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


def read_header(file: Path) -> dict[str, Stored]:
    """Name → `Stored` of one safetensors file.

    Raises:
        CheckpointError: missing, cut short, damaged, or no safetensors file.
        WeightsError: a dtype that is not a floating-point one of 16 to 64 bits.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length)) if length <= size else None
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Copy the checkpoint again.") from None
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is no safetensors file, or cut short ({error}). Copy it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is no safetensors file, or cut short: {size} bytes. Copy it again.")
    found, begin = {}, 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, (start, stop), shape = _entry(entry, file, name)
        if kind not in _DTYPES and not _BUFFERS.search(name):
            raise WeightsError(
                f"tensor '{name}' of {file} has dtype {kind}: expected one of {', '.join(_DTYPES)}. Quantised "
                "weights cannot be compared; dequantise the checkpoint first."
            )
        if begin + stop > size:
            raise CheckpointError(
                f"{file} is cut short: tensor '{name}' ends at byte {begin + stop}, the file at {size}. Copy it again."
            )
        found[name] = Stored(file, _DTYPES.get(kind, torch.uint8), shape, begin + start, begin + stop)
    try:
        with safe_open(file, framework="pt"):  # the library's own check: tensors neither overlap nor leave gaps
            return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Copy it again.") from error


def _entry(entry: Any, file: Path, name: str) -> tuple[str, tuple[int, int], tuple[int, ...]]:
    """Dtype, offsets and shape of one entry of a header."""
    try:
        start, stop = entry["data_offsets"]
        return str(entry["dtype"]), (int(start), int(stop)), tuple(int(n) for n in entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged: its header does not describe tensor '{name}'. Copy it again."
        ) from error


def read_tensor(stored: Stored, name: str) -> Tensor:
    """The tensor on the CPU, read into memory of its own.

    Raises:
        CheckpointError: the file is shorter than its header says.
        WeightsError: NaN or infinity.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    flat = tensor.view(-1)
    with stored.file.open("rb") as handle:
        handle.seek(stored.start)
        buffer: Any = flat.view(torch.uint8).numpy()
        got = handle.readinto(buffer) if tensor.numel() else 0
    if got != stored.stop - stored.start or got != tensor.numel() * tensor.element_size():
        raise CheckpointError(f"{stored.file} has changed or is cut short at tensor '{name}'. Copy it again.")
    # block by block: the temporaries of one check of all would be larger than the tensor
    bad = sum(block.numel() - int(torch.isfinite(block).sum()) for block in flat.split(_BLOCK))
    if bad:
        raise WeightsError(
            f"tensor '{name}' of {stored.file} is not finite ({bad} of {tensor.numel()} numbers are NaN or infinite). "
            "The run that wrote it has diverged, or the file is damaged; use an earlier checkpoint."
        )
    return tensor


def find_weights(path: Path) -> Path:
    """The file that holds a folder's weights, or the index that lists them.

    Raises:
        CheckpointError: no folder, no safetensors, or two layouts at once; the message says how to get there.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder: expected a checkpoint folder with config.json and safetensors files. A model of the Hub "
            "has to be on this disk first: hf download ORGANISATION/MODEL --local-dir FOLDER."
        )
    found = [path / name for name in (WEIGHTS, INDEX) if (path / name).is_file()]
    if len(found) == 2:
        raise CheckpointError(
            f"{path} has both {WEIGHTS} and {INDEX}: expected one of them. Remove the one that is left from an older save."
        )
    if not found:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        loose = sorted(p.name for p in path.glob("*.safetensors"))
        raise CheckpointError(f"{path} has no {WEIGHTS} and no {INDEX}. " + _way_out(pickles, loose))
    return found[0]


def _way_out(pickles: list[str], loose: list[str]) -> str:
    if pickles:
        return (
            f"It has pickle files ({', '.join(pickles[:3])}), which run code when they are loaded. Convert it once, if you "
            "trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    if loose:
        return f"It has {', '.join(loose[:3])} but no index that says what belongs together; copy the index too."
    return "Expected a folder that `save_pretrained` wrote, or a run directory with a trajectory."


def _sharded(index: Path) -> dict[str, Stored]:
    path = index.parent
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: expected a `weight_map` from tensor names to files, got none.")
    headers: dict[str, dict[str, Stored]] = {}
    for file in dict.fromkeys(names.values()):
        if not (path / file).is_file():
            lost = [name for name, where in names.items() if where == file]
            raise CheckpointError(
                f"{path / file} is missing, which {index.name} names for {len(lost)} tensors ({lost[0]}, …). Copy it again."
            )
        headers[file] = read_header(path / file)
    for name, file in names.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{index} says that tensor '{name}' is in {file}, but it is not. The index and the shards are of different "
                "saves; copy both again."
            )
    unlisted = [name for header in headers.values() for name in header if name not in names]
    if unlisted:
        raise CheckpointError(
            f"{path} has tensors that {index.name} does not list ({', '.join(unlisted[:3])}). The index and the shards are of "
            "different saves; copy both again."
        )
    return {name: headers[file][name] for name, file in names.items()}
