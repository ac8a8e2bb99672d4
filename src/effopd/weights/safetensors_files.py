"""safetensors files: checked headers, and tensors read one at a time.

A tensor is read into its own memory, so no file stays mapped.
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
#: Dtypes of tables, such as routing tables and masks. Quantized weights use some of these dtypes
#: too; their names distinguish them.
_TABLE_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_QUANTIZED = re.compile(
    r"(?:^|[._])(?:weight|kernel|qweight|qzeros|g_idx|scales?|scb|zero_points?|weight_\w+|packed|blocks|absmax|quant_map|codes?|"
    r"codebooks?|\w*_proj)$",
    re.IGNORECASE,
)
_BLOCK = 2**20
#: Masks and tables, not weights, that older versions of transformers store.
_BUFFERS = re.compile(
    r"(?:^|\.)(?:attn\.(?:masked_)?bias|position_ids|rotary_emb\.inv_freq|rotary_emb\.(?:cos|sin)_cached)$"
)


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor: bytes `start` to `stop` of a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def is_buffer(name: str) -> bool:
    """Whether a name belongs to a mask or table that older versions of transformers store."""
    return _BUFFERS.search(name) is not None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name → `StoredTensor` of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or not a safetensors file.
        WeightsError: a tensor is quantized or has an unsupported dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length)) if length <= size else None
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Copy the checkpoint again.") from None
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file, or is cut short ({error}). Copy it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file, or is cut short: {size} bytes. Copy it again.")
    tensors, begin = {}, 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, (start, stop), shape = _entry(entry, file, name)
        table = kind in _TABLE_DTYPES and not _QUANTIZED.search(name)
        if kind not in _DTYPES and not table and not is_buffer(name):
            raise WeightsError(
                f"tensor '{name}' of {file} has dtype {kind}: expected one of {', '.join(_DTYPES)}. Quantized "
                "weights cannot be compared; dequantize the checkpoint first."
            )
        if begin + stop > size:
            raise CheckpointError(
                f"{file} is cut short: tensor '{name}' ends at byte {begin + stop}, the file at {size}. Copy it again."
            )
        tensors[name] = StoredTensor(
            file, (_DTYPES | _TABLE_DTYPES).get(kind, torch.uint8), shape, begin + start, begin + stop
        )
    try:
        with safe_open(file, framework="pt"):  # checks that tensors neither overlap nor leave gaps
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
    """Read a tensor to the CPU, into its own memory.

    Raises:
        CheckpointError: the file has changed or is truncated.
        WeightsError: the tensor contains NaN or infinity.
    """
    tensor = _read(stored, name)
    flat = tensor.view(-1)
    # block by block, because the temporaries of a single check are larger than the tensor
    bad = sum(block.numel() - int(torch.isfinite(block).sum()) for block in flat.split(_BLOCK))
    if bad:
        raise WeightsError(
            f"tensor '{name}' of {stored.file} is not finite ({bad} of {tensor.numel()} values are NaN or infinite). "
            "The run that wrote it diverged, or the file is damaged. Use an earlier checkpoint."
        )
    return tensor


def _read(stored: StoredTensor, name: str) -> Tensor:
    """Read a tensor without checking its values."""
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
    """Whether two stored tensors have equal shapes and values; stops at the first difference."""
    if one.shape != other.shape:
        return False
    numbers, count = math.prod(one.shape), _BLOCK
    return all(
        torch.equal(*(_stretch(s, i, min(i + count, numbers)) for s in (one, other))) for i in range(0, numbers, count)
    )


def _stretch(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of the flat tensor; floating-point values as float64."""
    size = stored.dtype.itemsize
    part = StoredTensor(
        stored.file, stored.dtype, (stop - start,), stored.start + start * size, stored.start + stop * size
    )
    tensor = _read(part, "")
    return tensor.to(torch.float64) if stored.dtype.is_floating_point else tensor
