"""Evaluation of a model on a task: sampled answers, verifier scores, accuracy with an interval.

Accuracy (avg@n, pass@1) is the share of answers with verifier score 1. Partial credit, as in
reasoning-gym, enters only `mean_score`. Trainers, scorers and commands all call `evaluate`, so
accuracy has the same meaning everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.statistics import Interval, accuracy_interval
from effopd.tasks.base import Example, Grading, Task, verdict_counts
from effopd.tasks.generate import Completion, generate
from effopd.tasks.sampling import Sampling
from effopd.tasks.verify import check_score, check_verifiable

#: A verifier score at or above this counts as correct.
CORRECT = 1.0 - 1e-9


def pass_at_k(n: int, correct: int, k: int) -> float:
    r"""$1 - \binom{n-c}{k} / \binom{n}{k}$: unbiased estimate of P(at least one of k is right).

    Args:
        n: number of samples.
        correct: number of right samples, c.
        k: number of samples in pass@k.

    Raises:
        ValueError: k is not between 1 and n.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, eq. 1

    Example:
        >>> pass_at_k(4, 2, 1), pass_at_k(4, 2, 3)
        (0.5, 1.0)
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k={k}, n={n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


@dataclass(frozen=True)
class EvalResult:
    """Graded answers: `completions[i][j]` and `scores[i][j]` belong to sample j of example i.

    `gradings` has the verdicts of the same answers; empty if the verifier has only scores.

    `answers_found` is the number of completions, over all samples, with an answer to grade; `None`:
    the verifier cannot detect answers. `seconds` covers generation and grading.
    """

    examples: tuple[Example, ...]
    completions: list[list[Completion]]
    scores: list[list[float]]
    seconds: float
    answers_found: int | None = None
    gradings: tuple[tuple[Grading, ...], ...] = ()

    @property
    def correct(self) -> list[list[bool]]:
        """Whether each answer's verifier score is 1."""
        return [[score >= CORRECT for score in row] for row in self.scores]

    @property
    def accuracy(self) -> Interval:
        """Mean accuracy over all samples (avg@n) with its 95 % interval over prompts."""
        return accuracy_interval(self.correct)

    @property
    def mean_score(self) -> float:
        """Mean verifier score (0–1), including partial credit."""
        return float(np.mean([np.mean(row) for row in self.scores]))

    @property
    def lengths(self) -> list[int]:
        """Length of each answer in tokens, including the end token."""
        return [len(c.completion_ids) for row in self.completions for c in row]

    @property
    def generated_tokens(self) -> int:
        """Total number of sampled tokens."""
        return sum(self.lengths)

    @property
    def truncated_share(self) -> float:
        """Share (0–1) of answers cut at the length limit."""
        return self.answers_cut / len(self.lengths)

    @property
    def answers_cut(self) -> int:
        """Number of answers cut at the length limit."""
        return sum(c.truncated for row in self.completions for c in row)

    @property
    def answers_empty(self) -> int:
        """Number of empty answers."""
        return sum(not c.text.strip() for row in self.completions for c in row)

    @property
    def verdicts(self) -> dict[str, int] | None:
        """Number of answers by verdict; `None`: the verifier has only scores."""
        return verdict_counts([grading for row in self.gradings for grading in row])

    def pass_at(self, k: int) -> float:
        """Mean unbiased pass@k over the prompts."""
        return float(np.mean([pass_at_k(len(row), sum(row), k) for row in self.correct]))

    def summary(self) -> dict[str, Any]:
        """A JSON-ready summary; `pass@k` for k = 1, 2, 4, … up to the number of samples."""
        n = min(len(row) for row in self.scores)
        ks = [2**i for i in range(n.bit_length())]
        interval = self.accuracy
        return {
            "prompts": len(self.examples),
            "samples_per_prompt": n,
            f"avg@{n}": interval.mean,
            "ci95_low": interval.low,
            "ci95_high": interval.high,
            **{f"pass@{k}": self.pass_at(k) for k in ks},
            "mean_score": self.mean_score,
            "mean_length": float(np.mean(self.lengths)),
            "max_length": max(self.lengths),
            "truncated_share": self.truncated_share,
            "answers_found": self.answers_found,
            "answers_cut": self.answers_cut,
            "answers_empty": self.answers_empty,
            **({} if self.verdicts is None else {"verdicts": self.verdicts}),
            "generated_tokens": self.generated_tokens,
            "seconds": self.seconds,
        }

    def rows(self):
        """One JSON-ready dictionary per answer."""
        for index, (example, completions) in enumerate(zip(self.examples, self.completions, strict=True)):
            for sample, (completion, score) in enumerate(zip(completions, self.scores[index], strict=True)):
                grading = self.gradings[index][sample] if self.gradings else None
                yield {
                    "id": example.id,
                    "sample": sample,
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "completion": completion.text,
                    "tokens": len(completion.completion_ids),
                    "truncated": completion.truncated,
                    "score": score,
                    "correct": score >= CORRECT,
                    **({} if grading is None else {"verdict": grading.verdict, "detail": grading.detail}),
                }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    seen: Callable[[Sequence[Completion]], object] | None = None,
) -> EvalResult:
    """Sample `sampling.n` answers per example and grade them.

    The sampling defaults in the model's `generation_config` are not used.

    Args:
        vocab_size: as for `generate`.
        progress: as for `generate`.
        seen: as for `generate`.

    Raises:
        TaskError: the task is empty, an example lacks the reference answer that the verifier needs,
            or a score is not a number in [0, 1].

    Example:
        >>> sampling = Sampling(n=4, max_new_tokens=64)
        >>> evaluate(model, tokenizer, task, sampling).accuracy  # doctest: +SKIP
    """
    check_verifiable(task)
    start, n = time.perf_counter(), sampling.n
    prompts = [example.prompt for example in task.examples]
    flat = generate(model, tokenizer, prompts, sampling, vocab_size=vocab_size, progress=progress, seen=seen)
    repeated = [example for example in task.examples for _ in range(n)]
    texts = [completion.marked for completion in flat]
    graded = task.grade_batch(texts, repeated)
    grades = [check_score(each.score, example, task.name) for each, example in zip(graded, repeated, strict=True)]
    with_verdicts = verdict_counts(graded) is not None
    gradable = task.answers_found(texts)
    return EvalResult(
        task.examples,
        completions=[flat[i : i + n] for i in range(0, len(flat), n)],
        scores=[grades[i : i + n] for i in range(0, len(flat), n)],
        seconds=time.perf_counter() - start,
        answers_found=None if gradable is None else sum(gradable),
        gradings=tuple(tuple(graded[i : i + n]) for i in range(0, len(flat), n)) if with_verdicts else (),
    )
