"""Temporary replacements of three math-verify functions during grading.

numbers     equal relative to their size (`math_numbers`), also in sets, intervals and matrices
unknowns    keep their case: m and M, V_1 and v_1 differ; math-verify lowercases all names
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy2
from math_verify import grader, parser

from effopd.tasks.math_numbers import same_number, same_where_real


@contextmanager
def own_comparison() -> Iterator[None]:
    """Context in which math-verify compares numbers and unknowns as described above."""
    numeric, symbols = grader.sympy_numeric_eq, grader.sympy_compare_symbols

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        same = same_number(a, b)
        if same is not None:
            return same
        # math-verify drops small coefficients of unknowns, so a match is checked again
        return numeric(a, b, float_rounding, numeric_precision) and same_where_real(a, b) is not False

    def compare_symbols(a: Any, b: Any) -> bool:
        return symbols(a, b) and _letters(a) == _letters(b)

    grader.sympy_numeric_eq, grader.sympy_compare_symbols = numeric_eq, compare_symbols
    try:
        yield
    finally:
        grader.sympy_numeric_eq, grader.sympy_compare_symbols = numeric, symbols


@contextmanager
def case_kept() -> Iterator[None]:
    """Context in which math-verify keeps the case of unknowns."""
    original = parser.latex2sympy
    parser.latex2sympy = partial(original, conversion_config=latex2sympy2.ConversionConfig(lowercase_symbols=False))
    try:
        yield
    finally:
        parser.latex2sympy = original


def _letters(expression: Any) -> str:
    """Concatenated names of the unknowns in a symbol or product; Euler's number is "e"."""
    return "".join("e" if part == sympy.E else str(part) for part in expression.args or (expression,))
