"""The anchor on disk: one file, or a file a shard where parameters are sharded; read back for any
number of ranks.

FSDP2 gives shard r of R the rows [r·c, (r+1)·c) of a parameter, c = ⌈rows / R⌉. So the rows that a
rank needs are known without the other files, and a run may go on with another number of processes;
no rank ever holds more than its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import ShardSpec, rank
from effopd.common.files import write_atomically

ANCHOR_FILE = "effopd_anchor.safetensors"


def anchor_file(part: int, parts: int) -> str:
    """Name of a part: `effopd_anchor.safetensors`, or
    `effopd_anchor-00001-of-00008.safetensors`.
    """
    return ANCHOR_FILE if parts == 1 else f"effopd_anchor-{part:05d}-of-{parts:05d}.safetensors"


def rows_of(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First and last row (exclusive) of a part, as `torch.chunk` and FSDP2 divide them; empty parts
    have both at the end.
    """
    each = -(-rows // parts)
    return min(part * each, rows), min((part + 1) * each, rows)


def write_anchor(folder: Path, anchor: Mapping[str, Tensor], share: ShardSpec | None) -> int:
    """Write this rank's part, if it is in the first replica.

    Args:
        share: this rank's share of the sharded tensors; `None` if all of them are whole.

    Returns:
        The number of parts that make a whole.
    """
    from safetensors.torch import save_file

    part, parts, first = (share.part, share.parts, share.replica == 0) if share else (0, 1, rank() == 0)
    if first:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in anchor.items()}
        write_atomically(folder / anchor_file(part, parts), lambda path: save_file(tensors, path))
    return parts


def read_anchor(
    folder: Path, parts: int, written: Collection[str], wanted: Mapping[str, ShardSpec]
) -> dict[str, Tensor]:
    """This rank's rows of every tensor, from however many parts were written.

    Args:
        written: names of the tensors that are divided over the parts; the others are whole in the
            first.
        wanted: this rank's share of the tensors that are sharded now; the others are read whole.
    """
    from safetensors import safe_open

    files: list[Any] = [safe_open(folder / anchor_file(part, parts), "pt") for part in range(parts)]
    found = {}
    for name in files[0].keys():  # noqa: SIM118  # not a mapping
        pieces = [file.get_slice(name) for file in (files if name in written else files[:1])]
        if name in wanted:
            share = wanted[name]
            found[name] = _rows(pieces, *rows_of(share.rows, share.part, share.parts))
        elif len(pieces) > 1:
            found[name] = torch.cat([piece[:] for piece in pieces])
        else:
            found[name] = files[0].get_tensor(name)
    return found


def _rows(pieces: Sequence[Any], low: int, high: int) -> Tensor:
    """Rows low … high of the tensor whose pieces lie one after the other."""
    rows, start = [], 0
    for piece in pieces:
        length = piece.get_shape()[0]
        first, last = max(low - start, 0), min(high - start, length)
        if first < last:
            rows.append(piece[first:last])
        start += length
    return torch.cat(rows) if rows else pieces[0][0:0]
