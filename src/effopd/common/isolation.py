"""Context managers that restore RNG state and module modes, and a time limit.

They keep evaluations and searches from changing the random numbers or modes of training.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the RNG state of Python, NumPy and torch (all devices) after the block.

    The state is restored even if the block raises. The same seed and tensor shapes give the same
    noise, so the scores of two candidates are *paired* (common random numbers).

    Args:
        seed: seeds all three generators on entry. `None`: the block starts from the current state.
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
                if accelerator is not None:
                    torch.manual_seed(seed)
                else:  # the same without a stack trace for each backend that is absent
                    torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards every submodule is back in its own previous mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeoutError` inside the block once it has run for `seconds`.

    Uses SIGALRM, so a call that hangs in native code is not interrupted. A timer that runs outside
    the block goes on after it. A timer that the block itself sets replaces the limit. There is no
    limit if `seconds` is `None`, outside the main thread, or on a system other than POSIX.
    """
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(signum, frame):
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    start, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)
