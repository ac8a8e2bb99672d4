"""Load and check the training and held-out prompts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from effopd.launch.preflight import check_task
from effopd.tasks import Task, TaskConfig, load_task
from effopd.tasks.kinds import Split


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
        why: sentence that names the settings that need reference answers to the training prompts;
            "": none does, so the rows can lack answers and their verifier is not checked.
        keep: as for `load_task`.
    """
    train = load_task(task, "train", answers_required=bool(why), why=why, keep=keep)
    held_out = None
    if evaluates(args):
        held_out = load_task(task, "eval", why=f"Answers are needed because of {evaluation_flag(args)}.", keep=keep)
    lengths = [
        check_task(part, tokenizer, task.max_prompt_length, args.chat_template_kwargs, graded=graded)
        for part, graded in ((train, bool(why)), (held_out, True))
        if part is not None
    ]
    return Prompts(train, held_out, max((length for length in lengths if length is not None), default=None))


def more_prompts(prompts: int, available: int | None) -> str:
    """What gives a task more training prompts, for messages.

    Args:
        prompts: number of training prompts.
        available: number that the source could give; `None`: any number.
    """
    if available is None or available > prompts:
        return "raise --train_size"
    return "add rows to the source; those held out for evaluation (--eval_size) do not count"


def evaluates(args: Any) -> bool:
    """Whether a run evaluates on held-out prompts."""
    return args.eval_strategy != "no" or bool(args.eval_on_start)


def evaluation_flag(args: Any) -> str:
    """The flag because of which a run evaluates."""
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    return "--eval_on_start" if strategy == "no" else f"--eval_strategy {strategy}"


def graded_splits(args: Any, why: str) -> list[Split]:
    """The splits whose completions are graded; `why` is that of `load_prompts`."""
    splits: list[Split] = ["train"] if why else []
    return [*splits, "eval"] if evaluates(args) else splits
