"""Warnings about completions in which the verifier finds no answer, with what to do.

A model that does not write the form that the verifier reads, such as `<answer>` tags, scores 0
whatever it can do. Accuracies, searches scored by accuracy and rewards then mean nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from effopd.tasks.base import Task
from effopd.tasks.last_number import LastNumberVerifier, reference_number

logger = logging.getLogger(__name__)

#: Fewest answers for a warning, and the share of gradable answers below which it is given.
ENOUGH, NEARLY_NONE = 8, 0.1
#: Fewest answers, all with score 0, if the verifier cannot detect answers: weak models score 0 too.
ENOUGH_ZEROS = 48
#: Longest quoted completion, in characters.
_QUOTED = 160
#: Examples whose reference answers decide whether the last-number verifier is suggested.
_LOOKED_AT = 8


@dataclass(frozen=True)
class Counts:
    """Counts of some answers.

    Attributes:
        answers: number of answers.
        found: answers with something to grade; `None`: the verifier cannot detect answers.
        cut: answers that reached the length limit.
        empty: answers without text.
        right: answers with a verifier score above 0.
        example: a completion without an answer; "": none.
    """

    answers: int
    found: int | None
    cut: int
    empty: int
    right: int
    example: str = ""

    @classmethod
    def of(cls, task: Task, texts: Sequence[str], cut: Sequence[bool], scores: Sequence[float]) -> Counts:
        """Counts of these completions."""
        found = task.answers_found(texts)
        lacking = [score <= 0 for score in scores] if found is None else [not each for each in found]
        examples = [text for text, lacks in zip(texts, lacking, strict=True) if lacks and text.strip()]
        return cls(
            len(texts),
            None if found is None else sum(found),
            sum(cut),
            sum(not text.strip() for text in texts),
            sum(score > 0 for score in scores),
            examples[0] if examples else "",
        )

    @property
    def nearly_none(self) -> bool:
        """Whether (nearly) no answer can be graded, so that the scores mean nothing.

        Without `found`, whether no answer scored above 0.
        """
        if self.found is None:
            return self.answers >= ENOUGH_ZEROS and self.right == 0
        return self.answers >= ENOUGH and self.found < NEARLY_NONE * self.answers


def mostly_missing(found: float | None, answers: float | None) -> bool:
    """Whether fewer than half of the answers had something to grade; False if unknown."""
    return found is not None and answers is not None and found < answers / 2


def missing_answers(task: Task, counts: Counts, *, limit: int, flag: str, effect: str, train: bool = False) -> str:
    """Warning about answers without anything to grade: how many, an example, and what to do.

    Args:
        task: the task, with its verifier.
        limit: maximum number of tokens per answer.
        flag: the flag that sets `limit`.
        effect: what follows from the missing answers, as a clause.
        train: whether a supervised start is an option.
    """
    if counts.found is None:
        missing, what = counts.answers - counts.right, "score 0"
        effect = f"unless the model is that weak, the verifier does not find its answers, and {effect}"
    else:
        missing, what = counts.answers - counts.found, f"have no {task.sought}"
    ways = _ways(task, counts, missing, limit, flag, train)
    example = f" An example: {_shortened(counts.example)!r}." if counts.example else ""
    return (
        f"{missing} of {counts.answers} answers {what} ({100 * missing / counts.answers:.0f} %): {effect}.{example} "
        f"What can help: {'; '.join(ways)}."
    )


def _ways(task: Task, counts: Counts, missing: int, limit: int, flag: str, train: bool) -> list[str]:
    ways = []
    if counts.cut > counts.answers / 4:
        ways.append(f"raise {flag} ({counts.cut} answers were cut at {limit} tokens)")
    if counts.empty > counts.answers / 4:
        ways.append(f"check --as_chat and the chat template ({counts.empty} answers are empty)")
    if counts.empty < missing:
        if task.name.partition(":")[0] in ("math", "reasoning-gym"):
            ways.append("change --prompt_suffix, which asks for the form of the answer (a short one, or '')")
        references = [reference_number(example.answer) for example in task.examples[:_LOOKED_AT]]
        if None not in references and not isinstance(task.verify, LastNumberVerifier):
            ways.append("grade the last number with --verifier effopd.tasks.verify:last_number")
        if train:
            ways.append(
                "teach the form first, by supervised training on a few hundred answers (as effopd testbed sft does)"
            )
    return ways or ["look at more completions: effopd eval --output FILE"]


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    half = _QUOTED // 2
    return text if len(text) <= _QUOTED else f"{text[:half]} … {text[-half:]}"


class AnswerWatch:
    """Logs `missing_answers` once, as soon as (nearly) no answer can be graded.

    Args:
        limit, flag, train: see `missing_answers`.
    """

    def __init__(self, *, limit: int, flag: str = "--max_completion_length", train: bool = True):
        self._limit, self._flag, self._train = limit, flag, train
        self.said = False

    def see(self, task: Task, counts: Counts, effect: str) -> None:
        """Warn if the answers are nearly all missing, and no warning was given before."""
        if not self.said and counts.nearly_none:
            self.said = True
            text = missing_answers(task, counts, limit=self._limit, flag=self._flag, effect=effect, train=self._train)
            logger.warning("%s", text)
