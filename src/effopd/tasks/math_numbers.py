r"""Equality of two numbers relative to their size, as a replacement for math-verify's rounding.

With m = max(|a|, |b|), a equals b if:

    both are exact       |a − b| ≤ 1e-40 m
    one is a decimal     |a − b| ≤ min(5e-7, 1e-5 m), or ≤ 2e-15 m

math-verify rounds to 6 decimals, or to 15 if both are exact, so all small numbers are equal there:
1.6e-19 and 9.1e-31, 1/2^{98} and 1/2^{99}. As in math-verify, 0.333333 equals 1/3 and 0.66667 does
not equal 2/3. Small numbers must also agree in five significant digits.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import sympy

#: Digits of numerical evaluation.
_DIGITS = 60
#: Relative tolerance between two exact numbers.
_EXACT = Fraction("1e-40")
#: Tolerances with a decimal, absolute and relative: 6 decimals, and at least 5 significant digits.
_DECIMALS, _SIGNIFICANT = Fraction("5.000001e-7"), Fraction("1e-5")
#: Relative rounding error of large decimals in binary.
_ROUNDING = Fraction("2e-15")
#: Number readable without a parser: decimal, fraction, power of ten.
_PLAIN = re.compile(
    r"([+-]?)\s*(?:10\^\{([+-]?\d{1,3})\}|(?:(\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?|\\frac\s*\{([+-]?\d+)\}\s*\{(\d+)\})"
    r"(?:\s*\\(?:times|cdot)\s*10\^\{([+-]?\d{1,3})\})?)"
)
#: Points at which expressions are compared: values of the first unknown, the second, …
_POINTS = (
    ("1.37", "2.11", "0.73", "3.19"),
    ("0.41", "0.17", "1.91", "2.3"),
    ("2.89", "-1.3", "0.29", "-0.7"),
    ("-1.71", "0.83", "-2.9", "1.1"),
    ("-0.61", "-2.7", "4.1", "0.37"),
    ("7.3", "5.9", "-6.1", "-3.3"),
    ("3", "2", "5", "4"),
    ("2", "7", "3", "6"),
    ("5", "4", "2", "9"),
    ("11", "6", "8", "3"),
)
#: Points at which both expressions must be real numbers before equality there counts.
_NEEDED = 5


def same_number(a: Any, b: Any) -> bool | None:
    """Whether two sympy expressions are the same number; `None`: one is not a finite number."""
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        whole_a, whole_b = _done(a), _done(b)
        if whole_a.is_Rational and whole_b.is_Rational:
            return bool(whole_a == whole_b)
    value_a, value_b = _value(a), _value(b)
    if value_a is None or value_b is None:
        return None
    return _close(value_a, value_b, decimal=_has_decimal(a) or _has_decimal(b))


def same_plain_number(a: str, b: str) -> bool | None:
    r"""Whether two LaTeX texts are the same number; `None`: one is not a plain number.

    Plain numbers are for example 12, -0.5, 3/4, \frac{3}{4} and 4.5 \times 10^{33}.
    """
    read_a, read_b = plain_number(a), plain_number(b)
    if read_a is None or read_b is None:
        return None
    return _close(read_a, read_b, decimal="." in a + b)


def plain_number(text: str) -> Fraction | None:
    """Number written in LaTeX, if it can be read without a parser; otherwise `None`."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    sign, lone, above, below, top, bottom, power = match.groups()
    if 0 in (int(below or 1), int(bottom or 1)):
        return None
    value = Fraction(top or above or 1) / int(bottom or below or 1) * Fraction(10) ** int(lone or power or 0)
    return -value if sign == "-" else value


def same_where_real(a: Any, b: Any) -> bool | None:
    r"""Whether two expressions with the same unknowns agree at sample points where both are real.

    \sqrt{1/n} equals 1/\sqrt{n}, but \sqrt{x^2} does not equal x. `None`: the unknowns differ, are
    more than four or absent, or both are real at too few points.
    """
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return None
    unknowns = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.free_symbols != b.free_symbols or not 0 < len(unknowns) <= len(_POINTS[0]):
        return None
    # math-verify's symbols are real, which sympy uses in simplifications
    generic = {symbol: sympy.Symbol(f"u{number}") for number, symbol in enumerate(unknowns)}
    a, b = a.xreplace(generic), b.xreplace(generic)
    decimal, seen = _has_decimal(a) or _has_decimal(b), 0
    for point in _POINTS:
        at = {symbol: sympy.Rational(text) for symbol, text in zip(generic.values(), point, strict=False)}
        values = [_value(expression.xreplace(at)) for expression in (a, b)]
        if any(value is None or abs(sympy.im(value)) > _EXACT * abs(value) for value in values):
            continue
        seen += 1
        if not _close(*values, decimal=decimal):
            return False
    return True if seen >= _NEEDED else None


def _has_decimal(expression: Any) -> bool:
    return bool(expression.has(sympy.Float))


def _value(expression: Any) -> Any:
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    try:
        value = sympy.N(_done(expression), _DIGITS)
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None
    real, imaginary = value.as_real_imag()
    return value if real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite else None


def _done(expression: Any) -> Any:
    """Expression with the parts evaluated that math-verify leaves unevaluated."""
    try:
        return expression.doit()
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return expression


def _close(a: Any, b: Any, *, decimal: bool) -> bool:
    gap, size = abs(a - b), max(abs(a), abs(b))
    if not decimal:
        return bool(gap <= _EXACT * size)
    return bool(gap <= min(_DECIMALS, _SIGNIFICANT * size) or gap <= _ROUNDING * size)
