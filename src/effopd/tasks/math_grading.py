r"""Grading of math answers in `\boxed{}`, with a hard time limit.

Only the last complete `\boxed{…}` after the reasoning counts. Text without one scores 0: a
truncated answer, a guess inside `<think>`, a number in passing. math-verify's own extraction is
looser and takes the last number in the text. `math_equality` defines when two answers are equal.
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

#: End of the default math prompt.
MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."

#: Content of `\boxed` without braces: a number, a fraction, a root, a word or a letter.
_BARE = (
    r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?:\\%|%)?"
    r"|-?\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|-?\\(?:sqrt|text|mathrm|textbf)\s*\{[^{}]*\}"
    r"|\([A-J]\)|(?<=\s)[A-Za-z](?![A-Za-z])"
)
_BRACES = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{|(?P<bare>{_BARE}))|\\.|\{{|\}}", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{…}`, or `None`; of nested boxes, the innermost.

    `\boxed 7` without braces and `\fbox` also count. Linear time in the length of the text.

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
    """Final expression of a reference answer.

    Takes the text after the last `####` (GSM8K) or in the last `\\boxed{}` (MATH), and removes
    `$…$`.
    """
    answer = answer.rpartition("####")[2] if "####" in answer else (extract_boxed(answer) or answer)
    answer = answer.strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
    return answer


def render_boxed(answer: str) -> str:
    r"""Completion with an answer in the format of math tasks: `The answer is \boxed{answer}.`"""
    return f"The answer is \\boxed{{{plain_answer(answer)}}}."


class MathVerifier(WorkerVerifier):
    r"""Math verifier: 1.0 if the last `\boxed{}` equals the example's answer, otherwise 0.0.

    Grading runs in a separate process (`GradingWorker`). `timeouts` and `errors` count answers that
    scored 0 because grading exceeded the limit or failed. Picklable.

    Args:
        timeout: hard wall-clock limit of one grading, in seconds.
    """

    #: What a completion must contain, for messages.
    sought = "\\boxed{}"

    def __init__(self, timeout: float = 5.0) -> None:
        super().__init__("effopd.tasks.math_equality:grade_boxed", timeout)

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, one per example.

        Raises:
            TaskError: an example has no reference answer.
            MissingDependencyError: math-verify is not installed. Checked only when an answer needs
                it, because training without accuracy works without it.
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
        r"""Whether there is a non-empty `\boxed{}` outside the reasoning."""
        return bool(extract_boxed(answer_part(completion)))
