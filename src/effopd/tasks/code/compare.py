"""Comparison of a program's output with the expected one, outside the sandbox."""

from __future__ import annotations

import math
import re
from typing import Any

from effopd.errors import TaskError

#: Rules for white space: lines without trailing blanks, words in any layout, or every character.
WHITESPACE = ("lines", "words", "exact")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)")


def same_output(got: str, expected: str, *, whitespace: str = "lines", tolerance: float = 1e-6) -> bool:
    r"""Whether an output is the expected one.

    Args:
        whitespace: "lines": blanks at line ends and empty lines at the end do not count; "words":
            only the sequence of words counts; "exact": every character counts.
        tolerance: largest absolute or relative difference of a number that is expected with a
            decimal point or an exponent; not for "exact". Whole numbers must be written equally.

    Example:
        >>> same_output("3 \n\n", "3"), same_output("3.0", "3"), same_output("0.30000001", "0.3")
        (True, False, True)
    """
    if whitespace == "exact":
        return got == expected
    ours, theirs = _rows(got, whitespace), _rows(expected, whitespace)
    if ours == theirs:
        return True
    if tolerance <= 0 or len(ours) != len(theirs):
        return False
    return all(_same_line(one, other, tolerance) for one, other in zip(ours, theirs, strict=True))


def _rows(text: str, whitespace: str) -> list[str]:
    if whitespace == "words":
        return [" ".join(text.split())]
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_line(got: str, expected: str, tolerance: float) -> bool:
    if got == expected:
        return True
    ours, theirs = got.split(" "), expected.split(" ")
    return len(ours) == len(theirs) and all(_same_word(*pair, tolerance) for pair in zip(ours, theirs, strict=True))


def _same_word(got: str, expected: str, tolerance: float) -> bool:
    if got == expected:
        return True
    if not (_DECIMAL.fullmatch(expected) and _NUMBER.fullmatch(got)):
        return False
    return _close(float(got), float(expected), tolerance)


def same_value(got: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """Whether a returned value is the expected one from JSON: tuples count as lists, 1 is not True.

    Floats are equal within the tolerance, absolute or relative.
    """
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(got, int | float) and isinstance(expected, int | float):
        if isinstance(got, int) and isinstance(expected, int):
            return got == expected
        try:
            return got == expected or _close(float(got), float(expected), tolerance)
        except OverflowError:
            return False
    if isinstance(got, list | tuple) and isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(
            same_value(*pair, tolerance) for pair in zip(got, expected, strict=True)
        )
    if isinstance(got, dict) and isinstance(expected, dict):
        got = {_key(key): value for key, value in got.items()}
        wanted = {_key(key): value for key, value in expected.items()}
        return got.keys() == wanted.keys() and all(same_value(got[key], wanted[key], tolerance) for key in got)
    return type(got) is type(expected) and got == expected


def _key(key: Any) -> Any:
    """JSON writes keys of other types as text."""
    return str(key) if isinstance(key, int | float) and not isinstance(key, bool) else key


def _close(got: float, expected: float, tolerance: float) -> bool:
    if math.isnan(expected):
        return math.isnan(got)
    return math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)


def check_rules(whitespace: Any, tolerance: Any) -> None:
    """Check the settings of comparisons.

    Raises:
        TaskError: one is out of range.
    """
    if whitespace not in WHITESPACE:
        raise TaskError(f"task_args: whitespace: expected one of {', '.join(WHITESPACE)}, got {whitespace!r}.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise TaskError(f"task_args: float_tolerance: expected a number from 0 to below 1, got {tolerance!r}.")
