"""Check of a trainer's training dataset: a `prompt` column and enough rows for one step."""

from __future__ import annotations

from typing import Any

from effopd.errors import ConfigError, TaskError


def check_dataset(dataset: Any, batch: int) -> None:
    """Check that `dataset` has prompts, and enough of them for one step.

    Args:
        dataset: a trainer's `train_dataset`.
        batch: prompts per step, over all processes.

    Raises:
        ConfigError: no dataset, or fewer rows than one step takes (the host then trains no step).
        TaskError: no column `prompt`.
    """
    if dataset is None:
        raise ConfigError("train_dataset is missing: expected a dataset with a column 'prompt'.")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise TaskError(
            "train_dataset: expected a column 'prompt' (text, or a list of messages), got "
            f"{', '.join(columns) or 'none'}."
            + (
                " Rename 'messages', without the answers: dataset.rename_column('messages', 'prompt')."
                * ("messages" in columns)
            )
        )
    rows = len(dataset) if hasattr(dataset, "__len__") else batch
    if rows < batch:
        raise ConfigError(
            f"a step takes {batch} prompts but train_dataset has {rows}. Lower per_device_train_batch_size or "
            "gradient_accumulation_steps, or add rows."
        )
