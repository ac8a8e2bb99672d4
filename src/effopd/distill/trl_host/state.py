"""Private attributes of trainers and of accelerate: rollouts, metrics, saving, global state."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object
from transformers import Trainer
from trl import DistillationTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid


def resumed_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint that the running training loop resumes from; `None`: none.

    The host neither passes it to callbacks nor stores it, so this reads the argument of
    `Trainer._inner_training_loop` from the call stack.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            checkpoint = frame.f_locals.get("resume_from_checkpoint")
            return Path(checkpoint) if checkpoint else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def drop_rollouts(trainer: Any) -> None:
    """Discard buffered rollouts, so that the next micro-batch samples new ones."""
    if getattr(trainer, "_buffered_inputs", None) is not None:
        trainer._buffered_inputs = None


def rollouts_in_use(trainer: Any) -> tuple[int, Any]:
    """Position in micro-batches and buffered rollouts of a TRL reinforcement-learning trainer."""
    return trainer._step, trainer._buffered_inputs


def use_rollouts(trainer: Any, position: int, rollouts: Any) -> None:
    """Set position and buffered rollouts; `rollouts=None`: sample new ones."""
    trainer._step, trainer._buffered_inputs = position, rollouts


def split_rollouts(rollouts: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """A micro-batch in parts of equally many rows, in order; images stay with their rows."""
    divided = split_tensor_dict(split_pixel_values_by_grid(rollouts), parts)
    return [unsplit_pixel_values_by_grid(part) for part in divided]


#: A step so far back that every interval since it has passed.
_LONG_AGO = -(2**31)


def mark_engine_stale(trainer: Any) -> None:
    """Make a vLLM engine reload the weights before it samples again."""
    if getattr(trainer, "use_vllm", False):
        trainer._last_loaded_step = -1
        if hasattr(trainer, "_last_vllm_sync_step"):  # GOLD, IW-OPD: the next step is due, however rarely they sync
            trainer._last_vllm_sync_step = _LONG_AGO


def log_metrics(trainer: Any, metrics: Mapping[str, float]) -> bool:
    """Add metrics to TRL's buffer, which it averages into the next training row.

    Returns:
        False: the trainer has no such buffer.
    """
    if not hasattr(trainer, "_metrics"):
        return False
    for name, value in metrics.items():
        trainer._metrics["train"][name].append(value)
    return True


def log_answers(trainer: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> None:
    """Add this process's prompts and answers, as token ids, to TRL's table of completions."""
    if trainer.log_completions:
        for name, ids in (("prompt", prompts), ("completion", answers)):
            texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
            trainer._logs[name].extend(gather_object(texts))


@contextmanager
def loss_undisturbed(trainer: Any, model: Any) -> Iterator[None]:
    """In this block, `compute_loss` computes the training loss and leaves no trace in the trainer.

    Trainers choose the normalization of training by the mode of the outermost module. So that
    module is in training mode, and the modules inside keep theirs. Logged metrics and counters are
    restored.
    """
    numbers = {name: value for name, value in vars(trainer).items() if isinstance(value, int | float)}
    metrics = vars(trainer).get("_metrics")
    outermost = {id(each): each for each in (trainer.model, model)}.values()
    modes = [(each, each.training) for each in outermost]
    if metrics is not None:
        trainer._metrics = deepcopy(metrics)
    try:
        for each, _ in modes:
            each.training = True
        yield
    finally:
        for each, mode in modes:
            each.training = mode
        if metrics is not None:
            trainer._metrics = metrics
        vars(trainer).update(numbers)


def log_evaluation(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Log an evaluation row, bypassing TRL's `log`, which adds buffered metrics to it."""
    trainer._metrics["eval"].clear()
    Trainer.log(trainer, dict(metrics))


def has_trls_loss(trainer: Any) -> bool:
    """Whether a distillation trainer uses TRL's own loss and hidden states."""
    kind = type(trainer)
    return (
        kind._compute_loss is DistillationTrainer._compute_loss
        and kind._get_last_hidden_state is DistillationTrainer._get_last_hidden_state
    )


def termination_handler(manager: Any) -> Any:
    """The SIGTERM handler that a `CheckpointManager` replaced, or `None`."""
    return manager._original_sigterm_handler


def save_weights(trainer: Any, folder: Path) -> None:
    """Write the model in checkpoint format."""
    trainer._save(str(folder))


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the states of optimizer and schedule in checkpoint format."""
    trainer._save_optimizer_and_scheduler(str(folder))


def save_scaler(trainer: Any, folder: Path) -> None:
    """Write the state of the gradient scaler, if any."""
    trainer._save_scaler(str(folder))


@contextmanager
def accelerate_undisturbed() -> Iterator[None]:
    """Restore accelerate's global state after this block.

    Building a second `TrainingArguments` resets it, possibly to another device and one process.
    """
    states = (PartialState._shared_state, AcceleratorState._shared_state)
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, saved, strict=True):
            state.clear()
            state.update(before)
