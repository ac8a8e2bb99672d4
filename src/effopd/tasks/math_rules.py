"""What math-verify does otherwise while it grades for us: three of its functions, exchanged for the
length of a block.

numbers     equal relative to their size (`math_numbers`), inside of sets, intervals and matrices too
unknowns    m and M, V_1 and v_1 are two of them: it writes all names in lower case
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
    """In this block math-verify compares numbers and unknowns as written above."""
    numeric, symbols = grader.sympy_numeric_eq, grader.sympy_compare_symbols

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        same = same_number(a, b)
        if same is not None:
            return same
        # it drops small coefficients of unknowns, so its yes is checked
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
    """In this block math-verify reads names of unknowns with the case that they have."""
    original = parser.latex2sympy
    parser.latex2sympy = partial(original, conversion_config=latex2sympy2.ConversionConfig(lowercase_symbols=False))
    try:
        yield
    finally:
        parser.latex2sympy = original


def _letters(expression: Any) -> str:
    """Names of the unknowns in a symbol or a product, one after the other; Euler's number is an
    e.
    """
    return "".join("e" if part == sympy.E else str(part) for part in expression.args or (expression,))
