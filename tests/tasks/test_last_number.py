"""The lenient verifier: the value of the last number, however it is written."""

from __future__ import annotations

import pickle
import random
from decimal import Decimal

import pytest

from effopd.errors import TaskError
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.base import Example, Task
from effopd.tasks.last_number import numbers, reference_number
from effopd.tasks.verify import check_verifier, last_number, load_verifier


def score(completion, answer):
    return last_number(completion, Example("0", "q", answer))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # signs
        ("10-7", "10 7"), ("= -7", "-7"), ("x=-7", "-7"), ("(-7)", "-7"), ("−3", "-3"), ("5 - 7", "5 7"),
        ("f(3)-2", "3 2"), ("+7", "7"), ("-.5", "-0.5"),
        # thousands, decimals, exponents, currency
        ("1,234", "1234"), ("-1,234.50", "-1234.5"), ("1,2,3", "1 2 3"), ("3,4567", "3 4567"), ("1234,5", "1234 5"),
        ("7.", "7"), ("7.5.", "7.5"), ("1e5", "100000"), ("1E-2 m", "0.01"), ("-$7.50", "-7.5"), ("$-7", "-7"),
        ("€1,000", "1000"), ("7%", "7"), ("$7$", "7"), ("**7**", "7"), ("\\boxed{7}", "7"), ("<b>7</b>", "7"),
        # parts of words and versions
        ("step2", ""), ("3rd", ""), ("v2 x1 é7 7é km²", ""), ("2x4", ""), ("1.2.3", ""), ("12,345x", ""), ("1e5x", ""),
        ("item_3", ""), ("2 4ever", "2"), ("", ""), ("none", ""), ("٣", ""), ("1e99999999", ""),
    ],
)  # fmt: skip
def test_numbers(text, found):
    assert numbers(text) == [Decimal(each) for each in found.split()]


def spellings(value: Decimal, rng: random.Random) -> list[str]:
    """The same value, written differently."""
    plain = f"{value:f}"
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    whole, dot, rest = digits.partition(".")
    grouped = f"{int(whole):,}{dot}{rest}"
    zeros = "0" * rng.randint(1, 3)
    texts = [plain, f"{sign}{grouped}", f"{sign}${grouped}", f"{plain}{'' if dot else '.'}{zeros}"]
    return [*texts, plain.replace("-", "−"), *([] if sign else [f"+{plain}"])]


BEFORE = ("", "The answer is ", "12 + 5 = ", "step2: x1 = ", "1. first\n2. ", "<think>99</think> ", "3 apples, so ")
AFTER = ("", ".", "!", " apples.", "</answer>", "}", " (see step2, v1.2.3 and the 3rd line)", "**", "\n\nDone", " %")


def test_any_spelling_after_any_text_is_right_and_another_value_is_wrong():
    rng = random.Random(0)
    for _ in range(300):
        value = Decimal(rng.choice([rng.randint(-20, 20), rng.randint(-(10**7), 10**7)]))
        value += Decimal(rng.randint(1, 99)) / 100 * rng.choice([0, 0, 1])
        for text in spellings(value, rng):
            completion = rng.choice(BEFORE) + text + rng.choice(AFTER)
            assert score(completion, f"{value:f}") == 1.0, (completion, value)
            for other in (value + 1, -value - 1, value * 10 + 1):
                assert score(completion, f"{other:f}") == 0.0, (completion, other)
            assert last_number.answer_found(completion)


def test_without_a_number_nothing_is_found():
    for text in ("", "seven", "step2 of v1.2.3", "<think>7", "<think>7</think> so"):
        assert score(text, "7") == 0.0 and not last_number.answer_found(text)
    assert score("7, or rather 8", "7") == 0.0


def test_references():
    for answer, value in (("7", "7"), ("-1,234.5", "-1234.5"), ("$5", "5"), ("72 km", "72")):
        assert reference_number(answer) == Decimal(value)
    for answer in (None, "", "x + 1", "x = 5", "3 or 4", "1/2", "-(3)", "2 big dogs", "7²"):
        assert reference_number(answer) is None
        with pytest.raises(TaskError, match="one number"):
            score("7", answer)


def test_it_is_a_verifier_like_any_other():
    assert load_verifier("effopd.tasks.verify:last_number") is last_number
    assert pickle.loads(pickle.dumps(last_number))("so 7", Example("0", "q", "7")) == 1.0
    examples = (Example("0", "q", "7"), Example("1", "q", "-1,234"))
    numeric = Task("math:x", examples, last_number, needs_answers=False)
    assert check_verifier(numeric).checked == 2
    with pytest.raises(TaskError, match="one number"):
        check_verifier(numeric.subset([Example("0", "q", "x + 1")]))
    config = TaskConfig(
        "reasoning-gym:chain_sum", verifier="effopd.tasks.verify:last_number", train_size=8, eval_size=4
    )
    task = load_task(config, "train")
    assert check_verifier(task).checked == 4 and task.sought == "number"
    assert (
        task.verify_batch([f"That makes {example.answer}." for example in task.examples], task.examples) == [1.0] * 8
    )


def test_long_texts():
    """No alternative is tried twice at a position: a square in the length would take hours."""
    for text, found in (
        ("1," * 20_000 + "a", 20_000), ("1" * 50_000 + "a", 0), ("1,111" * 20_000 + "x", 20_000), ("-$" * 30_000, 0),
    ):  # fmt: skip
        assert len(numbers(text)) == found
