"""How far to go: the paper's search as a pure function.

No model and no device in here: the search sees a function `scale → Score` and returns what it decided and why, so its
logic is tested with plain functions and every later strategy has the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from effopd.errors import NonFiniteWeightsError


@dataclass(frozen=True)
class Score:
    """How good a point is; larger is better.

    Attributes:
        mean: the number the gate compares.
        per_example: one value per validation example, in a fixed order, so that two scores can be paired.
        seconds: wall-clock cost of this score.
        generated_tokens: tokens sampled for it.
        forward_tokens: tokens run through a model besides generation.
    """

    mean: float
    per_example: tuple[float, ...] = ()
    seconds: float = 0.0
    generated_tokens: int = 0
    forward_tokens: int = 0


@dataclass(frozen=True)
class Trial:
    """One scored point: `verdict` is 'start', 'accepted', 'rejected' or 'non-finite'."""

    scale: float
    score: Score | None
    verdict: str

    def to_row(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        row: dict[str, Any] = {"scale": self.scale, "verdict": self.verdict}
        if self.score is not None:
            row |= {
                "score": self.score.mean if math.isfinite(self.score.mean) else None,
                "per_example": list(self.score.per_example),
                "seconds": self.score.seconds,
                "generated_tokens": self.score.generated_tokens,
                "forward_tokens": self.score.forward_tokens,
            }
        return row


@dataclass(frozen=True)
class SearchResult:
    """The accepted scale (0.0 = stay) and the full history, the starting point first."""

    accepted_scale: float
    trials: tuple[Trial, ...] = field(default_factory=tuple)

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled by the whole search."""
        return sum(trial.score.generated_tokens for trial in self.trials if trial.score)

    @property
    def forward_tokens(self) -> int:
        """Tokens forwarded by the whole search besides generation."""
        return sum(trial.score.forward_tokens for trial in self.trials if trial.score)


def passes(gate: str, candidate: float, best: float) -> bool:
    """The gate: `ge` is candidate ≥ best (ties accepted, the paper), `gt` is candidate > best (the released code)."""
    return candidate >= best if gate == "ge" else candidate > best


def first_failure_search(score: Callable[[float], Score], scales: Sequence[float], gate: str = "ge") -> SearchResult:
    """Walk outwards until a candidate fails, and keep the last one that passed (arXiv 2605.11739).

    `v ← score(0)`; for each scale in order: accept if `score(scale)` passes the gate against `v`, then `v` is raised
    to it; the first failure ends the search.

    Args:
        score: maps a scale s to the score of W + s·Δ. May raise `NonFiniteWeightsError`: that candidate fails.
        scales: candidate scales in the order to try them.
        gate: `ge` or `gt`, see `passes`.

    Example:
        >>> result = first_failure_search(lambda s: Score(-(s - 4) ** 2), (2, 4, 6))
        >>> result.accepted_scale, [trial.verdict for trial in result.trials]
        (4.0, ['start', 'accepted', 'rejected'])
    """
    start = score(0.0)
    if not math.isfinite(start.mean):
        return SearchResult(0.0, (Trial(0.0, start, "non-finite"),))
    trials, accepted, best = [Trial(0.0, start, "start")], 0.0, start.mean
    for scale in map(float, scales):
        try:
            candidate = score(scale)
        except NonFiniteWeightsError:
            trials.append(Trial(scale, None, "non-finite"))
            break
        if not math.isfinite(candidate.mean):
            trials.append(Trial(scale, candidate, "non-finite"))
            break
        if not passes(gate, candidate.mean, best):
            trials.append(Trial(scale, candidate, "rejected"))
            break
        trials.append(Trial(scale, candidate, "accepted"))
        accepted, best = scale, candidate.mean
    return SearchResult(accepted, tuple(trials))
