"""Generated tasks of the reasoning-gym library, graded by the library's own scorers.

The answer is the text in the completion's last `<answer>` tags after the reasoning. The score is
the library's, with partial credit: only 1.0 is correct. Without tags the score is 0.0, although
some of the library's scorers give a little credit for a missing answer.

Differs from the library: it seeds question i with `seed + i`, so neighboring seeds give nearly the
same questions. Here every (task_seed, split) has its own seed, and no question occurs twice.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields
from functools import lru_cache
from typing import Any

from effopd.common.optional import require
from effopd.errors import TaskError
from effopd.tasks.base import Example
from effopd.tasks.reasoning import answer_part
from effopd.tasks.tagged_answers import extract_tagged
from effopd.tasks.worker import WorkerVerifier

#: End of the default reasoning-gym prompt.
GYM_SUFFIX = "\nThink step by step, then give only the final answer between <answer> and </answer>."

#: Draws per requested question before the source counts as exhausted.
_DRAWS_PER_QUESTION = 10


def gym_examples(
    name: str, params: Mapping[str, Any], *, split: str, size: int, seed: int, excluded: AbstractSet[str] = frozenset()
) -> tuple[Example, ...]:
    """`size` distinct questions outside `excluded`; the same arguments give the same questions.

    Each example's metadata holds the library's complete `entry`, which its scorer needs.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
        TaskError: the dataset or a parameter is unknown, the library rejects a value, or there are
            too few distinct questions.
    """
    _check_params(name, params)
    examples: list[Example] = []
    seen = set(excluded)
    draws = 0
    for entry in _entries(name, params, split, size, seed):
        draws += 1
        question = entry["question"].strip()
        if question not in seen:
            seen.add(question)
            examples.append(Example(f"{split}-{len(examples)}", question, entry["answer"], {"entry": entry}))
        if len(examples) == size:
            return tuple(examples)
    raise TaskError(
        f"reasoning-gym dataset '{name}' with {dict(params)}: expected {size} distinct questions for the {split} split"
        f"{' that are not in the evaluation' if excluded else ''}, got {len(examples)} in {draws} draws. Lower "
        f"{split}_size or widen the parameters in task_args."
    )


class ReasoningGymVerifier(WorkerVerifier):
    """reasoning-gym's `score_answer` in a separate process with a hard time limit. Picklable.

    Args:
        name: reasoning-gym dataset.
        params: parameters of the dataset.
        timeout: hard wall-clock limit of one grading, in seconds.
    """

    #: What a completion must contain, for messages.
    sought = "<answer> tags"

    def __init__(self, name: str, params: Mapping[str, Any] | None = None, timeout: float = 5.0) -> None:
        require("reasoning_gym")
        self.name = name
        self.params = json.dumps(dict(params or {}), sort_keys=True)
        super().__init__(f"{__name__}:grade_gym", timeout, imports=("reasoning_gym",))

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, one per example.

        Raises:
            TaskError: an example is not from reasoning-gym.
        """
        answers = [extract_tagged(answer_part(completion)) for completion in completions]
        scores = [0.0] * len(answers)
        pending: list[int] = []
        for index, (answer, example) in enumerate(zip(answers, examples, strict=True)):
            if "entry" not in example.metadata:
                raise TaskError(
                    f"cannot grade example '{example.id}': expected reasoning-gym's 'entry' in its metadata, got "
                    f"{sorted(example.metadata)}. Use examples made by load_task."
                )
            if answer is not None:
                pending.append(index)
        calls = [(self.name, self.params, answers[index], examples[index].metadata["entry"]) for index in pending]
        graded = self.worker.score_many(calls, [examples[index].id for index in pending])
        for index, score in zip(pending, graded, strict=True):
            scores[index] = score
        return scores

    def answer_found(self, completion: str) -> bool:
        """Whether there are non-empty `<answer>` tags outside the reasoning."""
        return bool((extract_tagged(answer_part(completion)) or "").strip())


@lru_cache(maxsize=8)
def _scorer(name: str, params: str) -> Any:
    return require("reasoning_gym").create_dataset(name, size=1, seed=0, **json.loads(params))


def grade_gym(name: str, params: str, answer: str, entry: dict[str, Any]) -> float:
    """The library's score of an answer. The worker process sets the time limit."""
    return float(_scorer(name, params).score_answer(answer, entry))


def _entries(name: str, params: Mapping[str, Any], split: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Bounded stream of the library's entries, in chunks with their own seeds."""
    create_dataset = require("reasoning_gym").create_dataset
    chunk_size = max(size, 10)
    for chunk in range(_DRAWS_PER_QUESTION):
        try:
            digest = hashlib.sha256(f"{seed}/{split}/{chunk}".encode()).digest()
            # 31 bits: some of the library's datasets reject seeds above 2**32
            dataset = create_dataset(name, size=chunk_size, seed=int.from_bytes(digest[:4], "big") >> 1, **params)
            entries = iter(dataset)
        except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise _rejected(name, params, error) from error
        for _ in range(chunk_size):
            try:
                entry = next(entries)
            except (AssertionError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
                raise _rejected(name, params, error) from error
            yield entry


def _rejected(name: str, params: Mapping[str, Any], error: Exception) -> TaskError:
    return TaskError(
        f"reasoning-gym dataset '{name}': expected valid parameters, got {dict(params)}. The library raised "
        f"{type(error).__name__}: {error}. Correct task_args."
    )


def _check_params(name: str, params: Mapping[str, Any]) -> None:
    require("reasoning_gym")
    datasets = require("reasoning_gym.factory").DATASETS
    if name not in datasets:
        raise TaskError(
            f"reasoning-gym has no dataset '{name}': expected one of its {len(datasets)} names. "
            f"{_similar(name, datasets)}"
        )
    names = {item.name for item in fields(datasets[name][1])} - {"seed", "size"}
    for param in params:
        if param in ("seed", "size"):
            remedy = "task_seed" if param == "seed" else "train_size and eval_size"
            raise TaskError(f"task_args: expected no '{param}' for reasoning-gym, got one. Use {remedy} instead.")
        if param not in names:
            raise TaskError(
                f"reasoning-gym dataset '{name}' has no parameter '{param}': expected any of "
                f"{', '.join(sorted(names))}. {_similar(param, names)}"
            )


def _similar(name: str, known: Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.4)
    return f"Did you mean {', '.join(close)}?" if close else "Its documentation lists them."
