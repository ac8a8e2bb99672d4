"""Reference answers as text, from JSON and Parquet numbers, decimals, NumPy and torch scalars."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

#: Largest number of digits in a whole number that Python reads.
MAX_DIGITS = 4300
_NOT_A_NUMBER = re.compile(r"\$?[+-]?(?:nan|inf|infinity)\$?", re.IGNORECASE)
_TOO_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_HALF = re.compile("[\ud800-\udfff]")
#: What is expected of a text, for messages.
WHOLE = "text of whole characters"


class UnusableAnswer(ValueError):
    """Reference answer that cannot be used; the message is the expected value, `fix` the remedy."""

    def __init__(self, expected: str, fix: str) -> None:
        super().__init__(expected)
        self.fix = fix


def reference_text(value: Any) -> str | None:
    """Reference answer as text, with numbers written without an exponent; `None`: no answer.

    `None`, NaN, infinities, empty text and the texts "nan", "inf" and "infinity" are no answer.

    Raises:
        UnusableAnswer: a value of another type (a list, a bool, …), more than 4300 digits, or half
            of a character.

    Example:
        >>> [reference_text(value) for value in (0.00005, 1e20, 8, float("nan"))]
        ['0.00005', '100000000000000000000', '8', None]
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
    if half_character(text) is not None:
        raise UnusableAnswer(WHOLE, "Correct the text or remove the row.")
    if too_long(text):
        raise UnusableAnswer(f"a number of at most {MAX_DIGITS} digits", "Write it shorter, as a power or a product.")
    return None if not text or _NOT_A_NUMBER.fullmatch(text) else text


def too_long(text: str) -> bool:
    """Whether a text contains a number with more digits than Python reads."""
    return _TOO_LONG.search(text) is not None


def half_character(text: str) -> str | None:
    r"""First half of a character outside the 16-bit plane, as JSON's `\ud83d`; `None`: none.

    Such text, for example cut inside an emoji, can be neither tokenized nor stored.
    """
    half = _HALF.search(text)
    return None if half is None else half.group()


def single_precision(value: Any) -> Any:
    """Shortest decimal of a 32-bit number: 0.1 instead of 0.10000000149011612."""
    import numpy

    return float(str(numpy.float32(value))) if isinstance(value, float) and math.isfinite(value) else value


def _scalar(value: Any) -> Any:
    """NumPy or torch scalar as a Python value; a short float becomes its shortest decimal."""
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
    except ValueError:  # more digits than Python converts: return a text that is too long
        return "9" * (MAX_DIGITS + 1)
