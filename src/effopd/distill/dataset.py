"""Checks of a trainer's data: a `prompt` column, enough rows for one step, gradable answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import IterableDataset

from effopd.errors import ConfigError, TaskError
from effopd.tasks.base import Task
from effopd.tasks.verify import check_gradable


def check_dataset(dataset: Any, batch: int) -> None:
    """Check that `dataset` has prompts, and enough of them for one step.

    Args:
        dataset: a trainer's `train_dataset`.
        batch: prompts per step, over all processes.

    Raises:
        ConfigError: no dataset, or fewer rows than one step takes (the host then trains no step).
        TaskError: not a dataset, or no column `prompt`.
    """
    if dataset is None:
        raise ConfigError("train_dataset is missing: expected a dataset with a column 'prompt'.")
    _check_kind("train_dataset", dataset)
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


def check_stream(dataset: Any, updates: int) -> None:
    """Check that the prompts of a stream are not to be repeated; only a sampler repeats them.

    Args:
        dataset: a trainer's `train_dataset`.
        updates: optimizer steps per batch of rollouts.

    Raises:
        ConfigError: several steps per batch of rollouts, and the dataset is a stream.
    """
    if updates > 1 and isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"updates_per_rollouts={updates} needs a train_dataset with a length, because a sampler repeats its "
            "prompts: expected a Dataset, got an IterableDataset, of which later steps would skip prompts. Store the "
            "rows with datasets.Dataset.from_list(list(stream.take(N))), or set updates_per_rollouts=1."
        )


def check_eval_task(task: Any) -> None:
    """Check that a trainer's `eval_task` is a task whose answers can be graded; `None` is accepted.

    Raises:
        TaskError: it is something else, an example lacks an answer, or the verifier returns no
            score.
    """
    if task is None:
        return
    if not isinstance(task, Task):
        raise TaskError(
            f"eval_task: expected an effopd.Task, got {type(task).__name__}. Build Task(name, examples, verify), or "
            "pass a dataset as eval_dataset."
        )
    check_gradable(task)


def check_eval_dataset(dataset: Any, task: Task | None, strategy: Any) -> None:
    """Check a trainer's `eval_dataset`, which can be several by name.

    Args:
        task: the trainer's `eval_task`.
        strategy: `args.eval_strategy`.

    Raises:
        ConfigError: evaluations are set, and there are neither a dataset nor a task for them.
        TaskError: it is no dataset.
    """
    for each in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        if isinstance(each, Task):
            raise TaskError("eval_dataset: expected a dataset, got a Task. Pass it as eval_task.")
        _check_kind("eval_dataset", each)
    if dataset is None and task is None and strategy != "no":
        raise ConfigError(
            f"eval_strategy={getattr(strategy, 'value', strategy)!r} needs data: expected eval_task (held-out KL and "
            "accuracy) or eval_dataset (the host's loss), got neither. Pass one, or set eval_strategy='no'."
        )


def _check_kind(name: str, dataset: Any) -> None:
    """Refuse things that are often passed in place of a dataset, each with its fix."""
    kind = type(dataset).__name__
    if isinstance(dataset, Task):
        fix = "Pass task.to_dataset()."
    elif isinstance(dataset, Mapping):
        fix = f"Pass one of its parts: {', '.join(map(str, dataset)) or 'it has none'}."
    elif isinstance(dataset, str) or hasattr(dataset, "__fspath__"):
        fix = "Read it first, for example with datasets.load_dataset('json', data_files=…, split='train')."
    elif kind == "DataFrame":
        fix = "Convert it: datasets.Dataset.from_pandas(frame)."
    else:
        return
    raise TaskError(f"{name}: expected a dataset with a column 'prompt', got a {kind}. {fix}")
