"""Generators and scorers of the testbed's questions, equal to reasoning-gym's bit for bit.

The testbed is built in, but reasoning-gym is an extra: its dependency `pycosat` needs a C compiler.
These two generators draw from `random.Random` in the library's order, so the same seed gives the
same questions as reasoning-gym 0.1.25 (Apache-2.0). `spell_backward_words.txt` contains the words
of 4 to 6 letters of that library's `words3to10.txt`, in its order. A test compares both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import NamedTuple

_WORDS = Path(__file__).with_name("spell_backward_words.txt")


class Question(NamedTuple):
    """One question: its text, the right answer, and the input to the worked reasoning."""

    text: str
    answer: str
    subject: str


def chain_sum(seed: int, *, min_terms: int, max_terms: int, min_digits: int, max_digits: int) -> Question:
    """A sum and difference of several numbers.

    Example:
        >>> chain_sum(0, min_terms=4, max_terms=5, min_digits=1, max_digits=1).subject
        '0 - 4 - 8 - 7 + 6'
    """
    rng = random.Random(seed)
    terms, digits = rng.randint(min_terms, max_terms), rng.randint(min_digits, max_digits)
    low, high = 0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1
    numbers = [rng.randint(low, high) for _ in range(terms)]
    signs = [rng.choice(["+", "-"]) for _ in range(terms - 1)]
    total, parts = numbers[0], [str(numbers[0])]
    for sign, number in zip(signs, numbers[1:], strict=True):
        parts += [sign, str(number)]
        total += number if sign == "+" else -number
    expression = " ".join(parts)
    text = f"State the final answer to the following arithmetic problem: {expression} ="
    return Question(text, str(total), expression)


def spell_backward(seed: int, *, min_word_len: int, max_word_len: int) -> Question:
    """A word of 4 to 6 letters, to be spelled backward.

    Example:
        >>> spell_backward(0, min_word_len=4, max_word_len=6).answer
        'erosyM'
    """
    word = random.Random(seed).choice(_words(min_word_len, max_word_len))
    return Question(f"Spell this word backward (example: sun -> nus): {word}", word[::-1], word)


@cache
def _words(shortest: int, longest: int) -> tuple[str, ...]:
    words = _WORDS.read_text(encoding="utf-8").split()
    return tuple(word for word in words if shortest <= len(word) <= longest)


GENERATORS: Mapping[str, Callable[..., Question]] = {
    "chain_sum": chain_sum,
    "spell_backward": spell_backward,
    "long_chain_sum": chain_sum,
}


def score_number(answer: str, right: str) -> float:
    """1.0 if both are the same number; otherwise, the share of `answer` that is `right`.

    Commas are ignored; signs, leading zeros and trailing decimals do not matter.
    """
    answer, right = answer.replace(",", ""), right.replace(",", "")
    try:
        if Decimal(answer) == Decimal(right):
            return 1.0
    except (InvalidOperation, ValueError):
        pass
    return len(right) / len(answer) if right in answer else 0.0


def score_letters(answer: str, right: str) -> float:
    """1.0 if both are the same word; otherwise, the share of letters in the right place."""
    answer, right = answer.lower(), right.lower()
    if answer == right:
        return 1.0
    score = 0.0
    for given, wanted in zip(answer, right, strict=False):
        if given == wanted:
            score += 1 / len(right)
    return score - 0.2 if score == 1.0 else score


SCORERS: Mapping[str, Callable[[str, str], float]] = {
    "chain_sum": score_number,
    "spell_backward": score_letters,
    "long_chain_sum": score_number,
}
