"""Generate, verify, and say how sure: pass@1 / avg@n with an interval.

Accuracy is the share of answers whose verifier score is 1. Partial credit (reasoning-gym gives
some) is kept in `mean_score` and counts as wrong in the accuracy. Trainers, scorers and commands
all call `evaluate`, so that an accuracy means the same everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.statistics import Interval, accuracy_interval
from effopd.errors import TaskError
from effopd.tasks.base import Example, Task
from effopd.tasks.generate import Completion, generate
from effopd.tasks.sampling import Sampling
from effopd.tasks.verify import check_score

#: A verifier score at or above this counts as correct.
CORRECT = 1.0 - 1e-9


def pass_at_k(n: int, correct: int, k: int) -> float:
    r"""Unbiased estimate of P(at least one of k samples is right): $1 - \binom{n-c}{k} /
    \binom{n}{k}$.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), eq.
    1.

    Raises:
        ValueError: k is not between 1 and n.

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

    `answers_found` is the number of answers in which the verifier found something to grade, over
    all samples; `None` where the verifier cannot tell.
    """

    examples: tuple[Example, ...]
    completions: list[list[Completion]]
    scores: list[list[float]]
    seconds: float
    answers_found: int | None = None

    @property
    def correct(self) -> list[list[bool]]:
        """Whether each answer's verifier score is 1."""
        return [[score >= CORRECT for score in row] for row in self.scores]

    @property
    def accuracy(self) -> Interval:
        """avg@n (pass@1) with its 95 % interval over prompts."""
        return accuracy_interval(self.correct)

    @property
    def mean_score(self) -> float:
        """Mean verifier score, partial credit included."""
        return float(np.mean([np.mean(row) for row in self.scores]))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer, end token included."""
        return [len(c.completion_ids) for row in self.completions for c in row]

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled in all."""
        return sum(self.lengths)

    @property
    def truncated_share(self) -> float:
        """Share of answers cut at the length limit (0–1)."""
        return self.answers_cut / len(self.lengths)

    @property
    def answers_cut(self) -> int:
        """Number of answers cut at the length limit."""
        return sum(c.truncated for row in self.completions for c in row)

    @property
    def answers_empty(self) -> int:
        """Number of answers without any text."""
        return sum(not c.text.strip() for row in self.completions for c in row)

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
            "generated_tokens": self.generated_tokens,
            "seconds": self.seconds,
        }

    def rows(self):
        """One JSON-ready dictionary an answer."""
        for example, completions, scores in zip(self.examples, self.completions, self.scores, strict=True):
            for sample, (completion, score) in enumerate(zip(completions, scores, strict=True)):
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
                }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> EvalResult:
    """Answer every example `sampling.n` times and grade the answers. The model's own sampling
    defaults are not used.

    Args:
        vocab_size, progress: as for `generate`.

    Raises:
        TaskError: the task is empty or an example has no answer to verify against.

    Example:
        >>> evaluate(model, tokenizer, task, Sampling(n=4, max_new_tokens=64)).accuracy  # doctest: +SKIP
    """
    if not task.verifiable:
        missing = next((example.id for example in task.examples if example.answer is None), None)
        raise TaskError(
            f"task '{task.name}' cannot be evaluated: "
            + (f"example '{missing}' has no answer." if missing is not None else "it has no examples.")
            + " Expected examples that all have an answer; use another task or fill in the `answer` column."
        )
    start, n = time.perf_counter(), sampling.n
    prompts = [example.prompt for example in task.examples]
    flat = generate(model, tokenizer, prompts, sampling, vocab_size=vocab_size, progress=progress)
    repeated = [example for example in task.examples for _ in range(n)]
    texts = [completion.marked for completion in flat]
    values = task.verify_batch(texts, repeated)
    grades = [check_score(value, example, task.name) for value, example in zip(values, repeated, strict=True)]
    gradable = task.answers_found(texts)
    return EvalResult(
        task.examples,
        completions=[flat[i : i + n] for i in range(0, len(flat), n)],
        scores=[grades[i : i + n] for i in range(0, len(flat), n)],
        seconds=time.perf_counter() - start,
        answers_found=None if gradable is None else sum(gradable),
    )
