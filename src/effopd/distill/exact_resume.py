"""What makes a resumed run equal an uninterrupted one: the data order of every epoch, and where
SIGTERM stops training.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback

from effopd.common.distributed import all_gather_object
from effopd.distill.trl_host.state import termination_handler

logger = logging.getLogger(__name__)


class EpochSampler(Sampler[int]):
    """TRL's sampler of prompts, whose permutation becomes a function of (seed, epoch); epoch 0 is
    TRL's own order.
    """

    def __init__(self, sampler: Any):
        self._sampler = sampler
        if sampler.shuffle:
            self.generator = sampler.generator  # accelerate keeps it the same on all processes

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch, also the one a resume starts in."""
        if self._sampler.shuffle and self._sampler.seed is not None:
            self._sampler.generator.manual_seed(self._sampler.seed + epoch)


class TerminationCallback(TrainerCallback):
    """`enable_jit_checkpoint`: after a SIGTERM the step is finished, logged and saved, and training
    stops.

    The host would save before the look-ahead of that step, or in its middle with the random state
    of the next, so that the run could not go on as if it had not been stopped. Must run after every
    callback that changes the weights.
    """

    def __init__(self, manager: Any):
        self._manager = manager

    def on_step_end(self, args, state, control, **kwargs):
        if any(all_gather_object(self._manager.is_checkpoint_requested)):
            control.should_save = control.should_training_stop = True
            logger.warning("SIGTERM: training stops with a checkpoint of step %d.", state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if (handler := termination_handler(self._manager)) is not None:
            signal.signal(signal.SIGTERM, handler)


class EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins. accelerate does, too, but not through what a resume on
    several processes wraps around it."""

    def __init__(self) -> None:
        self.sampler: EpochSampler | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch))
