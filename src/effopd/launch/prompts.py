"""Load and check the training and held-out prompts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from effopd.launch.preflight import check_task
from effopd.tasks import Task, TaskConfig, load_task


class Prompts(NamedTuple):
    """Training and held-out prompts, and the length of the longest prompt in tokens.

    `held_out` is `None` without evaluation, `longest` is `None` if it was not measured.
    """

    train: Task
    held_out: Task | None
    longest: int | None


def load_prompts(task: TaskConfig, args: Any, tokenizer: Any, why: str, *, keep: Sequence[str] = ()) -> Prompts:
    """Load and check the training prompts and, if the run evaluates, the held-out prompts.

    Args:
        tokenizer: the student's. `None`: prompt lengths are not measured.
        why: sentence that names the settings that need reference answers; "" if there are none.
        keep: as for `load_task`.
    """
    train = load_task(task, "train", answers_required=bool(why), why=why, keep=keep)
    held_out = load_task(task, "eval", why=why, keep=keep) if evaluates(args) else None
    lengths = [
        check_task(part, tokenizer, task.max_prompt_length, **(args.chat_template_kwargs or {}))
        for part in (train, held_out)
        if part is not None
    ]
    return Prompts(train, held_out, max((length for length in lengths if length is not None), default=None))


def evaluates(args: Any) -> bool:
    """Whether a run evaluates on held-out prompts."""
    return args.eval_strategy != "no" or bool(args.eval_on_start)
