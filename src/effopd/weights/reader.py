"""`Checkpoint`: a checkpoint folder on disk, read one tensor at a time.

The folder has the Hugging Face format: `config.json` and safetensors files. Opening reads only
headers. `load` reads one tensor into its own memory, so no file stays mapped. Pickle files, which
can run code when loaded, and quantized weights are not supported.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effopd.errors import CheckpointError, WeightsError
from effopd.weights.adapter import Adapter
from effopd.weights.checkpoint_files import ADAPTER, find_weights, read_json, stored_tensors
from effopd.weights.naming import TOKENS, is_head, is_tied, is_token_embedding
from effopd.weights.parts import Part, parts_of
from effopd.weights.safetensors_files import StoredTensor, is_buffer, read_tensor, same_values


class Checkpoint:
    """A checkpoint folder; tensors are read on demand.

    Args:
        path: a folder with `config.json` and `model.safetensors`, or shards with their index.

    Attributes:
        config: contents of `config.json`.
        shapes, dtypes, files: by name, of the floating-point tensors.
        tables: names of the integer and boolean tensors, which are not weights.
        is_untied: whether `untie` has given the checkpoint a head.

    Raises:
        CheckpointError: the folder, the configuration, a shard or a tensor of the index is missing;
            a file is truncated or not a safetensors file; or there are only pickle files.
        WeightsError: a tensor is quantized.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        weights = find_weights(self.path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        stored = {name: s for name, s in stored_tensors(weights).items() if not is_buffer(name)}
        self._stored = {name: s for name, s in stored.items() if s.dtype.is_floating_point}
        self._tables = {name: s for name, s in stored.items() if not s.dtype.is_floating_point}
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
        """Whether the output head is separate from the token embedding.

        If both are stored and the configuration ties them, both are read and compared: different
        values mean an untied model, as in transformers.
        """
        head = next((name for name in self._stored if is_head(name)), None)
        embeddings = [self._stored[name] for name in self._stored if is_token_embedding(name)]
        if head is None or not is_tied(self.config):
            return head is not None
        return bool(embeddings) and not any(same_values(self._stored[head], embedding) for embedding in embeddings)

    def untie(self, head: str) -> None:
        """Add a tensor named `head` that equals the token embedding.

        Raises:
            WeightsError: there is no token embedding, or more than one.
        """
        embeddings = [name for name in self._stored if is_token_embedding(name)]
        if len(embeddings) != 1:
            raise WeightsError(
                f"{self.path} ties its head to the token embedding, and another checkpoint of this comparison has a "
                "separate head. Expected one token embedding to compare that head with, got "
                f"{', '.join(embeddings) or 'none'}. Save the tied one with tie_word_embeddings=False, and compare "
                "again."
            )
        self._stored[head] = self._stored[embeddings[0]]
        self.is_untied = self.own_head = True
        self._index()

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor in its stored dtype, checked to be finite.

        Do not edit it in place: while a reference exists, `load` returns the same object.

        Raises:
            WeightsError: the tensor does not exist, or contains NaN or infinity.
            CheckpointError: the file has changed or is truncated.
        """
        key = (name, str(device))
        held = self._alive.get(key)
        if held is not None:
            return held
        if name not in self._stored:
            raise WeightsError(f"{self.path} has no tensor '{name}'; it has {', '.join(list(self._stored)[:3])}, …")
        tensor = read_tensor(self._stored[name], name).to(device)
        self._alive[key] = tensor
        return tensor

    def load_expert(self, part: Part, device: torch.device | str = "cpu") -> Tensor:
        """The expert of a stack that contains a part, read alone; checks as in `load`."""
        stored = self._stored[part.tensor]
        assert part.expert is not None
        size = (stored.stop - stored.start) // stored.shape[0]
        start = stored.start + part.expert * size
        one = StoredTensor(stored.file, stored.dtype, stored.shape[1:], start, start + size)
        return read_tensor(one, part.tensor).to(device)

    def load_table(self, name: str) -> Tensor:
        """One integer or boolean tensor."""
        return read_tensor(self._tables[name], name)

    def table_equals(self, name: str, other: Checkpoint, other_name: str) -> bool:
        """Whether a table equals one of another checkpoint."""
        return same_values(self._tables[name], other._tables[other_name])

    def parts(self) -> list[Part]:
        """All matrices and vectors, see `parts_of`.

        If a tied checkpoint stores only the head, the head becomes the token embedding.
        """
        alone = is_tied(self.config) and not any(map(is_token_embedding, self._stored))
        parts = parts_of(self.config, self.shapes, self.own_head or alone)
        return [replace(p, place=TOKENS) if alone and is_head(p.tensor) else p for p in parts]


def open_checkpoint(path: str | Path) -> Checkpoint | Adapter:
    """A `Checkpoint`, or an `Adapter` if the folder has an `adapter_config.json`."""
    if (Path(path) / ADAPTER).is_file():
        return Adapter(path)
    return Checkpoint(path)
