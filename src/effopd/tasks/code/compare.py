"""Comparison of a program's output with the expected one, outside the sandbox."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from effopd.errors import TaskError

#: Rules for white space: lines without trailing blanks, words in any layout, or every character.
WHITESPACE = ("lines", "words", "exact")
#: Matching takes linear time: outputs can have millions of digits.
_DECIMAL = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)", re.ASCII)


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


def same_value(form: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """Whether a returned value is the expected one from JSON: tuples count as lists, 1 is not True.

    Floats are equal within the tolerance, absolute or relative. The value is never built: hashing
    or printing a program's numbers could take the grader hours.

    Args:
        form: the value as `effopd.tasks.code.guest.values.encode` writes it.

    Raises:
        ValueError: the form is malformed.
    """
    if isinstance(form, list):
        if len(form) != 2 or not isinstance(form[0], str):
            raise ValueError("a form without a tag")
        return _same_tagged(form[0], form[1], expected, tolerance)
    if isinstance(form, bool) or isinstance(expected, bool):
        return form is expected
    if isinstance(form, int | float) and isinstance(expected, int | float):
        return _same_number(form, expected, tolerance)
    return type(form) is type(expected) and not isinstance(form, dict) and form == expected


def _same_tagged(tag: str, payload: Any, expected: Any, tolerance: float) -> bool:
    if tag == "int" and isinstance(payload, str):
        number = isinstance(expected, int | float) and not isinstance(expected, bool)
        return number and _same_number(int(payload, 16), expected, tolerance)
    if tag not in ("list", "tuple", "dict"):
        return False
    if not isinstance(payload, list):
        raise ValueError(f"a {tag} without items")
    if tag != "dict":
        return (
            isinstance(expected, list | tuple)
            and len(payload) == len(expected)
            and all(same_value(*pair, tolerance) for pair in zip(payload, expected, strict=True))
        )
    if not isinstance(expected, dict) or len(payload) != len(expected):
        return False
    wanted = {_key(key): value for key, value in expected.items()}
    got = {_key(key): value for key, value in payload}
    return got.keys() == wanted.keys() and all(same_value(got[key], wanted[key], tolerance) for key in wanted)


def _same_number(got: int | float, expected: int | float, tolerance: float) -> bool:
    if got == expected:
        return True
    if isinstance(got, int) and isinstance(expected, int):
        return False
    try:
        return _close(float(got), float(expected), tolerance)
    except OverflowError:
        return False


def _key(key: Any) -> str:
    """Text of a dictionary's key, as JSON writes it; other keys are unlike any text."""
    if isinstance(key, str):
        return key
    return json.dumps(key) if key is None or isinstance(key, int | float) else "\0" + json.dumps(key)


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
