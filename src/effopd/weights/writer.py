"""Write an edited copy of a checkpoint, one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from effopd.common.files import fsync
from effopd.errors import CheckpointError, WeightsError
from effopd.weights.checkpoint_files import INDEX, WEIGHTS
from effopd.weights.naming import is_tied
from effopd.weights.reader import Checkpoint

#: Files beside the weights that make a checkpoint usable.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_LEFT_OUT = re.compile(r".*\.index\.json|trainer_state\.json|adapter_config\.json")

_Edit = Callable[[str, Tensor], Tensor]


def write_checkpoint(
    base: Checkpoint,
    edit: _Edit,
    out: str | Path,
    *,
    max_shard_size: int = 2 * 1024**3,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `edit(name, tensor)` of every tensor of `base` as a checkpoint with its tokenizer.

    Memory: one shard and one tensor. A temporary folder next to `out` is filled and then renamed,
    so `out` is either complete or absent.

    Args:
        base: the checkpoint to copy.
        edit: called with every floating-point tensor, including a stored copy of a tied head; must
            not change it in place. Integer tables are copied.
        out: the new folder.
        max_shard_size: maximum bytes per file; a larger single tensor gets its own file.
        dtype: dtype of the written tensors; `None`: the stored dtype of each tensor.

    Raises:
        CheckpointError: `out` exists and is not empty.
        WeightsError: an edited tensor has another shape or is not finite.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another folder (nothing was changed).")
    staged = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        _fill(base, edit, staged, max_shard_size, dtype)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    staged.rename(out)
    fsync(out.parent)
    return out


def _fill(base: Checkpoint, edit: _Edit, staged: Path, limit: int, dtype: torch.dtype | None) -> None:
    """Write all files of the new checkpoint and flush them to disk."""
    shards = _write_shards(base, edit, staged, limit, dtype)
    if len(shards) == 1:
        (staged / shards[0][0]).rename(staged / WEIGHTS)
    else:
        _write_index(staged, shards)
    _copy_rest(base, staged, dtype)
    for path in [*staged.iterdir(), staged]:
        fsync(path)


def _write_shards(
    base: Checkpoint, edit: _Edit, staged: Path, limit: int, dtype: torch.dtype | None
) -> list[tuple[str, dict[str, int]]]:
    """(file, tensor name → bytes) per shard, in order."""
    shards: list[tuple[str, dict[str, int]]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            file = f"shard-{len(shards):05d}.safetensors"
            save_file(held, staged / file, metadata={"format": "pt"})
            shards.append((file, {name: t.numel() * t.element_size() for name, t in held.items()}))
            held.clear()

    for name in (*base.shapes, *base.tables):
        table = name in base.tables
        stored = base.load_table(name) if table else base.load(name)
        edited = stored if table else edit(name, stored)
        new = edited.to("cpu", stored.dtype if dtype is None or table else dtype).contiguous()
        if new.shape != stored.shape or not bool(torch.isfinite(new).all()):
            raise WeightsError(
                f"the edited tensor '{name}' has shape {tuple(new.shape)} (expected {tuple(stored.shape)}) or is not "
                f"finite in {new.dtype}; nothing was written."
            )
        if sum(t.numel() * t.element_size() for t in held.values()) + new.numel() * new.element_size() > limit:
            flush()
        held[name] = new.clone() if new is stored else new
    flush()
    return shards


def _write_index(staged: Path, shards: list[tuple[str, dict[str, int]]]) -> None:
    names: dict[str, str] = {}
    total = 0
    for number, (file, sizes) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (staged / file).rename(staged / final)
        names |= dict.fromkeys(sizes, final)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_rest(base: Checkpoint, staged: Path, dtype: torch.dtype | None) -> None:
    for pattern in _COPIED:
        for path in base.path.glob(pattern):
            if not _LEFT_OUT.fullmatch(path.name):
                shutil.copy(path, staged / path.name)
    config = json.loads((staged / "config.json").read_text())
    changed = dict(config)
    if dtype is not None:
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            changed[key] = str(dtype).removeprefix("torch.")
    if base.own_head and is_tied(config):  # the file has a separate head, which readers must not tie
        changed["tie_word_embeddings"] = False
        if isinstance(text := changed.get("text_config"), dict) and "tie_word_embeddings" in text:
            changed["text_config"] = text | {"tie_word_embeddings": False}
    if changed != config:
        (staged / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
