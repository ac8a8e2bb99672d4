r"""Normalization of math answers to one notation before parsing.

`plain_latex` rewrites notation that math-verify misreads: exponents (4.5e33), grouped thousands
(10\,000), mixed numbers (3 1/2), Unicode signs (√2, ½, 90°), words (pi/2), and decimal points
without digits (5., .5). `read_answer` then separates the letter of a choice and the unit from the
value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from effopd.tasks.units import Unit, read_unit

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/",
    "⁄": "/",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "±": r"\pm ", "≈": r"\approx ",
    "∈": r"\in ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ",
    "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "σ": r"\sigma ", "°": r"^\circ ", "º": r"^\circ ", "％": "%",
    "，": ",",
    "（": "(", "）": ")", "∼": "~", "‑": "-",
    "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\u200b": "", "\ufeff": "",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}",
    "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}", "⅚": r"\frac{5}{6}",
    "⅛": r"\frac{1}{8}",
    "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_WORDS = "pi|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|theta|alpha|beta|gamma|infty"
#: Casefolded words → their canonical form.
_SAME_WORDS = {
    "no solutions": "no solution", "there is no solution": "no solution", "there are no solutions": "no solution",
    "\\emptyset": "no solution", "\\varnothing": "no solution", "empty set": "no solution",
    "the empty set": "no solution",
    "dne": "does not exist",
}  # fmt: skip
#: Commands whose braces hold words, or math in another typeface.
TEXT = (
    r"\\(?:text|textrm|textbf|textit|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|hbox"
    r"|operatorname|rm|bf)\*?"
)
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

#: (pattern, replacement), applied in this order.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:displaystyle|textstyle|limits|nolimits|left|right|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])\.?", ""),
        (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:underline|pmb)(?![a-zA-Z])|\\phantom\s*\{[^{}]*\}", ""),
        (r"\\(?:d|t|c)frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"),
        (r"(\\frac\{\d+\})\s*(\d)", r"\1{\2}"),
        (r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![a-zA-Z]))", r"\\ln "),
        (r"\\leqslant|\\leq(?![a-zA-Z])", r"\\le "),
        (r"\\geqslant|\\geq(?![a-zA-Z])", r"\\ge "),
        (r"(?<![\w.)}])\.(?=\d)", "0."),
        # thousands: 1{,}234 and 1\,234 and 1,\!234
        (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!|\\ |~)(?=\d{3}(?!\d))", ""),
        (r"\\!", ""),
        (r"^\s*(?:=|\\approx(?![a-zA-Z]))\s*", ""),
        (r"(?<!\\)\\[,;: ]|~|\\quad|\\qquad|\\hspace\{[^{}]*\}|\\hfill|\s+", " "),
        (r"\\degree|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\\(?:mathrm|text)\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"\\(?:mathrm|text|mathit)\{\s*([eE])\s*\}", r"\1"),
        (rf"(?<![\\a-zA-Z])({_WORDS})(?![a-zA-Z])", r"\\\1 "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*\{([^{}]*)\}", r"\\sqrt{\1}"),
        (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\langle(?![a-zA-Z])|\\lang(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])|\\rang(?![a-zA-Z])", ")"),
        (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<=[\d}])i(?![a-zA-Z])", " i"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"\.(\d*)\s*\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", r".\1\\overline{\2\3}"),
        # numbers: 5. and 5.0, .5, 4.5e33, 5 x 10^-5, 2^10
        (r"(\d)\.0*(?![\d.]|\\overline)", r"\1"),
        (r"(?<![A-Za-z\d\\_.])(\d+(?:\.\d+)?)[eE]\{?([+-]?)0*(\d+)\}?(?![\w.])", r"\1 \\times 10^{\2\3}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
        (r"\^\s*([+-]?\d+)(?![\d.])", r"^{\1}"),
        (r"\{\+(?=\d)", "{"),
        (r"(?<=\d) +(hundred|thousand|million|billion|trillion)s?(?![a-zA-Z])", r" \\\1 "),
    )
)
_SCALE = re.compile(r"(?:\\|" + TEXT + r"\{\s*)(hundred|thousand|million|billion|trillion)s?(?:\s*\}|(?![a-zA-Z]))")
_GROUPED = re.compile(r"([+-]?[1-9]\d{0,2}(?:,\d{3})+|[+-]?[1-9]\d{0,2}(?: \d{3})+)(\.\d+)?")
#: A grouped number inside a longer answer, and signs of an answer with several values.
_GROUPS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_SEVERAL = re.compile(r"[(\[]|\\\{")
_MIXED = re.compile(r"([+-]?)\s*(\d+)[ +]+(\d+)\s*/\s*(\d+)|([+-]?)\s*(\d+)\s*\\frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_SET_OF = re.compile(
    r"\\\{\s*[a-zA-Z](?:\s*\\in\s*\\(?:mathbb|mathbf)\{?\s*R\s*\}?)?\s*(?:\\mid(?![a-z])|\\vert|:|\|)\s*(.*[<>].*|.*\\[lgn]e.*)\\\}"
)
_BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(\w+)\s*\}?")
_REPEATING = re.compile(r"(\d+)\.(\d*)\\overline\{(\d+)\}")
_ONE_WORD = re.compile(r"[^\W\d_][^\W\d_' -]*[^\W\d_]")
#: Words and numbers starting with a word, at least one word with three letters.
_SENTENCE = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_][^\W_]*(?:[ ,.:;'-]+[^\W_]+)+")
_FUNCTION = re.compile(rf"(?<![^\W\d_])(?:{_WORDS}|exp|max|min|mod|gcd|lcm)(?![^\W\d_])")
#: One of several named values: x = 3.
_NAMED = re.compile(r"\s*([a-zA-Z])\s*=\s*([^=<>]+?)\s*")
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)s?\s*:?\s*)?(?:\(([A-Ja-j])\)|([A-J])(?:[.):](?=\s|$)|$))\s*(.*)", re.DOTALL
)
_CHOICES = re.compile(
    r"(?:\([A-J]\)|[A-J])(?:\s*(?:,|;|&|/|\\&|\band\b|\bor\b|,\s*and\b|,\s*or\b)\s*(?:\([A-J]\)|[A-J]))+"
)


@dataclass(frozen=True)
class Answer:
    """Parts of an answer.

    Attributes:
        value: normalized LaTeX of the value; "": there is only a letter.
        unit: unit of the value, if given.
        choice: letters of a multiple-choice answer, such as {"B"}.
        base: base of a number, if given, such as "2" in 101_2.
    """

    value: str
    unit: Unit | None = None
    choice: frozenset[str] = frozenset()
    base: str | None = None


def plain_latex(text: str) -> str:
    r"""Normalized LaTeX, with single spaces and none at the ends.

    Example:
        >>> plain_latex("1.6e-19"), plain_latex("√2"), plain_latex("pi/2"), plain_latex(r"10\,000.")
        ('1.6 \\times 10^{-19}', '\\sqrt{2}', '\\pi /2', '10000')
    """
    text = _stripped(text)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda m: "^{" + "".join(map(_RAISED.__getitem__, m.group())) + "}", text)
    text = re.sub(
        f"[{''.join(_LOWERED)}]+", lambda m: "_{" + "".join(map(_LOWERED.__getitem__, m.group())) + "}", text
    )
    text = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)
    text = "".join(_SIGNS.get(sign, sign) for sign in text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(lambda m: _repeating(*m.groups()), text)
    text = _SCALE.sub(lambda m: rf"\times 10^{{{_POWERS_OF_TEN[m.group(1)]}}} ", text)
    text = _stripped(re.sub(r" +", " ", text))
    return _one_number(_without_groups(text))


def read_answer(text: str, *, unit_expected: bool = False) -> Answer:
    """Value, unit, letters and base of an answer.

    Args:
        text: the answer.
        unit_expected: see `units.read_unit`.
    """
    text = plain_latex(text)
    words = " ".join(unwrapped(text).split())
    if _CHOICES.fullmatch(words):
        return Answer("", choice=frozenset(re.findall(r"\b[A-J]\b", words)))
    choice = _CHOICE.fullmatch(words)
    if choice and not re.search(r"\([A-J]\)", choice.group(3)):
        rest = choice.group(3).strip()
        inner = read_answer(rest, unit_expected=unit_expected) if rest else Answer("")
        return Answer(inner.value, inner.unit, frozenset({(choice.group(1) or choice.group(2)).upper()}), inner.base)
    if worded := re.fullmatch(TEXT + r"\s*\{([^{}]*\d[^{}]*)\}", text):
        text = worded.group(1).strip()
    value, unit = read_unit(text, expected=unit_expected)
    value = _one_number(value)
    if builder := _SET_OF.fullmatch(value):
        value = builder.group(1).strip()
    if based := _BASE.fullmatch(value):
        return Answer(based.group(1), unit, base=based.group(2))
    if unit is None and "\\circ" in value:
        in_radians = r"\\left(\1\\cdot\\frac{\\pi}{180}\\right)" if _TRIGONOMETRY.search(value) else r"\1"
        value = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ ?", in_radians, value).strip()
    return Answer(value, unit)


def _without_groups(text: str) -> str:
    """Text without thousands separators, unless brackets or other commas show several values.

    Example:
        >>> _without_groups("x = 1,000"), _without_groups("(1,000)"), _without_groups("1,000, 2")
        ('x = 1000', '(1,000)', '1,000, 2')
    """
    joined = _GROUPS.sub(lambda match: match.group().replace(",", ""), text)
    return text if "," in joined or _SEVERAL.search(text) else joined


def _one_number(text: str) -> str:
    """Join grouped thousands, write a mixed number as a sum, and remove a plus sign."""
    if grouped := _GROUPED.fullmatch(text):
        text = re.sub("[ ,]", "", grouped.group(1)) + (grouped.group(2) or "")
    if mixed := _MIXED.fullmatch(text):
        sign, whole, above, below = (
            one or other or "" for one, other in zip(mixed.groups()[:4], mixed.groups()[4:], strict=True)
        )
        if "+" not in text[1:] and int(above) < int(below):
            text = rf"{sign}({whole}+\frac{{{above}}}{{{below}}})"
    return text.removeprefix("+").strip()


def _repeating(whole: str, once: str, again: str) -> str:
    r"""A repeating decimal as a fraction: 0.1\overline{6} is (16 - 1)/90."""
    above = int(whole + once + again) - int(whole + once)
    return rf"\frac{{{above}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}}"


def tuple_of_named(text: str) -> str | None:
    """Values of two or more names as a tuple in alphabetical order: "y=2, x=1" → "(1,2)".

    `None`: the text has another form.
    """
    parts = [_NAMED.fullmatch(part) for part in re.split(r",(?![^(\[{]*[)\]}])|;|\\text\{\s*and\s*\}", text)]
    values = {part.group(1): part.group(2) for part in parts if part is not None}
    if len(values) < 2 or len(values) != len(parts):
        return None
    return f"({','.join(values[name] for name in sorted(values))})"


def unwrapped(text: str) -> str:
    r"""Text with `\text{…}` and similar commands replaced by their contents."""
    previous = None
    while previous != text:
        previous, text = text, re.sub(TEXT + r"\s*\{([^{}]*)\}", r"\1", text)
    return text


def words_of(text: str) -> str | None:
    """Casefolded words of a verbal answer, without punctuation at the ends; `None`: not verbal.

    An answer is verbal if it has only words and numbers, starts with a word, has a word of at least
    three letters and names no function ("June 20"). A single word can have two letters ("no").
    """
    words = " ".join(unwrapped(text).split()).strip(" $.,;:!").casefold()
    if words in _SAME_WORDS:
        return _SAME_WORDS[words]
    return (
        words if _ONE_WORD.fullmatch(words) or (_SENTENCE.fullmatch(words) and not _FUNCTION.search(words)) else None
    )


def _stripped(text: str) -> str:
    """Text without spaces, math-mode marks, Markdown emphasis and punctuation at the ends."""
    previous = None
    while previous != text:
        previous = text
        text = text.strip().strip("`").strip()
        for opening, closing in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                inner = text[len(opening) : -len(closing)]
                if opening not in inner.replace("\\$", ""):
                    text = inner
        if re.search(r"[^.\\]\s*[.;,]$", text):
            text = text[:-1]
    return text
