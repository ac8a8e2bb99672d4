"""The dataset that a trainer is given."""

from __future__ import annotations

from typing import Any

from effopd.errors import ConfigError, TaskError


def check_dataset(dataset: Any, batch: int) -> None:
    """There are prompts to train on, and enough for a step.

    Args:
        dataset: what a trainer is given.
        batch: prompts of a step, over all processes.

    Raises:
        ConfigError: no dataset, or fewer rows than a step takes: the host would train no step.
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
            f"a step takes {batch} prompts but train_dataset has {rows}: lower per_device_train_batch_size or "
            "gradient_accumulation_steps, or give more rows."
        )
