r"""Units at the end of an answer, such as 9.8 m/s^2, \$18 and 12 \text{ ways}.

A unit is recognized if it is written in words (in `\text{…}` or after a number), or if a known
symbol follows a number and a space: 5 m is five meters, 5m is a product. One-letter symbols that
are more likely unknowns (t, d, h, x) are not units.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

#: name → (factor, dimensions as a product of m, kg, s, $).
_KNOWN: dict[str, tuple[Fraction, dict[str, int]]] = {
    **{name: (Fraction(factor), {"m": 1}) for name, factor in
       (("m", "1"), ("km", "1000"), ("cm", "0.01"), ("mm", "0.001"), ("nm", "1e-9"), ("in", "0.0254"), ("ft",
       "0.3048"),
        ("yd", "0.9144"), ("mi", "1609.344"))},
    **{name: (Fraction(factor), {"s": 1}) for name, factor in
       (("s", "1"), ("ms", "0.001"), ("min", "60"), ("hr", "3600"), ("day", "86400"), ("week", "604800"))},
    **{name: (Fraction(factor), {"kg": 1}) for name, factor in (("kg", "1"), ("g", "0.001"), ("mg", "1e-6"))},
    **{name: (Fraction(factor), {"m": 3}) for name, factor in (("L", "0.001"), ("mL", "1e-6"))},
    "N": (Fraction(1), {"kg": 1, "m": 1, "s": -2}),
    **{name: (Fraction(factor), {"kg": 1, "m": 2, "s": -2}) for name, factor in (("J", "1"), ("kJ", "1000"))},
    **{name: (Fraction(factor), {"kg": 1, "m": 2, "s": -3}) for name, factor in (("W", "1"), ("kW", "1000"))},
    **{name: (Fraction(factor), {"kg": 1, "m": -1, "s": -2}) for name, factor in (("Pa", "1"), ("kPa", "1000"))},
    **{name: (Fraction(factor), {"s": -1}) for name, factor in (("Hz", "1"), ("kHz", "1000"), ("MHz", "1e6"))},
    "dollar": (Fraction(1), {"$": 1}),
    "cent": (Fraction("0.01"), {"$": 1}),
}  # fmt: skip
#: Symbols without a conversion to the units above.
_SYMBOLS = {
    "V",
    "K",
    "eV",
    "keV",
    "MeV",
    "GeV",
    "atm",
    "mol",
    "lb",
    "oz",
    "gal",
    "GHz",
    "rad",
    "sr",
    "AU",
    "pc",
    "kpc",
    "Mpc",
}
_SYNONYMS = {
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm", "centimetre": "cm",
    "millimeter": "mm",
    "millimetre": "mm", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "second": "s",
    "sec": "s", "minute": "min", "hour": "hr", "gram": "g", "kilogram": "kg", "milligram": "mg", "liter": "L",
    "litre": "L",
    "milliliter": "mL", "millilitre": "mL", "ml": "mL", "l": "L", "newton": "N", "joule": "J", "watt": "W",
    "pascal": "Pa",
    "hertz": "Hz", "pound": "lb", "ounce": "oz", "gallon": "gal", "degree": "deg", "radian": "rad", "volt": "V",
    "kelvin": "K",
    "usd": "dollar", "buck": "dollar", "mole": "mol", "h": "hr", "€": "euro", "£": "pound sterling",
}  # fmt: skip
_WRITTEN = {"mph": "mi/hr", "kmh": "km/hr", "kph": "km/hr", "kmph": "km/hr", "mps": "m/s"}
#: Words after a number that are part of the value or not a unit.
_NO_UNIT = {
    "and", "or", "to", "times", "over", "plus", "minus", "mod", "root", "less", "more", "than", "if", "for",
    "where", "when", "is", "are", "not", "but", "dozen", "i", "j",
}  # fmt: skip

_TEXT = r"\\(?:text|textrm|textnormal|textit|textbf|mathrm|mathit|mbox|hbox|operatorname|rm)\*?\s*\{[^{}]*\}"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_WORDED = re.compile(rf"(?s)(.*[\w}})\]!.%])\s*((?:{_TEXT}{_POWER}\s*(?:/|\\cdot|per\b)?\s*)+)")
_VALUE = (
    r"[+-]?\s*(?:\d+(?:\.\d+)?|\d+/\d+|\\frac\{\d+\}\{\d+\}|\([\d+\\frac{}]+\))"
    r"(?:\s*(?:\\pi|\\sqrt\{\d+\}|\\times 10\^\{[+-]?\d+\}))*"
)
_BARE = re.compile(rf"({_VALUE})(\s*)([A-Za-z][A-Za-z /^{{}}\d\\.-]*)")
_FRACTION = re.compile(
    rf"({_VALUE})\s*\\frac\s*\{{([^{{}}\d]+)\}}\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*[A-Za-z](?:[^{{}}]|\{{[^{{}}]*\}})*)\}}"
)
_PERCENT = re.compile(
    r"(.*[^\s\\])\s*(?:\\?%|\s(?:percent|percentage|pct)|\\(?:text|mathrm)\{\s*(?:percent|percentage|pct|\\?%)\s*\})"
)
_DEGREES = re.compile(rf"({_VALUE})\s*\^\\circ\s*([CF]?|{_TEXT})")
_MONEY = re.compile(r"([+-]?)\s*(\\\$|[$€£])\s*(.+)")


@dataclass(frozen=True)
class Unit:
    """Product of powers of units, such as {m: 1, s: -2}, and words that are not known units."""

    powers: tuple[tuple[str, int], ...]
    words: frozenset[str] = frozenset()

    def factor_to(self, other: Unit) -> Fraction | None:
        """Factor that converts a value in this unit to `other`; `None`: not convertible.

        Words match if one set contains the other: "ways" and "different ways".
        """
        if self.words or other.words:
            same = self.powers == other.powers and (self.words <= other.words or other.words <= self.words)
            return Fraction(1) if same else None
        if self.powers == other.powers:
            return Fraction(1)
        base, other_base = self._in_base(), other._in_base()
        return base[0] / other_base[0] if base and other_base and base[1] == other_base[1] else None

    def _in_base(self) -> tuple[Fraction, dict[str, int]] | None:
        factor, dimensions = Fraction(1), Counter[str]()
        for name, power in self.powers:
            if name not in _KNOWN:
                return None
            one, base = _KNOWN[name]
            factor *= one**power
            for dimension, exponent in base.items():
                dimensions[dimension] += exponent * power
        return factor, {dimension: exponent for dimension, exponent in dimensions.items() if exponent}


#: Percent; the number alone and the number / 100 are the same answer (`math_equality`).
PERCENT = Unit((("percent", 1),))


def read_unit(text: str, *, expected: bool = False) -> tuple[str, Unit | None]:
    r"""Value and unit of LaTeX with single spaces; `(text, None)`: there is no unit.

    Args:
        text: the answer.
        expected: whether a unit is expected. If so, any known symbol after a number is a unit, even
            the h in "3 h".

    Example:
        >>> read_unit(r"9.8 \text{m/s}^{2}")
        ('9.8', Unit(powers=(('m', 1), ('s', -2)), words=frozenset()))
    """
    if money := _MONEY.fullmatch(text):
        sign, currency, value = money.groups()
        value, more = read_unit(value.replace("\\$", ""), expected=expected)
        name = {"€": "euro", "£": "pound sterling"}.get(currency, "dollar")
        return sign + value, more if more is not None else Unit(((name, 1),))
    if percent := _PERCENT.fullmatch(text):
        return percent.group(1), PERCENT
    if degrees := _DEGREES.fullmatch(text):
        scale = _plain(degrees.group(2)).strip()
        return degrees.group(1), Unit((("deg" + scale, 1),)) if scale in ("", "C", "F") else None
    if fraction := _FRACTION.fullmatch(text):
        unit = _unit(f"{fraction.group(2)}/({fraction.group(3)})", known=True)
        return (fraction.group(1), unit) if unit else (text, None)
    if worded := _WORDED.fullmatch(text):
        value, written = worded.group(1).strip(), _plain(worded.group(2))
        unit = None if "\\text" in value else _unit(written, known=False)
        return (value, unit) if unit else (text, None)
    if bare := _BARE.fullmatch(text):
        unit = _unit(bare.group(3), known=False, bare=not expected) if expected or bare.group(2) else None
        return (bare.group(1), unit) if unit else (text, None)
    return text, None


def _plain(text: str) -> str:
    return re.sub(_TEXT, lambda m: m.group()[m.group().index("{") + 1 : -1], text).replace("\\cdot", " ")


def _unit(written: str, *, known: bool, bare: bool = False) -> Unit | None:
    """Unit named by `written`, if any."""
    written = written.replace("\\", " ").strip(" .")
    for word, meaning in _WRITTEN.items():
        written = re.sub(rf"(?<![A-Za-z]){word}(?![A-Za-z])", meaning, written)
    written = re.sub(r"(?<![A-Za-z])per(?![A-Za-z])", "/", written)
    powers, words, sign, next_power = Counter[str](), set[str](), 1, 1
    compound = "/" in written or "^" in written
    for token in re.finditer(r"/|[()]|([A-Za-z]+)\.?(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?|\S", written):
        word, power = token.group(1), token.group(2)
        if token.group() == "/":
            sign = -1
        elif token.group() in "()-":
            continue
        elif word is None or word in _NO_UNIT:
            return None
        elif word.lower() in ("square", "squared", "sq", "cubic", "cubed"):
            next_power = 2 if word.lower().startswith("sq") else 3
            if word.lower().endswith("d") and powers:
                last = list(powers)[-1]
                powers[last], next_power = powers[last] * next_power, 1
        else:
            name = _name(word)
            if name is None:
                words.add(_singular(word.lower()) if len(word) > 2 else word)
            elif (
                bare and not compound and len(word) == 1 and name not in ("m", "s", "g", "N", "J", "W", "V", "K", "L")
            ):
                return None
            else:
                powers[name] += sign * next_power * int(power or 1)
            next_power = 1
    if words and (known or compound or (bare and any(len(word) < 3 for word in words))):
        return None if known or bare or not powers else Unit(_sorted(powers), frozenset(words))
    return Unit(_sorted(powers), frozenset(words)) if powers or words else None


def _sorted(powers: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def _name(word: str) -> str | None:
    """Symbol of a known unit; `None` for other words."""
    if word in _KNOWN or word in _SYMBOLS:
        return word
    if re.fullmatch("M[a-zA-Z]", word):  # M means a million, m a thousandth
        return None
    for spelled in (word.lower(), _singular(word.lower())):
        if spelled in _SYNONYMS:
            return _SYNONYMS[spelled]
        if spelled in _KNOWN and len(spelled) > 1:
            return spelled
    return None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
