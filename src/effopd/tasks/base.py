"""What a task is: prompts, known answers where there are any, and a verifier.

A `Task` is plain data plus one function. Trainers read `Task.to_dataset()` (TRL's `prompt` column),
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

#: A prompt is plain text, or chat messages (`[{"role": "user", "content": …}]`) that get the chat
#: template.
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        id: unique within its task.
        prompt: text or chat messages.
        answer: the reference answer, or `None` when the row has none (training needs none,
            verification does).
        metadata: whatever the verifier needs besides the answer (JSON-serialisable).
    """

    id: str
    prompt: Prompt
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


#: `verify(completion, example)` → score in [0, 1]; the completion is the decoded text without
#: special tokens, reasoning and its marks included. Where the prompt itself opened the reasoning,
#: the text starts with that mark, such as `<think>`.
Verifier = Callable[[str, Example], float]


@dataclass(frozen=True)
class Task:
    """Named examples with the function that grades a completion.

    Attributes:
        name: what messages call it, e.g. `"math:data/train.jsonl"`.
        examples: the prompts, in order.
        verify: the verifier. A verifier object may also have `verify_batch(completions, examples)`
            and `answer_found(completion)`, which says whether there is anything to grade.
        render_answer: a completion that gives a reference answer in the form the verifier looks
            for, e.g. in `\\boxed{}`; `None` when the bare answer is that form.
        needs_answers: whether the verifier needs `Example.answer`; some grade by the metadata
            alone.
        available: how many examples there were to take these from; `None` where they are generated.

    Example:
        >>> task = Task("echo", (Example("0", "Say hi", "hi"),), lambda text, example: float(text == example.answer))
        >>> task.verify("hi", task.examples[0])
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
        """Scores of several completions, each with its example; one exchange where the verifier
        grades in batches.
        """
        batch = getattr(self.verify, "verify_batch", None)
        if batch is not None:
            return list(batch(completions, examples))
        return [self.verify(text, example) for text, example in zip(completions, examples, strict=True)]

    def answers_found(self, completions: Sequence[str]) -> list[bool] | None:
        """Whether the verifier finds an answer in each completion; `None` where it cannot tell."""
        answer_found = getattr(self.verify, "answer_found", None)
        return None if answer_found is None else [bool(answer_found(text)) for text in completions]

    def subset(self, examples: Sequence[Example]) -> Task:
        """The same task over other examples."""
        return replace(self, examples=tuple(examples))

    def sample(self, size: int, seed: int) -> Task:
        """`size` examples drawn without replacement by a private random generator, in drawing
        order.

        Raises:
            TaskError: fewer than `size` examples, or `size < 1`.
        """
        if not 1 <= size <= len(self):
            raise TaskError(
                f"cannot draw {size} examples from task '{self.name}': expected a size between 1 and {len(self)} "
                "(the number of examples it has). Lower the size or give the task more rows."
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
