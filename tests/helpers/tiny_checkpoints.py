"""Tiny checkpoints and trajectories on disk, for tests of everything that reads weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import make_model

STEPS = (0, 1, 2, 4, 8)
#: Leading directions that the analyses of these checkpoints keep.
K = 4


def save_base(path: Path, seed: int = 0) -> Path:
    """A random two-layer Qwen3 model, fp32, tied embeddings, without a tokenizer."""
    make_model(seed).save_pretrained(path)
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], like: Path) -> Path:
    """A checkpoint with these tensors and the config of another."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(like / "config.json", path)
    return path


def save_trained(path: Path, base: Path, seed: int, size: float = 1e-2) -> Path:
    """The base plus noise in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: w + size * torch.randn(w.shape, generator=generator) for name, w in tensors_of(base).items()}
    return save_tensors(path, tensors, base)


def save_trajectory(root: Path, base: Path, seed: int, steps: Sequence[int] = STEPS, noise: float = 0.3) -> Path:
    """A run directory whose weights move along a fixed direction, plus a random walk; step 0 is the
    base.
    """
    generator = torch.Generator().manual_seed(seed)
    start = tensors_of(base)
    direction = {name: 1e-2 * torch.randn(w.shape, generator=generator) for name, w in start.items()}
    walk = {name: torch.zeros_like(w) for name, w in start.items()}
    for step in steps:
        if step:
            for name, w in start.items():
                walk[name] += noise * 1e-2 * torch.randn(w.shape, generator=generator)
        moved = {name: w + step / steps[-1] * direction[name] + walk[name] for name, w in start.items()}
        save_tensors(root / "trajectory" / f"step-{step:06d}", moved, base)
    return root


def save_runs(root: Path) -> Path:
    """A base, two seeds of a trajectory (`opd-1`, `opd-2`) and a lone trained checkpoint (`rl`)."""
    base = save_base(root / "base")
    for seed in (1, 2):
        save_trajectory(root / f"opd-{seed}", base, seed)
    save_trained(root / "rl", base, 3)
    return root


def trained(folders: Path) -> dict[str, Path | list[Path]]:
    """The runs of `save_runs` as `analyze` takes them."""
    return {"opd": [folders / "opd-1", folders / "opd-2"], "rl": folders / "rl"}
