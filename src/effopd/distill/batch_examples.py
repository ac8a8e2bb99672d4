"""Examples of a trainer's micro-batch: slices on which its loss is computed one by one.

Shapes: R rows of a micro-batch, B examples (R = 2B for pairs), T tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Keys whose first dimension is the number of rows, tried in this order.
_ROW_KEYS = ("input_ids", "prompt_ids", "chosen_input_ids", "prompt_input_ids")
#: Key of the positions in a packed row, which restart at 0 with every sequence.
_POSITIONS = "position_ids"
_SEQUENCE_STARTS, _LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
_IGNORED = -100


def split_examples(batch: Mapping[str, Any], *, pairs: bool = False) -> list[dict[str, Any]]:
    """One micro-batch of a single example per example; `[batch]` if it cannot be split.

    A packed row (one row with several sequences) is split between its sequences. Sequences without
    a label are left out.

    Args:
        batch: micro-batch after the trainer's own preparation.
        pairs: rows i and B + i form example i, as in TRL's preference batches.

    Example:
        >>> ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
        >>> [part["input_ids"].tolist() for part in split_examples({"input_ids": ids}, pairs=True)]
        [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    """
    rows = _rows(batch)
    if rows == 1 and isinstance(batch.get(_POSITIONS), Tensor) and not pairs:
        return _split_packed(batch)
    if rows < 2 or (pairs and rows % 2):
        return [dict(batch)]
    count = rows // 2 if pairs else rows
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in batch.items():
        for index, part in enumerate(parts):
            whole, sliced = _slice(value, index, rows, count)
            if whole:
                return [dict(batch)]
            part[key] = sliced
    return parts


def _rows(batch: Mapping[str, Any]) -> int:
    keys = [key for key in _ROW_KEYS if isinstance(batch.get(key), Tensor)] + list(batch)
    return next((len(batch[k]) for k in keys if isinstance(batch[k], Tensor) and batch[k].dim()), 0)


def _slice(value: Any, index: int, rows: int, count: int) -> tuple[bool, Any]:
    """(whether the batch must stay whole, the entry of example `index`)."""
    if isinstance(value, Tensor) and value.dim():
        if len(value) == rows:
            return False, value[index::count] if rows != count else value[index : index + 1]
        return len(value) != count, value[index : index + 1]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value) not in (rows, count), value[index::count]
    return isinstance(value, Mapping), value


def _split_packed(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    positions_T = batch[_POSITIONS][0]
    starts = (positions_T == 0).nonzero().flatten().tolist()
    length = len(positions_T)
    known = {*_SEQUENCE_STARTS, *_LONGEST}
    per_token = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() == 2 and v.shape == (1, length)}
    if len(starts) < 2 or set(batch) - known - set(per_token):
        return [dict(batch)]
    parts = []
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        part: dict[str, Any] = {key: value[:, start:end] for key, value in per_token.items()}
        if "seq_idx" in part:
            part["seq_idx"] = torch.zeros_like(part["seq_idx"])
        for key in _SEQUENCE_STARTS:
            if key in batch:
                part[key] = torch.tensor([0, end - start], dtype=batch[key].dtype, device=batch[key].device)
        part |= {key: end - start for key in _LONGEST if key in batch}
        parts.append(part)
    scored = [part for part in parts if "labels" not in part or bool((part["labels"] != _IGNORED).any())]
    return scored or [dict(batch)]


def scored_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens with a loss: labels after the first position, or tokens of the completion."""
    if isinstance(batch.get("completion_mask"), Tensor):
        return int(batch["completion_mask"].sum())
    return int((batch["labels"][..., 1:] != _IGNORED).sum())
