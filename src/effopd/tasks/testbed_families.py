"""The testbed's task families: questions, worked reasoning and verifier.

All are small enough for a 0.8M-parameter model and long enough for on-policy learning. A completion
lists its intermediate results, then the answer between `<answer>` tags. The built-in pair knows the
first two families; `long_chain_sum` has models of its own (`effopd testbed other`).

    chain_sum       "… problem: 4 - 1 - 7 + 3 ="      →  3 -4 -1 <answer>-1</answer>
    spell_backward  "… (example: sun -> nus): splat"  →  t a l p s <answer>talps</answer>
    long_chain_sum  "… problem: 4 - 1 - 7 + 3 … ="    →  4-1=3 3-7=-4 -4+3=-1 … <answer>…</answer>

Questions and scores of the first two are those of reasoning-gym's datasets of the same names;
`long_chain_sum` is its `chain_sum` with 14 or 15 terms. `testbed_questions` generates and grades
them without that library. Splits are disjoint for every size and seed, because a hash of the
question's text determines its split.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.base import Example, Task
from effopd.tasks.reasoning import answer_part
from effopd.tasks.tagged_answers import extract_tagged, render_tagged
from effopd.tasks.testbed_questions import GENERATORS, SCORERS, Question


@dataclass(frozen=True)
class Family:
    """One task family.

    Attributes:
        params: parameters of the generator, as of the reasoning-gym dataset.
        corruption: probability (0–1) that an intermediate result is falsified in the base model's
            training data.
    """

    params: Mapping[str, Any]
    corruption: float


#: Families of the built-in pair.
FAMILIES: dict[str, Family] = {
    "chain_sum": Family({"min_terms": 4, "max_terms": 5, "min_digits": 1, "max_digits": 1}, corruption=0.26),
    "spell_backward": Family({"min_word_len": 4, "max_word_len": 6}, corruption=0.18),
}
#: All families, also those that the built-in pair has not learned.
ALL_FAMILIES: dict[str, Family] = FAMILIES | {
    "long_chain_sum": Family({"min_terms": 14, "max_terms": 15, "min_digits": 1, "max_digits": 1}, corruption=0.08),
}

SPLITS = ("train", "validation", "test")
#: Out of 20 hash buckets: 2 for validation, 2 for test, 16 for training.
_BUCKETS, _HELD_OUT_BUCKETS = 20, {0: "validation", 1: "validation", 2: "test", 3: "test"}
#: Consecutive draws without a new question of the split before the family counts as exhausted.
_MAX_DRY_DRAWS = 5_000
_CHUNK = 2_000


def check_family(name: str) -> None:
    """Check the name of a family.

    Raises:
        TaskError: there is no such family.
    """
    if name not in ALL_FAMILIES:
        raise TaskError(
            f"testbed family: expected one of {', '.join(ALL_FAMILIES)}, got {name!r}. Use one of these names."
        )


def family_task(name: str, split: str = "train", size: int = 1000, seed: int = 0) -> Task:
    """`size` distinct questions of a family; the same arguments give the same questions.

    Args:
        name: a key of `ALL_FAMILIES`.
        split: "train", "validation" or "test" ("eval" means validation). No question is in two
            splits, for any sizes and seeds.
        size: number of questions.
        seed: seed of the questions; each (seed, split) has its own random stream.

    Raises:
        TaskError: the family or split is unknown, the size is below 1, or the split has fewer
            questions.
    """
    split = "validation" if split == "eval" else split
    check_family(name)
    if split not in SPLITS:
        raise TaskError(
            f"split: expected one of {', '.join(SPLITS)} (or eval), got {split!r}. Use one of these names."
        )
    if size < 1:
        raise TaskError(f"size: expected at least 1 question, got {size}. Raise the size.")
    examples: list[Example] = []
    seen: set[str] = set()
    dry = 0
    for drawn in _questions(name, split, seed):
        if drawn.text in seen or split_of(drawn.text) != split:
            dry += 1
            if dry > _MAX_DRY_DRAWS:
                raise TaskError(
                    f"testbed family '{name}': expected {size} distinct questions in the {split} split, found "
                    f"{len(examples)}. Lower the size."
                )
            continue
        dry = 0
        seen.add(drawn.text)
        examples.append(_example(f"{name}-{split}-{seed}-{len(examples)}", name, drawn))
        if len(examples) == size:
            break
    return Task(f"testbed:{name}", tuple(examples), verify, render_tagged)


def mixed_examples(split: str, size: int, seed: int) -> list[Example]:
    """`size` questions of each of the built-in pair's families, one family after another."""
    return [example for family in FAMILIES for example in family_task(family, split, size, seed).examples]


