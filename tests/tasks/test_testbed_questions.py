"""The testbed's questions and scores equal reasoning-gym's, and need nothing of it."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from effopd.tasks.tagged_answers import extract_tagged
from effopd.tasks.testbed_families import FAMILIES, family_task
from effopd.tasks.testbed_questions import GENERATORS, SCORERS

#: First questions of each family (train, seed 0) and their answers, which the runs of docs/ used.
FIRST = {
    "chain_sum": [("6 - 3 - 7 + 0 + 5", "1"), ("9 + 1 + 1 - 5 - 9", "-3")],
    "spell_backward": [("ramie", "eimar"), ("Itonia", "ainotI")],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_first_questions(name):
    examples = family_task(name, "train", size=2, seed=0).examples
    assert [(example.metadata["subject"], example.answer) for example in examples] == FIRST[name]


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("reasoning_gym")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_questions_equal_the_library(library, name):
    key = {"chain_sum": "expression", "spell_backward": "word"}[name]
    for seed in (0, 7, 2**31 - 5000):
        dataset = library.create_dataset(name, size=2000, seed=seed, **FAMILIES[name].params)
        for i in range(2000):
            entry = dataset[i]
            assert GENERATORS[name](seed + i, **FAMILIES[name].params) == (
                entry["question"], entry["answer"], entry["metadata"][key],
            )  # fmt: skip


@pytest.mark.slow
def test_other_parameters_of_chain_sum_equal_the_library(library):
    params = {"min_terms": 1, "max_terms": 6, "min_digits": 1, "max_digits": 4}
    dataset = library.create_dataset("chain_sum", size=300, seed=3, **params)
    for i in range(300):
        assert GENERATORS["chain_sum"](3 + i, **params).text == dataset[i]["question"]


#: Endings and forms of answers that a scorer could treat differently.
ODD = ("", ",", "+7", "007", "7.0", "-7", "1,0", "nan", "sNaN", "inf", "1e5", "1e999999999", "٧", "7 ", " 7", "\ud800",
       "7_0", "the answer is 7", "seven", "7" * 5000, "TALPS", "talps", "talpsx", "tal", "xalps", "İ")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_the_library(library, name):
    dataset = library.create_dataset(name, size=1, seed=0, **FAMILIES[name].params)
    rng, letters = random.Random(0), "0123456789,.-+e" if name == "chain_sum" else "talpsTALPS"
    drawn = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(3000)]
    for answer in (*ODD, *drawn):
        for right in ("7", "-13", "1000") if name == "chain_sum" else ("talps", "aani", "sibab"):
            expected = dataset.score_answer(answer, {"answer": right})
            assert SCORERS[name](answer, right) == expected, (answer, right)


@pytest.mark.slow
def test_extraction_equals_the_library(library):
    from reasoning_gym.utils import extract_answer

    rng = random.Random(0)
    pieces = ("<answer>", "</answer>", " ", "\n", "7", "x")
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        assert extract_tagged(text) == extract_answer(text), text


def test_the_testbed_needs_no_reasoning_gym_and_its_tasks_name_the_extra():
    code = """
import sys
sys.modules["reasoning_gym"] = None  # as if it were not installed
from effopd.errors import MissingDependencyError
from effopd.tasks import ReasoningGymVerifier, TaskConfig, check_packages, load_task
from effopd.tasks.testbed_families import FAMILIES
for family in FAMILIES:
    task = load_task(TaskConfig(f"testbed:{family}", train_size=3, eval_size=3), "train")
    (first, *_) = task.examples
    assert task.verify(f"<answer>{first.answer}</answer>", first) == 1.0
for attempt in (
    lambda: load_task(TaskConfig("reasoning-gym:chain_sum"), "train"),
    lambda: ReasoningGymVerifier("chain_sum"),
    lambda: check_packages(TaskConfig("math:ORG/SET", eval_task="reasoning-gym:chain_sum")),
):
    try:
        attempt()
    except MissingDependencyError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all("pip install 'effopd[gym]'" in line for line in lines)
