"""The anchor on disk: one file, or one per shard; readable with any number of ranks.

FSDP2 assigns shard r of R the rows [r·c, (r+1)·c) of a parameter, with c = ⌈rows / R⌉. A rank
therefore reads only its own rows, and a run can resume with another number of processes. Under
DeepSpeed, the rows are the elements of the flat parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import ShardSpec, rank, rows_of
from effopd.common.files import write_atomically

ANCHOR_FILE = "effopd_anchor.safetensors"


def anchor_file(part: int, parts: int) -> str:
    """File name of a part, such as `effopd_anchor-00001-of-00008.safetensors`.

    A single part is `effopd_anchor.safetensors`. Parts are counted from 0.
    """
    return ANCHOR_FILE if parts == 1 else f"effopd_anchor-{part:05d}-of-{parts:05d}.safetensors"


def write_anchor(folder: Path, anchor: Mapping[str, Tensor], share: ShardSpec | None) -> int:
    """Write this rank's part of the anchor, if the rank belongs to the first replica.

    Args:
        folder: checkpoint folder.
        anchor: this rank's tensors, by parameter name.
        share: this rank's shard; `None` if no tensor is sharded (rank 0 then writes).

    Returns:
        Number of parts of the complete anchor.
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
    """This rank's rows of every anchor tensor.

    Args:
        folder: checkpoint folder.
        parts: number of parts on disk.
        written: names of tensors that are divided over the parts; others are whole in part 0.
        wanted: this rank's shard of every tensor that is sharded now; others are read whole.
    """
    from safetensors import safe_open

    files: list[Any] = [safe_open(folder / anchor_file(part, parts), "pt") for part in range(parts)]
    anchor = {}
    for name in files[0].keys():  # noqa: SIM118  # not a mapping
        pieces = [file.get_slice(name) for file in (files if name in written else files[:1])]
        if name in wanted:
            share = wanted[name]
            anchor[name] = _rows(pieces, *(share.span or rows_of(share.rows, share.part, share.parts)))
        elif len(pieces) > 1:
            anchor[name] = torch.cat([piece[:] for piece in pieces])
        else:
            anchor[name] = files[0].get_tensor(name)
    return anchor


def _rows(pieces: Sequence[Any], low: int, high: int) -> Tensor:
    """Rows [low, high) of the concatenation of `pieces`."""
    rows, start = [], 0
    for piece in pieces:
        length = piece.get_shape()[0]
        first, last = max(low - start, 0), min(high - start, length)
        if first < last:
            rows.append(piece[first:last])
        start += length
    return torch.cat(rows) if rows else pieces[0][0:0]
