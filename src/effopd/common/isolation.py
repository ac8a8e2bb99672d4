"""State that comes back: evaluations and searches must not disturb training's random numbers or
module modes.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block under its own random state and put back Python's, NumPy's and torch's (every
    device's) after it.

    Args:
        seed: seed all three generators for the block; `None` leaves them where they are on entry.

    The old state is restored even if the block raises. The same seed and the same tensor shapes
    give the same noise, which is what makes scores of two candidates *paired* (common random
    numbers).
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


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeoutError` inside the block once it has run for `seconds`.

    By an alarm signal, so only in the main thread of a POSIX process, and as soon as the
    interpreter is reached: a call that hangs inside native code is not interrupted. `None`, other
    threads and other systems: no limit.
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
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
