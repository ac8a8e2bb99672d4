"""Checkpoint and resume of rollouts that several optimizer steps share.

With `num_iterations` > 1, or `steps_per_generation` above the accumulation, TRL's reinforcement
learning samples once per several steps: a cycle. So does distillation with `updates_per_rollouts`.
A checkpoint inside a cycle needs the cycle's rollouts and the position in it, and with
`replay_batches` every checkpoint needs the batches that later steps can draw. TRL saves none of
these: on resume it counts from 0 and samples again, while its data sampler continues in mid-cycle.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from effopd.common.distributed import all_gather_object, rank, world_size
from effopd.distill.replay import ReplayBuffer
from effopd.distill.teachers.kept import for_checkpoint
from effopd.distill.trl_host.state import rollouts_in_use, use_rollouts

logger = logging.getLogger(__name__)

#: Key of the replay buffer's batches in the file.
_REPLAY = "replay"


def rollouts_file(part: int, parts: int) -> str:
    """File name of one process's rollouts in a checkpoint: `effopd_rollouts-00001-of-00008.pt`."""
    return f"effopd_rollouts-{part:05d}-of-{parts:05d}.pt"


class RolloutCycleCallback(TrainerCallback):
    """Saves each process's rollouts with a mid-cycle checkpoint and restores them on resume.

    Args:
        trainer: a `RunMixin` trainer.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    @property
    def _shape(self) -> list[int]:
        """Settings that must match for saved rollouts to be usable."""
        args = self._trainer.args
        parts = getattr(args, "num_mini_batches", 1)
        return [
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            *self._factors,
            *([parts] if parts > 1 else []),  # older checkpoints have none
        ]

    @property
    def _factors(self) -> tuple[int, int]:
        """Micro-batches per cycle, as a product."""
        args = self._trainer.args
        if updates := getattr(args, "updates_per_rollouts", None):
            return args.gradient_accumulation_steps, updates
        return args.steps_per_generation, self._trainer.num_iterations

    @property
    def _inside(self) -> bool:
        trainer = self._trainer
        position, _ = rollouts_in_use(trainer)
        return position % math.prod(self._factors) != 0

    @property
    def _replay(self) -> ReplayBuffer | None:
        return getattr(self._trainer, "replay", None)

    @property
    def _needed(self) -> bool:
        """Whether a later step trains on rollouts that exist."""
        return self._inside or self._replay is not None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Set TRL's position to the data sampler's: micro-batches done in this epoch.

        An epoch holds whole cycles.
        """
        trainer = self._trainer
        steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        position = state.global_step % steps * args.gradient_accumulation_steps
        use_rollouts(trainer, position, None)
        if self._replay is not None:
            self._replay.restore([])
        if not self._needed or state.global_step == 0:
            return
        saved = self._saved(trainer.resumed_from / rollouts_file(rank(), world_size()))
        complete = all(all_gather_object(saved is not None))
        if saved is not None and complete:
            if self._replay is not None:
                self._replay.restore(saved[_REPLAY])
            if self._inside:
                rollouts, restored = saved["rollouts"], getattr(trainer, "rollouts_restored", None)
                if rollouts is not None and restored is not None:
                    rollouts = restored(rollouts)
                use_rollouts(trainer, position, send_to_device(rollouts, trainer.accelerator.device))
        elif rank() == 0:
            logger.warning(
                "Step %d needs earlier rollouts, because steps share them (updates_per_rollouts, num_iterations or "
                "replay_batches), and %s has none for %d process(es) and these batch sizes. New ones take their "
                "place, so this run will differ from an uninterrupted one.",
                state.global_step + 1,
                trainer.resumed_from,
                world_size(),
            )

    def _saved(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True)
        fits = saved["shape"] == self._shape and (self._replay is None or _REPLAY in saved)
        return saved if fits else None

    def save_state(self, folder: Path) -> None:
        """Write this process's rollouts into a checkpoint folder, if later steps need them."""
        if not self._needed:
            return
        saved: dict[str, Any] = {"shape": self._shape}
        if self._inside:
            _, rollouts = rollouts_in_use(self._trainer)  # `None`: an accepted jump dropped them
            saved["rollouts"] = rollouts and list(map(for_checkpoint, rollouts))
        if self._replay is not None:
            saved[_REPLAY] = [list(map(for_checkpoint, batch)) for batch in self._replay.batches]
        torch.save(saved, folder / rollouts_file(rank(), world_size()))
