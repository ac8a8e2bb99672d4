"""Settings of the built-in scorers, and one isolated, timed call of a scorer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch

from effopd.common.distributed import broadcast_from_rank0, raise_on_all_ranks
from effopd.common.isolation import isolated_rng, time_limit
from effopd.errors import EffOPDError, ScorerError
from effopd.extrapolate.search import Score

#: model → score, larger is better.
Scorer = Callable[[Any], "Score | float"]


@runtime_checkable
class SlopeScorer(Protocol):
    """A scorer that also knows the slope of its divergence along a line, from two scores."""

    def begin(self, model: Any, weights: Any) -> None:
        """Begin a line from the current weights."""

    def __call__(self, model: Any, scale: float | None = None) -> Score:
        """Score of the model, which is at `scale` of the line."""

    def slope(self) -> tuple[float, float] | None:
        """Slope and Gauss–Newton curvature at scale 0, after scores of 0 and 1; `None`: unknown."""

    def end(self) -> None:
        """Release what `begin` holds."""


@dataclass(frozen=True)
class AccuracyArgs:
    """Settings for answering the validation prompts."""

    temperature: float = field(
        default=1.0, metadata={"help": "sampling temperature of the validation answers; 0: greedy"}
    )
    batch_size: int = field(default=64, metadata={"help": "validation prompts per generation batch"})
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "token limit of a validation answer; unset: the trainer's max_completion_length"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1 or unset, got {self.max_completion_length}")


@dataclass(frozen=True)
class TeacherKLArgs:
    """Settings of the divergence scorer: none."""


#: Built-in scorer → (its arguments, the setting of `EffOPDConfig` that selects it).
SCORERS: dict[str, tuple[type, str]] = {
    "accuracy": (AccuracyArgs, "validation_size"),
    "teacher_kl": (TeacherKLArgs, "score_rollouts"),
}
#: Settings read only by built-in scorers: those that select one, and its arguments.
OF_SCORERS = frozenset({setting for _, setting in SCORERS.values()}).union(
    *({f.name for f in fields(cls)} for cls, _ in SCORERS.values())
)


def ask(scorer: Scorer, model: Any, scale: float, seed: int, timeout: float | None) -> Score:
    """Score the current model on all ranks; every rank returns rank 0's score and decides alike.

    Scorers that divide the work between ranks return the full score on each rank.

    Args:
        scale: current scale, for the error message.
        seed: seed of the scorer's random numbers.
        timeout: time limit in seconds; `None`: no limit.

    Raises:
        ScorerError: the scorer raised, took too long, or returned no score.
    """
    return broadcast_from_rank0(raise_on_all_ranks(lambda: _ask(scorer, model, scale, seed, timeout)))


def _ask(scorer: Scorer, model: Any, scale: float, seed: int, timeout: float | None) -> Score:
    start = time.perf_counter()
    try:
        with isolated_rng(seed), torch.no_grad(), time_limit(timeout):
            value = scorer(model)
    except EffOPDError:
        raise
    except Exception as error:
        raise ScorerError(
            f"the scorer raised {type(error).__name__} at scale {scale}: {error}. The weights were restored. Fix "
            "the scorer and resume from the last checkpoint."
        ) from error
    return as_score(value, time.perf_counter() - start)


def as_score(value: Any, seconds: float = 0.0) -> Score:
    """What a scorer returned, as a `Score` of Python numbers.

    Args:
        seconds: wall-clock time of a scorer that returned only a number.

    Raises:
        ScorerError: the value is neither a number nor a `Score` of numbers.
    """
    if not isinstance(value, Score):
        try:
            return Score(float(value), seconds=seconds)
        except _NO_NUMBER as error:
            raise ScorerError(
                f"the scorer returned {_what(value)}: expected a number or an effopd Score. The weights were restored."
            ) from error
    try:
        mean = float(value.mean)
    except _NO_NUMBER as error:
        raise ScorerError(
            f"the scorer returned a Score whose mean is {_what(value.mean)}: expected a number. The weights were "
            "restored. Fix the scorer and resume from the last checkpoint."
        ) from error
    try:
        examples = () if value.per_example is None else tuple(map(float, value.per_example))
    except _NO_NUMBER as error:
        raise ScorerError(
            f"the scorer returned a Score whose per_example is {_what(value.per_example)}: expected one number per "
            "example, or (). The weights were restored. Fix the scorer and resume from the last checkpoint."
        ) from error
    try:
        counts = {name: int(getattr(value, name)) for name in _COUNTS}
        verdicts = None if value.verdicts is None else {name: int(n) for name, n in value.verdicts.items()}
        seconds = float(value.seconds)
    except (*_NO_NUMBER, AttributeError) as error:
        raise ScorerError(
            f"the scorer returned a Score whose costs are not numbers ({error}): expected numbers in seconds, "
            f"{', '.join(_COUNTS)} and verdicts. The weights were restored. Fix the scorer and resume from the last "
            "checkpoint."
        ) from error
    return replace(value, mean=mean, per_example=examples, seconds=seconds, verdicts=verdicts, **counts)


#: Token counts of a `Score`.
_COUNTS = ("generated_tokens", "forward_tokens", "teacher_tokens")
#: What `float` raises; RuntimeError: a tensor of several elements.
_NO_NUMBER = (TypeError, ValueError, OverflowError, RuntimeError)


def _what(value: Any) -> str:
    """Type of a value, and the shape of an array."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
