"""Progress file of a supervised training: weights, optimizer states, random state, CPU seconds.

A training that continues from its file takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effopd.common.files import write_atomically


class Progress:
    """State of one training in the file `path`, saved every `every` steps.

    Attributes:
        cpu_seconds: CPU seconds of the training so far, over all processes that took part.
    """

    def __init__(self, path: Path, every: int = 25) -> None:
        self.path, self.every = path, every
        self.cpu_seconds, self._mark = 0.0, time.process_time()

    def restore(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rng: random.Random) -> int:
        """Load the saved state; returns the number of steps done, 0 without a file."""
        self._mark = time.process_time()
        if not self.path.exists():
            return 0
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        version, words, gauss = state["rng"]
        rng.setstate((version, tuple(words), gauss))
        self.cpu_seconds = state["cpu_seconds"]
        return int(state["step"])

    def after_step(
        self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rng: random.Random
    ) -> None:
        """Count the step's CPU seconds, and save the state after every `every` steps."""
        now = time.process_time()
        self.cpu_seconds, self._mark = self.cpu_seconds + now - self._mark, now
        if step % self.every:
            return
        version, words, gauss = rng.getstate()
        state = {
            "step": step, "model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers],
            "rng": (version, list(words), gauss), "cpu_seconds": self.cpu_seconds,
        }  # fmt: skip
        write_atomically(self.path, lambda path: torch.save(state, path))
