r"""Grading of math answers in `\boxed{}`, under a hard time limit.

Only the last complete `\boxed{…}` after the reasoning counts: text without one (a truncated answer,
a guess inside `<think>`, a number in passing) scores 0. That is stricter than math-verify's own
extraction, which would take the last number in the text, and it is what the default prompt asks
for. `math_equality` says when two answers are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from effopd.common.optional import require
from effopd.errors import TaskError
from effopd.tasks.base import Example
from effopd.tasks.reasoning import answer_part
from effopd.tasks.worker import WorkerVerifier

#: What the default math prompt ends with.
MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."

#: What `\boxed` takes without braces: a number, a fraction, a root, a word, a letter.
_BARE = (
    r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?:\\%|%)?"
    r"|-?\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|-?\\(?:sqrt|text|mathrm|textbf)\s*\{[^{}]*\}"
    r"|\([A-J]\)|(?<=\s)[A-Za-z](?![A-Za-z])"
)
_BRACES = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{|(?P<bare>{_BARE}))|\\.|\{{|\}}", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{…}` (the innermost of nested ones), or `None`; linear
    in the text.

    `\boxed 7` without braces counts too, and `\fbox`.

    Example:
        >>> extract_boxed(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    stack: list[int | None] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if match.group("bare"):
            best = match.span("bare") if best is None or match.start() > best[0] else best
        elif len(token) > 2:
            stack.append(match.end())
        elif token == "{":
            stack.append(None)
        elif token == "}" and stack:
            start = stack.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[best[0] : best[1]].strip()


def plain_answer(answer: str) -> str:
    """A reference answer reduced to the expression itself.

    Takes what follows the last `####` (GSM8K) or stands in the last `\\boxed{}` (MATH), then drops
    `$…$`.
    """
    answer = answer.rpartition("####")[2] if "####" in answer else (extract_boxed(answer) or answer)
    answer = answer.strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
    return answer


def render_boxed(answer: str) -> str:
    r"""A completion that gives `answer` the way math tasks ask for it: `The answer is
    \boxed{answer}.`
    """
    return f"The answer is \\boxed{{{plain_answer(answer)}}}."


class MathVerifier(WorkerVerifier):
    r"""Verifier of math tasks: 1.0 when the last `\boxed{}` equals the example's answer, else 0.0.

    Gradings run in a process of their own (`GradingWorker`); `timeouts` and `errors` count those
    that scored 0 because grading them did not end in time or failed. Picklable.

    Args:
        timeout: hard limit of one grading, in seconds of wall-clock time.
    """

    def __init__(self, timeout: float = 5.0) -> None:
        super().__init__("effopd.tasks.math_equality:grade_boxed", timeout)

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, each with its example.

        Raises:
            TaskError: an example has no reference answer.
            MissingDependencyError: math-verify is not installed (asked for at the first grading,
                not before: training without accuracy works without it).
        """
        scores = [0.0] * len(completions)
        pending: list[tuple[int, tuple[Any, ...], str]] = []
        for index, (completion, example) in enumerate(zip(completions, examples, strict=True)):
            if example.answer is None:
                raise TaskError(
                    f"cannot grade example '{example.id}': expected a reference answer, got none. Give the row an "
                    "'answer', or evaluate without accuracy."
                )
            boxed, gold = extract_boxed(answer_part(completion)), plain_answer(example.answer)
            if boxed == gold:
                scores[index] = 1.0
            elif boxed:
                pending.append((index, (boxed, gold), example.id))
        if pending:
            require("math_verify")
        graded = self.worker.score_many([call for _, call, _ in pending], [label for _, _, label in pending])
        for (index, _, _), score in zip(pending, graded, strict=True):
            scores[index] = score
        return scores

    def answer_found(self, completion: str) -> bool:
        r"""Whether there is a `\boxed{}` that is not empty, outside of the reasoning."""
        return bool(extract_boxed(answer_part(completion)))
