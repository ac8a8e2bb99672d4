"""Checkpoints on disk, one tensor at a time.

A folder in the Hugging Face format: `config.json` and safetensors files. Opening reads headers only; `load` reads one tensor's
bytes into memory of its own, so nothing stays mapped and memory does not grow with the number of tensors read. Left out:
pickle files (they run code when loaded) and quantised weights.
"""

from __future__ import annotations

import json
import math
import re
import struct
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from effopd.errors import CheckpointError, WeightsError
from effopd.weights.naming import TOKENS, Part, is_head, is_tied, is_token_embedding, parts_of

if TYPE_CHECKING:
    from effopd.weights.adapter import Adapter

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Dtypes of tables: which expert a token goes to, masks. Quantised weights come in some of these too, under other names.
_TABLE_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_QUANTISED = re.compile(
    r"(?:^|[._])(?:weight|kernel|qweight|qzeros|g_idx|scales?|scb|zero_points?|weight_\w+|packed|blocks|absmax|quant_map|codes?|"
    r"codebooks?|\w*_proj)$",
    re.IGNORECASE,
)
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
        shapes, dtypes, files: by tensor name, of the floating-point tensors.
        tables: names of the integer and boolean tensors, which are no weights.
        is_untied: whether `untie` has given a tied model a head.

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
        kept = {name: s for name, s in stored.items() if not _BUFFERS.search(name)}
        self._stored = {name: s for name, s in kept.items() if s.dtype.is_floating_point}
        self._tables = {name: s for name, s in kept.items() if not s.dtype.is_floating_point}
        if not self._stored:
            raise CheckpointError(f"{weights} holds no tensors: expected the weights of a model.")
        self.tables = tuple(self._tables)
        self.is_untied = False
        self._index()
        self._alive: weakref.WeakValueDictionary[tuple[str, str], Tensor] = weakref.WeakValueDictionary()

    def _index(self) -> None:
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        self.files = {name: stored.file for name, stored in self._stored.items()}

    @cached_property
    def own_head(self) -> bool:
        """Whether the output head is a tensor of its own, which the token embedding does not determine.

        A file with both tensors, of different values, is an untied model whatever its configuration says (transformers
        reads it so too); equal ones are one. Reads both tensors where the configuration says tied and both are stored.
        """
        head = next((name for name in self._stored if is_head(name)), None)
        embeddings = [self._stored[name] for name in self._stored if is_token_embedding(name)]
        if head is None or not is_tied(self.config):
            return head is not None
        return bool(embeddings) and not any(_equal(self._stored[head], embedding) for embedding in embeddings)

    def untie(self, head: str) -> None:
        """From now on, read the tied head as a tensor of its own named `head`, equal to the token embedding.

        Raises:
            WeightsError: there is no token embedding, or more than one.
        """
        found = [name for name in self._stored if is_token_embedding(name)]
        if len(found) != 1:
            raise WeightsError(
                f"{self.path} ties its head to the token embedding, and another checkpoint of this comparison has a head of "
                f"its own. Expected one token embedding to compare that head with, got {', '.join(found) or 'none'}. Save "
                "the tied one with tie_word_embeddings=False, and compare again."
            )
        self._stored[head] = self._stored[found[0]]
        self.is_untied = self.own_head = True
        self._index()

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

    def load_expert(self, part: Part, device: torch.device | str = "cpu") -> Tensor:
        """The one expert of a stack that a part lies in, without reading the others; else as `load`."""
        stored = self._stored[part.tensor]
        assert part.expert is not None
        size = (stored.stop - stored.start) // stored.shape[0]
        start = stored.start + part.expert * size
        one = Stored(stored.file, stored.dtype, stored.shape[1:], start, start + size)
        return read_tensor(one, part.tensor).to(device)

    def load_table(self, name: str) -> Tensor:
        """An integer or boolean tensor."""
        return read_tensor(self._tables[name], name)

    def table_equals(self, name: str, other: Checkpoint, other_name: str) -> bool:
        """Whether a table is the same in another checkpoint."""
        return _equal(self._tables[name], other._tables[other_name])

    def parts(self) -> list[Part]:
        """Every matrix and vector, see `parts_of`. Of a tied pair the head may be the one that is stored: then it is the
        embedding."""
        alone = is_tied(self.config) and not any(map(is_token_embedding, self._stored))
        parts = parts_of(self.config, self.shapes, self.own_head or alone)
        return [replace(p, place=TOKENS) if alone and is_head(p.tensor) else p for p in parts]


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
        table = kind in _TABLE_DTYPES and not _QUANTISED.search(name)
        if kind not in _DTYPES and not table and not _BUFFERS.search(name):
            raise WeightsError(
                f"tensor '{name}' of {file} has dtype {kind}: expected one of {', '.join(_DTYPES)}. Quantised "
                "weights cannot be compared; dequantise the checkpoint first."
            )
        if begin + stop > size:
            raise CheckpointError(
                f"{file} is cut short: tensor '{name}' ends at byte {begin + stop}, the file at {size}. Copy it again."
            )
        found[name] = Stored(
            file, (_DTYPES | _TABLE_DTYPES).get(kind, torch.uint8), shape, begin + start, begin + stop
        )
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
    tensor = _read(stored, name)
    flat = tensor.view(-1)
    # block by block: the temporaries of one check of all would be larger than the tensor
    bad = sum(block.numel() - int(torch.isfinite(block).sum()) for block in flat.split(_BLOCK))
    if bad:
        raise WeightsError(
            f"tensor '{name}' of {stored.file} is not finite ({bad} of {tensor.numel()} numbers are NaN or infinite). "
            "The run that wrote it has diverged, or the file is damaged; use an earlier checkpoint."
        )
    return tensor


def _read(stored: Stored, name: str) -> Tensor:
    """The tensor as it is stored."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    flat = tensor.view(-1)
    with stored.file.open("rb") as handle:
        handle.seek(stored.start)
        buffer: Any = flat.view(torch.uint8).numpy()
        got = handle.readinto(buffer) if tensor.numel() else 0
    if got != stored.stop - stored.start or got != tensor.numel() * tensor.element_size():
        raise CheckpointError(f"{stored.file} has changed or is cut short at tensor '{name}'. Copy it again.")
    return tensor


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have the same shape and values, read block by block up to the first difference."""
    if one.shape != other.shape:
        return False
    numbers, count = math.prod(one.shape), _BLOCK
    return all(
        torch.equal(*(_stretch(s, i, min(i + count, numbers)) for s in (one, other))) for i in range(0, numbers, count)
    )


def _stretch(stored: Stored, start: int, stop: int) -> Tensor:
    """Numbers `start` to `stop` of the flat tensor, floating-point ones as float64."""
    size = stored.dtype.itemsize
    part = Stored(stored.file, stored.dtype, (stop - start,), stored.start + start * size, stored.start + stop * size)
    tensor = _read(part, "")
    return tensor.to(torch.float64) if stored.dtype.is_floating_point else tensor


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
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
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
