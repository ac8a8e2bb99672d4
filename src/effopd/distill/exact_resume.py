"""Bit-exact resume: the data order of every epoch, and a clean stop after SIGTERM."""

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
    """TRL's prompt sampler with a permutation that depends only on (seed, epoch).

    Epoch 0 has TRL's own order.
    """

    def __init__(self, sampler: Any):
        self._sampler = sampler
        if sampler.shuffle:
            self.generator = sampler.generator  # accelerate synchronizes it across processes

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Seed the permutation of an epoch; accelerate calls this before each, also on resume."""
        if self._sampler.shuffle and self._sampler.seed is not None:
            self._sampler.generator.manual_seed(self._sampler.seed + epoch)


class TerminationCallback(TrainerCallback):
    """`enable_jit_checkpoint`: after SIGTERM, finish, log and save the step, then stop training.

    The host alone saves before the step's look-ahead, or during it with the random state of the
    next step; such a checkpoint does not resume exactly. Must run after every callback that changes
    the weights.

    Attributes:
        stopped: whether the last training was stopped before its last step.
    """

    def __init__(self, manager: Any):
        self._manager = manager
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if any(all_gather_object(self._manager.is_checkpoint_requested)):
            control.should_save = control.should_training_stop = True
            self.stopped = state.global_step < state.max_steps
            logger.warning("SIGTERM received: saving a checkpoint of step %d and stopping.", state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if (handler := termination_handler(self._manager)) is not None:
            signal.signal(signal.SIGTERM, handler)


class EpochCallback(TrainerCallback):
    """Calls the sampler's `set_epoch` when an epoch begins.

    accelerate calls it too, but not through the wrapper that a resume on several processes adds.
    """

    def __init__(self) -> None:
        self.sampler: EpochSampler | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch))
