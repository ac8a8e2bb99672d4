"""State that comes back: evaluations and searches must not disturb training's random numbers or module modes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block under its own random state and put back Python's, NumPy's and torch's (every device's) after it.

    Args:
        seed: seed all three generators for the block; `None` leaves them where they are on entry.

    The old state is restored even if the block raises. The same seed and the same tensor shapes give the same noise,
    which is what makes scores of two candidates *paired* (common random numbers).
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = range(torch.accelerator.device_count()) if accelerator is not None else ()
    device_type = accelerator.type if accelerator is not None else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=device_type):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every submodule gets its own mode back, even if the block raises."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
