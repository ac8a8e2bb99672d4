"""Lenient verifier: the last number in a completion against the reference number.

For models that do not write the format that a task's own verifier reads, such as `<answer>` tags.
It rewards any text that ends with the right number, also by accident or after a wrong derivation.
"""

from __future__ import annotations

import re
from decimal import Decimal

from effopd.errors import TaskError
from effopd.tasks.base import Example
from effopd.tasks.reasoning import answer_part

#: Groups of three digits, or digits alone; never part of them (atomic group).
_DIGITS = r"(?>[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)"
#: A minus is a sign unless something that can be subtracted from touches it: `10-7` ends with 7.
_SIGN = r"(?:(?<![\w.)\]}])[-+−])?"
_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])[-+−][$€£]?|(?<![\w.])[$€£]?{_SIGN})"  # -$7 and $-7
    rf"(?<![\w.])(?>(?:{_DIGITS})(?:\.[0-9]+)?|\.[0-9]+)(?>[eE][-+]?[0-9]{{1,4}})?(?!\w|\.[0-9])"
)
#: What a reference answer can have beside its number.
_REFERENCE = re.compile(r"%|\$|(?:[^\W\d_]+[²³]?)?\.?")


class LastNumberVerifier:
    """1.0 if the last number after the reasoning equals the example's answer, otherwise 0.0.

    Numbers have an optional sign, thousands separators (`1,234`), decimals, an exponent and a
    currency sign, and are compared by value: `7`, `7.0` and `+7` are equal. Digits that touch a
    letter (`step2`, `3rd`, `x1`) and versions (`1.2.3`) are part of a word and not numbers.

    Example:
        >>> last_number("12 + 5 = 17, so the answer is 17.", Example("0", "12 + 5", "17"))
        1.0
    """

    #: What a completion must contain, for messages.
    sought = "number"

    def __call__(self, completion: str, example: Example) -> float:
        """The score.

        Raises:
            TaskError: the example has no reference answer, or one that is not a single number.
        """
        expected = reference_number(example.answer)
        if expected is None:
            raise TaskError(
                f"cannot grade example '{example.id}' by its last number: expected a reference answer that is one "
                f"number, got {example.answer!r}. Use the task's own verifier, or another one."
            )
        found = numbers(answer_part(completion))
        return float(bool(found) and found[-1] == expected)

    def answer_found(self, completion: str) -> bool:
        """Whether there is a number outside the reasoning."""
        return bool(numbers(answer_part(completion)))


def numbers(text: str) -> list[Decimal]:
    """All numbers in a text, in order."""
    found = []
    for match in _NUMBER.finditer(text):
        plain = match.group().replace("−", "-")
        found.append(Decimal(re.sub(r"[$€£,]", "", plain)))
    return found


def reference_number(answer: str | None) -> Decimal | None:
    """The value of a reference answer that is a number, with at most one word after it (`72 km`).

    `None`: it is something else.
    """
    found = numbers(answer or "")
    plain = len(found) == 1 and _REFERENCE.fullmatch(_NUMBER.sub("", answer or "").strip())
    return found[0] if plain else None


#: `--verifier effopd.tasks.verify:last_number`
last_number = LastNumberVerifier()
