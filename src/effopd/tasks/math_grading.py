"""Grading of math answers in `\\boxed{}` with math-verify, under a hard time limit.

Only the last complete `\\boxed{…}` of a completion counts: text without one (a truncated answer, a number in passing)
scores 0. That is stricter than math-verify's own extraction, which would take the last number in the text, and it is
what the default prompt asks for. Equality is math-verify's: `\\frac12`, `1/2` and `0.5` are the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from effopd.errors import TaskError
from effopd.optional import require
from effopd.tasks.base import Example
from effopd.tasks.math_numbers import relative_comparison, same_plain_number, same_where_real
from effopd.tasks.math_text import Answer, read_answer, words_of
from effopd.tasks.reasoning import answer_part
from effopd.tasks.reference import too_long
from effopd.tasks.units import PERCENT
from effopd.tasks.worker import WorkerVerifier

#: What the default math prompt ends with.
MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."

#: What the parser misreads: digits in another base, whose base it leaves out, and numbers side by side, which it adds up.
_MISREAD = re.compile(r"\d\s*_|(?<![_^\d])\d+ +\d")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z])or(?![A-Za-z])|\\(?:lor|vee|cup)(?![a-zA-Z])")
#: What `\boxed` takes without braces: a number, a fraction, a root, a word, a letter.
_BARE = (
    r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?:\\%|%)?"
    r"|-?\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|-?\\(?:sqrt|text|mathrm|textbf)\s*\{[^{}]*\}"
    r"|\([A-J]\)|(?<=\s)[A-Za-z](?![A-Za-z])"
)
_BRACES = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{|(?P<bare>{_BARE}))|\\.|\{{|\}}", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{…}` (the innermost of nested ones), or `None`; linear in the text.

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

    Takes what follows the last `####` (GSM8K) or stands in the last `\\boxed{}` (MATH), then drops `$…$`.
    """
    answer = answer.rpartition("####")[2] if "####" in answer else (extract_boxed(answer) or answer)
    answer = answer.strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
    return answer


def render_boxed(answer: str) -> str:
    r"""A completion that gives `answer` the way math tasks ask for it: `The answer is \boxed{answer}.`"""
    return f"The answer is \\boxed{{{plain_answer(answer)}}}."


class MathVerifier(WorkerVerifier):
    r"""Verifier of math tasks: 1.0 when the last `\boxed{}` equals the example's answer, else 0.0.

    Gradings run in a process of their own (`GradingWorker`); `timeouts` and `errors` count those that scored 0 because
    grading them did not end in time or failed. Picklable.

    Args:
        timeout: hard limit of one grading, in seconds of wall-clock time.
    """

    def __init__(self, timeout: float = 5.0) -> None:
        super().__init__(f"{__name__}:grade_boxed", timeout)

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, each with its example.

        Raises:
            TaskError: an example has no reference answer.
            MissingDependencyError: math-verify is not installed (asked for at the first grading, not before: training
                without accuracy works without it).
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


def grade_boxed(boxed: str, gold: str) -> float:
    """1.0 when the two are the same answer. No time limit of its own: for the worker process."""
    if too_long(boxed) or too_long(gold):
        return 0.0
    expected = read_answer(gold)
    return float(_same(read_answer(boxed, unit_expected=expected.unit is not None), expected, boxed, gold))


def _same(answer: Answer, gold: Answer, boxed: str, written: str) -> bool:
    if answer.choice and gold.choice:
        return answer.choice == gold.choice
    if (gold.choice and not gold.value) or (answer.choice and not answer.value):
        return _choice_in(answer) == _choice_in(gold) is not None
    if answer.base or gold.base:
        return answer.value.upper() == gold.value.upper() and answer.base == gold.base
    words = words_of(boxed), words_of(written)
    if words[0] and words[0] == words[1]:
        return True
    value = answer.value
    if answer.unit and gold.unit and answer.unit != gold.unit:
        factor = answer.unit.factor_to(gold.unit)
        if factor is None:
            return False
        if factor != 1:
            value = rf"({value}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
    if _same_value(value, gold.value):
        return True
    percent, share = (answer.unit, gold) if answer.unit == PERCENT else (gold.unit, answer)
    if percent != PERCENT or share.unit is not None:
        return False
    other = value if share is gold else gold.value
    return _same_value(rf"\frac{{{other}}}{{100}}", share.value)


def _choice_in(answer: Answer) -> frozenset[str] | None:
    """The letter that an answer is, with or without a text of its own."""
    return answer.choice or (frozenset(answer.value) if re.fullmatch("[A-J]", answer.value) else None)


def _same_value(value: str, gold: str) -> bool:
    if value.replace(" ", "") == gold.replace(" ", ""):
        return bool(gold)
    if _MISREAD.search(value) or _MISREAD.search(gold):
        return False
    plain = same_plain_number(value, gold)
    if plain is not None:
        return plain
    from math_verify import verify

    parsed, expected = _parse(value), _parse(gold)
    with relative_comparison():
        if verify(expected, parsed, allow_set_relation_comp=True, timeout_seconds=None):
            return True
    return any(same_where_real(one, other) is True for one in expected for other in parsed)


@lru_cache(maxsize=4096)
def _parse(latex: str) -> Any:
    r"""What math-verify reads: expressions, and the text itself. `\pm` stands for both signs, "or" for a union."""
    if latex.count(r"\pm") == 1 and r"\mp" not in latex:
        latex = ", ".join(latex.replace(r"\pm", sign) for sign in "+-")
    alternatives = _OR.split(latex)
    if len(alternatives) > 1 and all(re.search(r"[<>]|\\[lg]e(?![a-z])", part) for part in alternatives):
        union = _union(alternatives)
        if union is not None:
            return [union]
    return _read(latex)


def _union(relations: Sequence[str]) -> Any:
    """The set of numbers for which one of several relations holds; `None` where they cannot be solved."""
    import sympy

    try:
        return sympy.Union(*(_read(relation)[0].as_set() for relation in relations))
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return None


def _read(latex: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # units are taken off before, where they are told from unknowns; nothing but the whole text is the answer
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    return parse(f"\\boxed{{{latex}}}", [LatexExtractionConfig(normalization_config=rules)], parsing_timeout=None)
