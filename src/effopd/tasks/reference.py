"""Reference answers as text, whatever they come as: JSON and Parquet numbers, decimals, NumPy and
torch scalars, text.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

#: Python reads no whole number with more digits than this.
MAX_DIGITS = 4300
_NOT_A_NUMBER = re.compile(r"\$?[+-]?(?:nan|inf|infinity)\$?", re.IGNORECASE)
_TOO_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


class UnusableAnswer(ValueError):
    """A reference answer that is neither text nor a number; the message says what is expected,
    `fix` what to do.
    """

    def __init__(self, expected: str, fix: str) -> None:
        super().__init__(expected)
        self.fix = fix


def reference_text(value: Any) -> str | None:
    """A reference answer as text; numbers are written out, without an exponent. `None` where there
    is no answer.

    Nothing, NaN, an infinity, and text that is empty or says one of these, are no answer.

    Raises:
        UnusableAnswer: another kind of value (a list, a truth value, …), or more than 4300 digits.

    Example:
        >>> reference_text(0.00005), reference_text(1e20), reference_text(8), reference_text(float("nan"))
        ('0.00005', '100000000000000000000', '8', None)
    """
    value = _scalar(value)
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, bool) or not isinstance(value, int | float | Decimal | Fraction):
        raise UnusableAnswer("text or a number", "Write the final answer as one string.")
    elif isinstance(value, int | Fraction):
        text = _digits(value)
    elif not math.isfinite(value):
        return None
    else:
        text = format(value if isinstance(value, Decimal) else Decimal(repr(value)), "f")
    if too_long(text):
        raise UnusableAnswer(f"a number of at most {MAX_DIGITS} digits", "Write it shorter, as a power or a product.")
    return None if not text or _NOT_A_NUMBER.fullmatch(text) else text


def too_long(text: str) -> bool:
    """Whether there is a number in a text that Python does not read."""
    return _TOO_LONG.search(text) is not None


def single_precision(value: Any) -> Any:
    """A number that was stored with 32 bits as the shortest one that means it: 0.1 instead of
    0.10000000149011612.
    """
    import numpy

    return float(str(numpy.float32(value))) if isinstance(value, float) and math.isfinite(value) else value


def _scalar(value: Any) -> Any:
    """A NumPy or torch scalar as Python's; numbers of less than 64 bits keep their own shortest
    decimal.
    """
    if isinstance(value, str):
        return str(value)
    if type(value).__module__.partition(".")[0] == "torch" and getattr(value, "ndim", 1) == 0:
        value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).cpu().numpy()
    if type(value).__module__.partition(".")[0] != "numpy" or getattr(value, "ndim", 1) != 0:
        return value
    value = value[()]
    if getattr(value, "dtype", None) is not None and value.dtype.kind == "f" and value.dtype.itemsize != 8:
        return Decimal(str(value)) if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def _digits(value: int | Fraction) -> str:
    try:
        return str(value)
    except ValueError:  # Python's limit, before any work on it
        return "9" * (MAX_DIGITS + 1)
