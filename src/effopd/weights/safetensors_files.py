"""safetensors files: where the bytes of each tensor are, and one tensor at a time.

Headers are checked in full when they are read. A tensor is read into memory of its own, so nothing
stays mapped.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from effopd.errors import CheckpointError, WeightsError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Dtypes of tables: which expert a token goes to, masks. Quantised weights come in some of these
#: too, under other names.
_TABLE_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
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
class StoredTensor:
    """One tensor of a safetensors file: where its bytes are."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def is_buffer(name: str) -> bool:
    """Whether a name is that of a mask or table which older versions of transformers stored beside
    the weights.
    """
    return _BUFFERS.search(name) is not None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name → `StoredTensor` of one safetensors file.

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
    tensors, begin = {}, 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, (start, stop), shape = _entry(entry, file, name)
        table = kind in _TABLE_DTYPES and not _QUANTISED.search(name)
        if kind not in _DTYPES and not table and not is_buffer(name):
            raise WeightsError(
                f"tensor '{name}' of {file} has dtype {kind}: expected one of {', '.join(_DTYPES)}. Quantised "
                "weights cannot be compared; dequantise the checkpoint first."
            )
        if begin + stop > size:
            raise CheckpointError(
                f"{file} is cut short: tensor '{name}' ends at byte {begin + stop}, the file at {size}. Copy it again."
            )
        tensors[name] = StoredTensor(
            file, (_DTYPES | _TABLE_DTYPES).get(kind, torch.uint8), shape, begin + start, begin + stop
        )
    try:
        with safe_open(file, framework="pt"):  # the library's own check: tensors neither overlap nor leave gaps
            return tensors
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


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
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


def _read(stored: StoredTensor, name: str) -> Tensor:
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


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same shape and values, read block by block up to the
    first difference.
    """
    if one.shape != other.shape:
        return False
    numbers, count = math.prod(one.shape), _BLOCK
    return all(
        torch.equal(*(_stretch(s, i, min(i + count, numbers)) for s in (one, other))) for i in range(0, numbers, count)
    )


def _stretch(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Numbers `start` to `stop` of the flat tensor, floating-point ones as float64."""
    size = stored.dtype.itemsize
    part = StoredTensor(
        stored.file, stored.dtype, (stop - start,), stored.start + start * size, stored.start + stop * size
    )
    tensor = _read(part, "")
    return tensor.to(torch.float64) if stored.dtype.is_floating_point else tensor
