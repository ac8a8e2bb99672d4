r"""Equality of two math answers; imported only in the grading process, which sets the time limit.

Two answers are equal if their letters, units and values agree:

    letters   both are the same choice, or one has no letter and the values are equal
    units     equal or convertible (5 m and 500 cm), or one answer has none
    values    equal for math-verify, with numbers compared relative to their size (`math_numbers`);
              or, with unknowns, equal wherever both are real (\sqrt{1/n} and 1/\sqrt{n})

Differs from math-verify: answers are first normalized (`math_text`), units are distinguished from
unknowns (`units`; 2t is not 2), m and M are two unknowns, i is the imaginary unit if it is the only
letter, a pair is not a set of two, and only the whole content of the box counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from effopd.tasks.math_numbers import plain_number, same_plain_number, same_where_real
from effopd.tasks.math_rules import case_kept, own_comparison
from effopd.tasks.math_text import Answer, read_answer, tuple_of_named, words_of
from effopd.tasks.reference import too_long
from effopd.tasks.units import PERCENT

#: Text the parser misreads: numbers with a base, which it drops, and adjacent numbers, which it
#: adds.
_MISREAD = re.compile(r"\d\s*_|(?<![_^\d])\d+ +\d")
_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
#: A set in braces and a tuple in parentheses, neither with pairs inside.
_SET, _TUPLE = re.compile(r"\\\{[^(){}]*,[^(){}]*\\\}"), re.compile(r"\([^()]*,[^()]*\)")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z])or(?![A-Za-z])|\\(?:lor|vee|cup)(?![a-zA-Z])")


def grade_boxed(boxed: str, gold: str) -> float:
    """1.0 if the two answers are equal, otherwise 0.0. The worker process sets the time limit."""
    if too_long(boxed) or too_long(gold):
        return 0.0
    expected = read_answer(gold)
    return float(_same(read_answer(boxed, unit_expected=expected.unit is not None), expected, boxed, gold))


def _same(answer: Answer, gold: Answer, boxed: str, written: str) -> bool:
    if answer.choice and gold.choice:
        return answer.choice == gold.choice
    if (gold.choice and not gold.value) or (answer.choice and not answer.value):
        return _choice_in(answer, "[A-Ja-df-j]" if gold.choice else "[A-J]") == _choice_in(gold, "[A-J]") is not None
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
    if (answer.unit == PERCENT) == (gold.unit == PERCENT) or (answer.unit and gold.unit):
        return _same_value(value, gold.value)
    return _same_share(*((value, gold.value) if answer.unit == PERCENT else (gold.value, value)))


def _same_share(percent: str, number: str) -> bool:
    """Whether a percentage equals a number: as percent/100, or as percent unless |number| ≤ 1."""
    if _same_value(rf"\frac{{{percent}}}{{100}}", number):
        return True
    return not _within_one(number) and _same_value(percent, number)


def _within_one(number: str) -> bool:
    plain = plain_number(number)
    return plain is not None and abs(plain) <= 1


def _choice_in(answer: Answer, letters: str) -> frozenset[str] | None:
    """Choice of an answer, with or without text; otherwise its letter, if it matches `letters`."""
    return answer.choice or (frozenset(answer.value.upper()) if re.fullmatch(letters, answer.value) else None)


def _same_value(value: str, gold: str) -> bool:
    if _SPACE.sub("", value) == _SPACE.sub("", gold):
        return bool(gold)
    if _MISREAD.search(value) or _MISREAD.search(gold):
        return False
    if (_SET.fullmatch(value) and _TUPLE.fullmatch(gold)) or (_TUPLE.fullmatch(value) and _SET.fullmatch(gold)):
        return False
    named, expected_named = tuple_of_named(value), tuple_of_named(gold)
    if (named is None) != (expected_named is None):  # x = 1, y = 2 is (1, 2)
        value, gold = named or value, expected_named or gold
        if "=" not in value + gold:
            value, gold = (text if text.startswith("(") else f"({text})" for text in (value, gold))
    plain = same_plain_number(value, gold)
    if plain is not None:
        return plain
    parsed, expected = _parse(value), _parse(gold)
    with own_comparison():
        if verify(expected, parsed, allow_set_relation_comp=True, timeout_seconds=None):
            return True
    return any(same_where_real(one, other) is True for one in expected for other in parsed)


@lru_cache(maxsize=4096)
def _parse(latex: str) -> Any:
    r"""math-verify's reading: expressions and the text. `\pm` becomes both signs, "or" a union."""
    if latex.count(r"\pm") == 1 and r"\mp" not in latex:
        latex = ", ".join(latex.replace(r"\pm", sign) for sign in "+-")
    alternatives = _OR.split(latex)
    if len(alternatives) > 1 and all(re.search(r"[<>]|\\[lg]e(?![a-z])", part) for part in alternatives):
        union = _union(alternatives)
        if union is not None:
            return [union]
    return _read(latex)


def _union(relations: Sequence[str]) -> Any:
    """Set of numbers that satisfy one of several relations; `None`: they cannot be solved."""
    try:
        return sympy.Union(*(_read(relation)[0].as_set() for relation in relations))
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return None


def _read(latex: str) -> Any:
    # units are already removed, where they are distinguished from unknowns; the answer is the whole
    # text
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    with case_kept():
        read = parse(f"\\boxed{{{latex}}}", [LatexExtractionConfig(normalization_config=rules)], parsing_timeout=None)
    return [_complex(item) if isinstance(item, sympy.Basic) else item for item in read]


def _complex(expression: Any) -> Any:
    """Expression with i as the imaginary unit, if i is its only unknown."""
    unknowns = expression.free_symbols
    return (
        expression.xreplace(dict.fromkeys(unknowns, sympy.I))
        if {str(one) for one in unknowns} == {"i"}
        else expression
    )
