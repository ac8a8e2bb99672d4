"""The training and held-out prompts of a run, checked against each other and the tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from effopd.launch.preflight import check_task
from effopd.tasks import Task, TaskConfig, load_task


class Prompts(NamedTuple):
    """Training and held-out prompts, and the longest of both in tokens, if a tokenizer measured
    them.
    """

    train: Task
    held_out: Task | None
    longest: int | None


def load_prompts(task: TaskConfig, args: Any, tokenizer: Any, why: str) -> Prompts:
    """Training and held-out prompts, checked; held out only if the run evaluates.

    Args:
        tokenizer: the student's, or `None`: prompts are not measured then.
        why: what needs reference answers, as a sentence; "" if nothing does.
    """
    train = load_task(task, "train", answers_required=bool(why), why=why)
    held_out = load_task(task, "eval", why=why) if evaluates(args) else None
    lengths = [
        check_task(part, tokenizer, task.max_prompt_length, **(args.chat_template_kwargs or {}))
        for part in (train, held_out)
        if part is not None
    ]
    return Prompts(train, held_out, max((length for length in lengths if length is not None), default=None))


def evaluates(args: Any) -> bool:
    """Whether a run measures itself on held-out prompts."""
    return args.eval_strategy != "no" or bool(args.eval_on_start)
