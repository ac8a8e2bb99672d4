"""Fingerprints of models and tokenizers: SHA-256 of weights on disk and of a vocabulary.

The fingerprint of weights covers names, dtypes, shapes and values, but not their division into
files, so a resharded copy of a model has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from effopd.models.files import reading
from effopd.weights.checkpoint_files import find_weights, stored_tensors
from effopd.weights.safetensors_files import read_tensor

#: Files of a Hub repository that a fingerprint reads.
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json"]


def model_folder(flag: str, name: str, revision: str | None = None) -> Path:
    """Folder of a model; a Hub id is looked up in the cache and downloaded if it is not there.

    Args:
        flag: the flag that gave the name, for error messages.

    Raises:
        CompatibilityError: the repository cannot be read.
    """
    if Path(name).is_dir():
        return Path(name)
    with reading(flag, name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a model's tensors (name, dtype, shape, bytes), in the order of their names.

    Raises:
        CheckpointError: the folder has no readable safetensors files.
        WeightsError: a tensor is not finite.
    """
    stored = sorted(stored_tensors(find_weights(folder)).items())
    return tensors_sha256((name, read_tensor(each, name)) for name, each in stored)


@torch.no_grad()
def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors (name, dtype, shape, bytes) in the given order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary (token → id) and its end token."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()
