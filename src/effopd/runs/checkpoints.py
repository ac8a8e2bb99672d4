"""What a checkpoint must hold so that a run can go on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effopd.errors import CheckpointError, EffOPDError

LEDGER_FILE, SETTINGS_FILE = "effopd_ledger.json", "effopd_settings.json"
#: Files of transformers' checkpoints, whose own constants take seconds to import.
TRAINER_STATE, SCHEDULER, OPTIMIZERS = "trainer_state.json", "scheduler.pt", ("optimizer.pt", "optimizer.bin")
_ADAPTER = "adapter_model.*"
_WEIGHTS = ("model*.safetensors", "pytorch_model*", _ADAPTER, f"*/{_ADAPTER}", "global_step*")
_OPTIMIZER = (*OPTIMIZERS, "optimizer_*")


def check_complete(checkpoint: Path, *, finished: bool | None = None) -> None:
    """A checkpoint has everything that an equal continuation takes; of a finished run, only the
    weights are needed.

    Args:
        finished: whether the run is; default: whether it had reached its own limit when the
            checkpoint was written.

    Raises:
        CheckpointError: its state cannot be read, or its weights, the optimizer's or the schedule's
            state, or the random states are not there (`save_only_model` leaves the last three out).
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text())
        step, last = int(state["global_step"]), int(state["max_steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(checkpoint, TRAINER_STATE, error) from error

    def there(*patterns: str) -> bool:
        return any(next(checkpoint.glob(pattern), None) for pattern in patterns)

    parts = {"the weights": there(*_WEIGHTS)}
    if not (step >= last if finished is None else finished):
        if not there("global_step*"):  # DeepSpeed keeps the rest in there
            parts["the optimizer's state (optimizer.pt)"] = there(*_OPTIMIZER)
            parts["the schedule's (scheduler.pt)"] = there(SCHEDULER)
        parts["the random states (rng_state.pth)"] = there("rng_state*.pth")
    if missing := [name for name, found in parts.items() if not found]:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: it lacks {', '.join(missing)}. "
            + ("" if "the weights" in missing else "--save_only_model leaves them out. ")
            + "Without them the run would go on as another one. Resume from a complete checkpoint"
            + (
                "."
                if "the weights" in missing
                else f", or train anew from its weights (step {step}): --model_name_or_path "
                f"{checkpoint} with another --output_dir, and no --resume_from_checkpoint."
            )
        )


def check_kind(checkpoint: Path, *, adapter: bool) -> None:
    """The checkpoint holds what the run trains.

    Raises:
        CheckpointError: one is an adapter and the other all weights.
    """
    holds = any(next(checkpoint.glob(pattern), None) for pattern in (_ADAPTER, f"*/{_ADAPTER}"))
    sharded = any(next(checkpoint.glob(pattern), None) for pattern in ("global_step*", "pytorch_model_fsdp*"))
    if holds != adapter and not (sharded and not holds):
        kinds = {True: "an adapter (PEFT)", False: "all weights"}
        raise CheckpointError(
            f"{checkpoint} holds {kinds[holds]}, but this run trains {kinds[adapter]}. Resume "
            "with the settings of the run "
            f"({'--use_peft true' if holds else 'without --use_peft'}), or start a new one."
        )


def damaged(checkpoint: Path, what: str, error: Exception) -> CheckpointError:
    """The error of a part that is there and cannot be used."""
    return CheckpointError(
        f"{what} in {checkpoint} cannot be read: {type(error).__name__}: "
        f"{' '.join(str(error).split())[:400]}. It is damaged, or "
        "belongs to another model or other settings. Resume from an earlier checkpoint, with the settings of the run."
    )


@contextmanager
def reading(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    """Around the host's loading of a part: its failures become a `CheckpointError` that names the
    part.
    """
    try:
        yield
    except EffOPDError:
        raise
    except Exception as error:
        raise damaged(Path(checkpoint or "."), what, error) from error
