"""The math verifier against a reader's verdicts, in the styles of MATH, AIME, Minerva,
OlympiadBench, GSM8K and the SAT.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from effopd.tasks import Example, MathVerifier, extract_boxed
from effopd.tasks.math_equality import grade_boxed
from effopd.tasks.math_text import plain_latex

LINES = (Path(__file__).parent / "grading_pairs.tsv").read_text(encoding="utf-8").splitlines()
PAIRS = [tuple(line.split("\t")) for line in LINES if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def verifier():
    built = MathVerifier(timeout=20.0)
    yield built
    built.worker.close()


@pytest.mark.slow
def test_no_wrong_answer_is_accepted_and_at_most_two_in_a_hundred_right_ones_are_not(verifier):
    examples = [Example(f"{gold} <- {answer}", "?", gold) for _, gold, answer in PAIRS]
    scores = verifier.verify_batch([f"So \\boxed{{{answer}}}." for *_, answer in PAIRS], examples)
    graded = list(zip(PAIRS, scores, strict=True))
    right = [pair for pair, _ in graded if pair[0] == "1"]
    assert len(PAIRS) >= 300 and len(right) >= 150 and len(PAIRS) - len(right) >= 120
    assert [pair for pair, score in graded if score == 1.0 and pair[0] == "0"] == []
    rejected = [pair for pair, score in graded if score == 0.0 and pair[0] == "1"]
    assert len(rejected) <= 0.02 * len(right), rejected
    assert verifier.timeouts == verifier.errors == 0


@pytest.mark.slow
def test_a_wrong_answer_stays_wrong_the_other_way_round(verifier):
    wrong = [(answer, gold) for verdict, gold, answer in PAIRS if verdict == "0" and answer.strip()]
    scores = verifier.verify_batch([f"\\boxed{{{gold}}}" for _, gold in wrong], [Example(a, "?", a) for a, _ in wrong])
    assert [pair for pair, score in zip(wrong, scores, strict=True) if score == 1.0] == []


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("100,000 dollars", "100000", 1.0),
        ("1,000 km", "1000 km", 1.0),
        ("10,000 cm", "100 m", 1.0),
        ("1,000 km", "1 km", 0.0),
        ("n = 12,345", "12345", 1.0),
        (r"\frac{1,000}{3}", r"\frac{1000}{3}", 1.0),
        (r"1,000 \times 10^{3}", "10^6", 1.0),
        ("(1,100)", "1100", 0.0),
        ("x = 1,20", "120", 0.0),
        ("0,500", "500", 0.0),
        (r"\boldsymbol{x+1}", "1+x", 1.0),
        (r"\color{red}\frac{1}{2}", "0.5", 1.0),
        (r"\textcolor{red}{5}", "5", 1.0),
        (r"\underline{5}", "5", 1.0),
        (r"\approx 5", "5", 1.0),
        ("≈ 5", "-5", 0.0),
        ("= 5", "5", 1.0),
    ],
)
def test_separators_inside_answers_and_marks_around_them(answer, gold, score):
    assert grade_boxed(answer, gold) == score


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed 7", "7"),
        (r"so \boxed 7.", "7"),
        (r"$\boxed -3$ or $\boxed{4}$", "4"),
        (r"\boxed{4}, no: \boxed 12, done", "12"),
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed B", "B"),
        (r"\fbox{9}", "9"),
        (r"put it in \boxed, please", None),
    ],
)
def test_boxes_without_braces(text, boxed):
    assert extract_boxed(text) == boxed


@pytest.mark.parametrize(
    "text", ["4.5e33", "10\\,000", "5.", "√2", "½", "90°", "pi/2", "3 1/2", "x^10", "-1./3", "5*10^-5"]
)
def test_one_way_of_writing_is_reached_at_once(text):
    once = plain_latex(text)
    assert plain_latex(once) == once
