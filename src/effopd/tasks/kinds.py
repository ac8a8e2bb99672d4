"""`TASK_KINDS`: kinds of source of prompts, `KIND:NAME`, and how each is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from effopd.tasks.base import Task

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Request:
    """One split of one source.

    Attributes:
        name: the part of the task after the colon.
        args: parameters of the source (`task_args`).
        split: "train" or "eval".
        size: number of examples; `None`: the default of the kind.
        held_out: whether the evaluation is held out from this source.
        excluded: keys (`question_key`) of questions to leave out.
        seed: the same request with the same seed must give the same examples.
        timeout: seconds for grading one completion.
        answers_required: whether every example must have a reference answer.
        why: sentence for the error message about the feature that needs the answers.
        setting: name of the setting that holds `args`, for messages.
        keep: columns to keep in the examples' metadata.
    """

    name: str
    args: Mapping[str, Any]
    split: Split
    size: int | None
    held_out: bool
    excluded: frozenset[str]
    seed: int
    timeout: float
    answers_required: bool
    why: str
    setting: str
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskKind:
    """One kind of source.

    Attributes:
        load: returns the examples of a request, with bare questions as prompts, and their verifier.
        form: what follows the colon, for messages.
        suffix: instruction appended to every question. `None`: prompts are used as they are, and
            `prompt_suffix`, `system_prompt` and `as_chat` do not apply.
    """

    load: Callable[[Request], Task]
    form: str = "NAME"
    suffix: str | None = ""


#: Kinds by name, the part of a task before the colon. `load.py` adds those of the package.
TASK_KINDS: dict[str, TaskKind] = {}