def question(example: Example) -> str:
    """Text of an example's question, without the chat message."""
    return example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]


def split_of(text: str) -> str:
    """Split of a question, from a hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % _BUCKETS
    return _HELD_OUT_BUCKETS.get(bucket, "train")


class FamilyVerifier:
    """Score of the text in the last `<answer>` tags (1.0: correct); 0.0 without."""

    #: What a completion must contain, for messages.
    sought = "<answer> tags"

    def __call__(self, completion: str, example: Example) -> float:
        answer = extract_tagged(answer_part(completion))
        if answer is None:
            return 0.0
        return SCORERS[example.metadata["family"]](answer, example.answer or "")

    def answer_found(self, completion: str) -> bool:
        """Whether there are non-empty `<answer>` tags outside the reasoning."""
        return bool((extract_tagged(answer_part(completion)) or "").strip())


#: The verifier of all families.
verify = FamilyVerifier()


def worked_reasoning(example: Example, rng: random.Random | None = None, corruption: float = 0.0) -> str:
    """Target completion for training: intermediate results, then the answer they lead to.

    Each intermediate result is falsified with probability `corruption`. Everything after it,
    including the answer, follows from the false result. A model trained on such consistent text
    samples wrong answers, but its most likely answer stays right.

    Args:
        example: an example of `family_task`.
        rng: random generator; required if `corruption` is above 0.
        corruption: probability (0–1) per intermediate result.

    Example:
        >>> worked_reasoning(family_task("spell_backward", size=1).examples[0]).count("<answer>")
        1
    """
    if corruption > 0 and rng is None:
        raise TaskError(f"corruption={corruption} requires a random generator. Pass rng=random.Random(seed).")
    rng = rng or random.Random(0)
    steps, answer = _WORK[example.metadata["family"]](example.metadata["subject"], rng, corruption)
    return f"{' '.join(steps)} {render_tagged(answer)}"


def _work_chain_sum(expression: str, rng: random.Random, corruption: float) -> tuple[list[str], str]:
    equations = list(_equations(expression, rng, corruption))
    return [str(total) for _, total in equations], str(equations[-1][1])


def _work_long_chain_sum(expression: str, rng: random.Random, corruption: float) -> tuple[list[str], str]:
    equations = list(_equations(expression, rng, corruption))
    return [f"{left}={total}" for left, total in equations], str(equations[-1][1])


def _equations(expression: str, rng: random.Random, corruption: float) -> Iterator[tuple[str, int]]:
    """Each sum of two numbers and its result, falsified with probability `corruption`."""
    tokens = expression.split()
    total = int(tokens[0])
    for sign, term in zip(tokens[1::2], tokens[2::2], strict=True):
        left, change = f"{total}{sign}{term}", int(term) if sign == "+" else -int(term)
        if rng.random() < corruption:
            change = rng.choice((0, -change))  # the term is skipped, or taken with the wrong sign
        total += change
        yield left, total


def _work_spell_backward(word: str, rng: random.Random, corruption: float) -> tuple[list[str], str]:
    steps = []
    for letter in reversed(word):
        wrong = sorted(set(word.lower()) - {letter.lower()}) if rng.random() < corruption else []
        steps.append(rng.choice(wrong) if wrong else letter)
    return steps, "".join(steps)


_WORK = {
    "chain_sum": _work_chain_sum,
    "spell_backward": _work_spell_backward,
    "long_chain_sum": _work_long_chain_sum,
}


def _example(example_id: str, name: str, drawn: Question) -> Example:
    return Example(
        id=example_id,
        prompt=[{"role": "user", "content": drawn.text}],
        answer=drawn.answer,
        metadata={"family": name, "subject": drawn.subject},
    )


def _questions(name: str, split: str, seed: int) -> Iterator[Question]:
    """Endless stream of questions, in chunks with their own seeds."""
    generate, params, chunk = GENERATORS[name], ALL_FAMILIES[name].params, 0
    while True:
        # question i has the seed first + i, so neighboring seeds would share questions
        digest = hashlib.sha256(f"{name}/{split}/{seed}/{chunk}".encode()).digest()
        first = int.from_bytes(digest[:4], "big") >> 1
        yield from (generate(first + i, **params) for i in range(_CHUNK))
        chunk += 1
