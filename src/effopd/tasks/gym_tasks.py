"""Generated tasks of the reasoning-gym library, graded by the library itself.

The completion's answer is what stands in its last `<answer>` tags, and its score is the library's,
which knows partial credit: 1.0 is a correct answer, anything below is not. Without tags the score
is 0.0 (some of the library's scorers give a little for no answer at all; that is not passed on).

Departs from the library in one point: it seeds question i with `seed + i`, so neighbouring seeds
give nearly the same questions. Here every (task_seed, split) gets a seed of its own, and no
question comes twice.
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
from effopd.tasks.worker import WorkerVerifier

#: What the default reasoning-gym prompt ends with.
GYM_SUFFIX = "\nThink step by step, then give only the final answer between <answer> and </answer>."

#: Questions drawn at most for each one wanted, before the source counts as exhausted.
_DRAWS_PER_QUESTION = 10
_CLOSE_TAG = "</answer>"


def render_tagged(answer: str) -> str:
    """A completion that gives `answer` the way reasoning-gym tasks ask for it."""
    return f"<answer>{answer}</answer>"


def gym_examples(
    name: str, params: Mapping[str, Any], *, split: str, size: int, seed: int, excluded: AbstractSet[str] = frozenset()
) -> tuple[Example, ...]:
    """`size` distinct questions that are not in `excluded`; the same arguments give the same
    questions.

    Each example's metadata has the library's whole `entry`, which its scorer needs.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
        TaskError: an unknown dataset or parameter, a value the library rejects, or too few distinct
            questions.
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
    """Verifier with reasoning-gym's own `score_answer`, in a process of its own with a hard time
    limit. Picklable.

    Args:
        name: reasoning-gym dataset.
        params: its parameters.
        timeout: hard limit of one grading, in seconds of wall-clock time.
    """

    def __init__(self, name: str, params: Mapping[str, Any] | None = None, timeout: float = 5.0) -> None:
        require("reasoning_gym")
        self.name = name
        self.params = json.dumps(dict(params or {}), sort_keys=True)
        super().__init__(f"{__name__}:grade_gym", timeout, imports=("reasoning_gym",))

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, each with its example.

        Raises:
            TaskError: an example that does not come from reasoning-gym.
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
        """Whether there are `<answer>` tags with something between them, outside of the
        reasoning.
        """
        return bool((extract_tagged(answer_part(completion)) or "").strip())


def extract_tagged(completion: str) -> str | None:
    """The library's `extract_answer`: what stands in the last `<answer>` tags, or `None`."""
    end = completion.rfind(_CLOSE_TAG)
    if end < 0:
        return None
    extract_answer = require("reasoning_gym.utils").extract_answer
    return extract_answer(completion[: end + len(_CLOSE_TAG)])  # cut, or unclosed tags make the search quadratic


@lru_cache(maxsize=8)
def _scorer(name: str, params: str) -> Any:
    return require("reasoning_gym").create_dataset(name, size=1, seed=0, **json.loads(params))


def grade_gym(name: str, params: str, answer: str, entry: dict[str, Any]) -> float:
    """The library's score of `answer`. No time limit of its own: for the worker process."""
    return float(_scorer(name, params).score_answer(answer, entry))


def _entries(name: str, params: Mapping[str, Any], split: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """A bounded stream of the library's entries, in chunks of `size` with seeds of their own."""
    create_dataset = require("reasoning_gym").create_dataset
    chunk_size = max(size, 10)
    for chunk in range(_DRAWS_PER_QUESTION):
        try:
            digest = hashlib.sha256(f"{seed}/{split}/{chunk}".encode()).digest()
            # 31 bits: some of the library's datasets take no seed above 2**32
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
        f"reasoning-gym dataset '{name}': expected parameters it can work with, got {dict(params)}; the library says: "
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
