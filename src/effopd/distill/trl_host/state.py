"""Private attributes of a trainer, and of accelerate."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from transformers import Trainer
from trl import DistillationTrainer


def resumed_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint that the training loop now running was given.

    Callbacks are not told, and the trainer keeps no record, so this reads the argument of
    `Trainer._inner_training_loop` off the stack.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            checkpoint = frame.f_locals.get("resume_from_checkpoint")
            return Path(checkpoint) if checkpoint else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def drop_rollouts(trainer: Any) -> None:
    """Sample before the next micro-batch; nothing where the trainer has no rollouts."""
    if getattr(trainer, "_buffered_inputs", None) is not None:
        trainer._buffered_inputs = None


def rollouts_in_use(trainer: Any) -> tuple[int, Any]:
    """Micro-batches trained on so far, and the rollouts of TRL's reinforcement-learning
    trainers.
    """
    return trainer._step, trainer._buffered_inputs


def use_rollouts(trainer: Any, position: int, rollouts: Any) -> None:
    """Go on at a micro-batch with these rollouts, or with new ones if `None`."""
    trainer._step, trainer._buffered_inputs = position, rollouts


def mark_engine_stale(trainer: Any) -> None:
    """Have a vLLM engine take the weights before it samples again."""
    if getattr(trainer, "use_vllm", False):
        trainer._last_loaded_step = -1


def log_metrics(trainer: Any, metrics: Mapping[str, float]) -> bool:
    """Add to the next training row, which TRL averages; False where the trainer has no such
    buffer.
    """
    if not hasattr(trainer, "_metrics"):
        return False
    for name, value in metrics.items():
        trainer._metrics["train"][name].append(value)
    return True


def log_evaluation(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Log the row of an evaluation. TRL's own `log` would add the training metrics so far to it."""
    trainer._metrics["eval"].clear()
    Trainer.log(trainer, dict(metrics))


def has_trls_loss(trainer: Any) -> bool:
    """Whether a distillation trainer trains on TRL's own loss, of TRL's own hidden states."""
    kind = type(trainer)
    return (
        kind._compute_loss is DistillationTrainer._compute_loss
        and kind._get_last_hidden_state is DistillationTrainer._get_last_hidden_state
    )


def termination_handler(manager: Any) -> Any:
    """The handler of SIGTERM that a `CheckpointManager` has replaced, or `None`."""
    return manager._original_sigterm_handler


def save_weights(trainer: Any, folder: Path) -> None:
    """Write the model as a checkpoint has it."""
    trainer._save(str(folder))


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the states of optimizer and schedule as a checkpoint has them."""
    trainer._save_optimizer_and_scheduler(str(folder))


def save_scaler(trainer: Any, folder: Path) -> None:
    """Write the state of the gradient scaler, if there is one."""
    trainer._save_scaler(str(folder))


@contextmanager
def accelerate_undisturbed() -> Iterator[None]:
    """A second `TrainingArguments` resets accelerate's state, perhaps to another device and to one
    process; put it back.
    """
    states = (PartialState._shared_state, AcceleratorState._shared_state)
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, saved, strict=True):
            state.clear()
            state.update(before)
