"""`Task`: prompts, optional reference answers, and a verifier.

A `Task` is plain data plus one function. Trainers read `Task.to_dataset()` (TRL's `prompt` column);
evaluation and scorers call `Task.verify(completion, example)`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from effopd.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

#: Plain text, or chat messages (`[{"role": "user", "content": …}]`) for the chat template.
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answer.

    Attributes:
        id: unique within its task.
        prompt: text or chat messages.
        answer: reference answer; `None`: the row has none. Training does not need it, verification
            usually does.
        metadata: other data for the verifier (JSON-serializable).
    """

    id: str
    prompt: Prompt
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


#: `verify(completion, example)` → score in [0, 1]. The completion is the decoded text without
#: special tokens, but with the reasoning and its tags. If the prompt opens the reasoning, the text
#: starts with the opening tag, such as `<think>`.
Verifier = Callable[[str, Example], float]


#: Verdicts of verifiers that run programs. "refused": nothing was run; there is no program.
VERDICTS = ("passed", "wrong", "error", "timeout", "memory", "refused")


@dataclass(frozen=True)
class Grading:
    """Grade of a completion.

    Attributes:
        score: in [0, 1].
        verdict: one of `VERDICTS`; `None`: the verifier has only scores.
        detail: what failed, for people.
    """

    score: float
    verdict: str | None = None
    detail: str = ""


def verdict_counts(gradings: Sequence[Grading]) -> dict[str, int] | None:
    """Number of completions by verdict, with zeros; `None`: the verifier has only scores."""
    verdicts = [grading.verdict for grading in gradings]
    return {name: verdicts.count(name) for name in VERDICTS} if any(verdicts) else None


@dataclass(frozen=True)
class Task:
    """Named examples with the function that grades a completion.

    Attributes:
        name: name in messages, e.g. `"math:data/train.jsonl"`.
        examples: the prompts, in order.
        verify: the verifier. A verifier object can also have `verify_batch(completions, examples)`
            and `answer_found(completion)`, which returns whether there is an answer to grade,
            `sought`, which names what it looks for, and `grade_batch(completions, examples)`, which
            returns `Grading` objects with verdicts.
        render_answer: writes a reference answer as a completion in the verifier's format, e.g. in
            `\\boxed{}`; `None`: the bare answer is already in that format.
        needs_answers: whether the verifier needs `Example.answer`; some use only the metadata.
        available: number of examples this split could have; `None`: examples are generated.

    Example:
        >>> example = Example("0", "Say hi", "hi")
        >>> task = Task("echo", (example,), lambda text, example: float(text == example.answer))
        >>> task.verify("hi", example)
        1.0
    """

    name: str
    examples: tuple[Example, ...]
    verify: Verifier
    render_answer: Callable[[str], str] | None = None
    needs_answers: bool = True
    available: int | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def has_answers(self) -> bool:
        """Whether there is at least one example and every example has a reference answer."""
        return bool(self.examples) and all(example.answer is not None for example in self.examples)

    @property
    def verifiable(self) -> bool:
        """Whether completions of every example can be graded."""
        return bool(self.examples) and (self.has_answers or not self.needs_answers)

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, one per example; one call if the verifier has batches."""
        batch = getattr(self.verify, "verify_batch", None)
        if batch is not None:
            return list(batch(completions, examples))
        return [self.verify(text, example) for text, example in zip(completions, examples, strict=True)]

    def grade_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grading]:
        """Scores of several completions, with verdicts if the verifier has them."""
        batch = getattr(self.verify, "grade_batch", None)
        if batch is not None:
            return list(batch(completions, examples))
        return [Grading(score) for score in self.verify_batch(completions, examples)]

    def answers_found(self, completions: Sequence[str]) -> list[bool] | None:
        """Whether each completion has an answer; `None`: the verifier cannot detect answers."""
        answer_found = getattr(self.verify, "answer_found", None)
        return None if answer_found is None else [bool(answer_found(text)) for text in completions]

    @property
    def sought(self) -> str:
        """What the verifier looks for in a completion, for messages."""
        return getattr(self.verify, "sought", "answer to grade")

    def subset(self, examples: Sequence[Example]) -> Task:
        """The same task with other examples."""
        return replace(self, examples=tuple(examples))

    def sample(self, size: int, seed: int) -> Task:
        """`size` examples sampled without replacement, in sampling order.

        Raises:
            TaskError: the task has fewer than `size` examples, or `size < 1`.
        """
        if not 1 <= size <= len(self):
            raise TaskError(
                f"cannot sample {size} examples from task '{self.name}': expected a size from 1 to {len(self)}, "
                "the number of examples. Lower the size or add rows to the task."
            )
        return self.subset(random.Random(seed).sample(self.examples, size))

    def to_dataset(self) -> Dataset:
        """A `datasets.Dataset` with columns `id`, `prompt`, `answer` and `metadata` (JSON text)."""
        from datasets import Dataset

        return Dataset.from_list(
            [
                {
                    "id": example.id,
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "metadata": json.dumps(dict(example.metadata), default=str),
                }
                for example in self.examples
            ]
        )
