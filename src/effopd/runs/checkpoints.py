"""Checks that a checkpoint is complete and of the right kind for resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effopd.errors import CheckpointError, EffOPDError

LEDGER_FILE, SETTINGS_FILE = "effopd_ledger.json", "effopd_settings.json"
TEACHERS_FILE, INPUTS_FILE = "teachers.json", "inputs.json"
#: Files of transformers' checkpoints, whose own constants take seconds to import.
TRAINER_STATE, SCHEDULER, OPTIMIZERS = "trainer_state.json", "scheduler.pt", ("optimizer.pt", "optimizer.bin")
_ADAPTER = "adapter_model.*"
_WEIGHTS = ("model*.safetensors", "pytorch_model*", _ADAPTER, f"*/{_ADAPTER}", "global_step*")
_OPTIMIZER = (*OPTIMIZERS, "optimizer_*")


def check_complete(checkpoint: Path, *, finished: bool | None = None) -> None:
    """Check that a checkpoint has all parts for an exact resume; a finished run needs only weights.

    Args:
        finished: whether the run is finished; default: whether it had reached its last step when
            the checkpoint was written.

    Raises:
        CheckpointError: the trainer state cannot be read, or weights, optimizer state, schedule
            state or random states are missing (`save_only_model` leaves out the last three).
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text())
        step, last = int(state["global_step"]), int(state["max_steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(checkpoint, TRAINER_STATE, error) from error

    def exists(*patterns: str) -> bool:
        return any(next(checkpoint.glob(pattern), None) for pattern in patterns)

    parts = {"the weights": exists(*_WEIGHTS)}
    if not (step >= last if finished is None else finished):
        if not exists("global_step*"):  # DeepSpeed keeps the rest in this folder
            parts["the optimizer's state (optimizer.pt)"] = exists(*_OPTIMIZER)
            parts["the schedule's (scheduler.pt)"] = exists(SCHEDULER)
        parts["the random states (rng_state.pth)"] = exists("rng_state*.pth")
    if missing := [name for name, present in parts.items() if not present]:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: it lacks {', '.join(missing)}. "
            + ("" if "the weights" in missing else "--save_only_model leaves them out. ")
            + "An exact resume needs them. Resume from a complete checkpoint"
            + (
                "."
                if "the weights" in missing
                else f", or start a new run from its weights (step {step}): --model_name_or_path "
                f"{checkpoint} with another --output_dir, and no --resume_from_checkpoint."
            )
        )


def check_kind(checkpoint: Path, *, adapter: bool) -> None:
    """Check that checkpoint and run are both an adapter, or both all weights.

    Raises:
        CheckpointError: one is an adapter and the other is all weights.
    """
    holds = any(next(checkpoint.glob(pattern), None) for pattern in (_ADAPTER, f"*/{_ADAPTER}"))
    sharded = any(next(checkpoint.glob(pattern), None) for pattern in ("global_step*", "pytorch_model_fsdp*"))
    if holds != adapter and not (sharded and not holds):
        kinds = {True: "an adapter (PEFT)", False: "all weights"}
        raise CheckpointError(
            f"{checkpoint} holds {kinds[holds]}, but this run trains {kinds[adapter]}. Resume with the run's settings "
            f"({'--use_peft true' if holds else 'without --use_peft'}), or start a new run."
        )


def damaged(checkpoint: Path, what: str, error: Exception) -> CheckpointError:
    """The error for a part of a checkpoint that exists and cannot be used."""
    return CheckpointError(
        f"{what} in {checkpoint} cannot be read: {type(error).__name__}: "
        f"{' '.join(str(error).split())[:400]}. It is damaged, or belongs to another model or other settings. Resume "
        "from an earlier checkpoint, with the run's settings."
    )


@contextmanager
def reading(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    """In this block, turn any failure to load `what` into a `CheckpointError` that names it."""
    try:
        yield
    except EffOPDError:
        raise
    except Exception as error:
        raise damaged(Path(checkpoint or "."), what, error) from error
