"""Searches for the scale s of W + s·Δ, as pure functions of `scale → Score`.

They know no model and no device, so tests call them with plain functions. Each returns a
`SearchResult`: the accepted scale and every trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from effopd.errors import NonFiniteWeightsError, ScorerError
from effopd.runs.records import TrialRecord


@dataclass(frozen=True)
class Score:
    """Score of one point, and its cost; larger is better.

    Attributes:
        mean: the value that gates compare.
        per_example: one value per example, in a fixed order, for paired comparisons.
        seconds: wall-clock time.
        generated_tokens: tokens sampled.
        forward_tokens: tokens in forward passes outside generation.
        teacher_tokens: the teacher's part of `forward_tokens`.
        verdicts: number of answers by verdict, of verifiers that run programs; otherwise `None`.
    """

    mean: float
    per_example: tuple[float, ...] = ()
    seconds: float = 0.0
    generated_tokens: int = 0
    forward_tokens: int = 0
    teacher_tokens: int = 0
    verdicts: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Trial:
    """One scored point: `verdict` is 'start', 'accepted', 'rejected' or 'non-finite'."""

    scale: float
    score: Score | None
    verdict: str

    def to_record(self) -> TrialRecord:
        """The trial as it is recorded in `searches.jsonl`."""
        if self.score is None:
            return TrialRecord(self.scale, self.verdict)
        return TrialRecord(
            self.scale,
            self.verdict,
            self.score.mean if math.isfinite(self.score.mean) else None,
            self.score.per_example,
            self.score.seconds,
            self.score.generated_tokens,
            self.score.forward_tokens,
            self.score.verdicts,
        )


@dataclass(frozen=True)
class SearchResult:
    """The accepted scale (0.0: stay) and all trials, the start first."""

    accepted_scale: float
    trials: tuple[Trial, ...] = field(default_factory=tuple)

    @property
    def best_scale(self) -> float:
        """Scale with the highest finite score, accepted or not; 0.0 if nothing was scored."""
        scored = {
            trial.scale: trial.score.mean for trial in self.trials if trial.score and math.isfinite(trial.score.mean)
        }
        return max(scored, key=scored.__getitem__, default=0.0)

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled by all trials."""
        return sum(trial.score.generated_tokens for trial in self.trials if trial.score)

    @property
    def forward_tokens(self) -> int:
        """Tokens in the forward passes of all trials, outside generation."""
        return sum(trial.score.forward_tokens for trial in self.trials if trial.score)

    @property
    def teacher_tokens(self) -> int:
        """The teacher's part of `forward_tokens`."""
        return sum(trial.score.teacher_tokens for trial in self.trials if trial.score)


def paired_gain(candidate: Score, reference: Score) -> tuple[float, float]:
    """Paired gain mean(d) and its standard error std(d) / √n, with d_i = c_i − r_i.

    Pairing removes the variance between examples. Scores without examples count as exact: their
    difference has error 0.

    Raises:
        ScorerError: the scores have different numbers of examples, or only one.

    Example:
        >>> paired_gain(Score(2.0, (1.0, 3.0)), Score(1.0, (0.0, 2.0)))
        (1.0, 0.0)
    """
    n = len(candidate.per_example)
    if n == 1 or n != len(reference.per_example):
        raise ScorerError(
            "gate 'significant' compares example by example: expected two scores with the same n >= 2 values in "
            f"per_example (or none), got {n} and {len(reference.per_example)}. Score more examples, or set "
            "gate='better'."
        )
    gains = [c - r for c, r in zip(candidate.per_example, reference.per_example, strict=True)]
    mean = math.fsum(gains) / n if n else candidate.mean - reference.mean
    return mean, math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (n - 1) / n) if n else 0.0


def paired_z(candidate: Score, reference: Score) -> float:
    """Paired gain divided by its standard error, see `paired_gain`.

    A gain on one example alone has z = 1, however large it is. An exact gain has z = ∞ and an exact
    tie z = 0.

    Example:
        >>> one = Score(0.25, per_example=(0.0, 0.0, 0.0, 1.0))
        >>> paired_z(one, Score(0.0, per_example=(0.0, 0.0, 0.0, 0.0)))
        1.0
    """
    mean, error = paired_gain(candidate, reference)
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


#: (candidate, reference, z) → whether the candidate is accepted. `not_worse` is ≥, so ties are
#: accepted (the paper). `better` is > (the released code). `significant` is `paired_z` ≥ z.
GATES: dict[str, Callable[[Score, Score, float | None], bool]] = {
    "not_worse": lambda candidate, reference, z: candidate.mean >= reference.mean,
    "better": lambda candidate, reference, z: candidate.mean > reference.mean,
    "significant": lambda candidate, reference, z: paired_z(candidate, reference) >= (z or 0.0),
}


def unscored(scale: float) -> SearchResult:
    """Accept `scale` without scoring it."""
    return SearchResult(scale, (Trial(0.0, None, "start"), Trial(scale, None, "accepted")))


def first_failure_search(
    score: Callable[[float], Score], scales: Sequence[float], gate: str = "not_worse", z: float | None = 2.0
) -> SearchResult:
    """Try scales in order until one fails; accept the last one that passed (arXiv 2605.11739).

    Start with `v ← score(0)`. A candidate passes if its score passes the gate against `v`; then `v`
    becomes its score. The first failure ends the search.

    Args:
        score: maps a scale s to the score of W + s·Δ. A candidate fails if `score` raises
            `NonFiniteWeightsError` or returns a non-finite mean.
        scales: candidate scales in the order tried.
        gate: `not_worse`, `better` or `significant`, see `GATES`.
        z: threshold of `significant` in standard errors; `None` for the other gates.

    Example:
        >>> result = first_failure_search(lambda s: Score(-(s - 4) ** 2), (2, 4, 6))
        >>> result.accepted_scale, [trial.verdict for trial in result.trials]
        (4.0, ['start', 'accepted', 'accepted', 'rejected'])
    """
    start = score(0.0)
    if not math.isfinite(start.mean):
        return SearchResult(0.0, (Trial(0.0, start, "non-finite"),))
    trials, accepted, best = [Trial(0.0, start, "start")], 0.0, start
    for scale in map(float, scales):
        try:
            candidate = score(scale)
        except NonFiniteWeightsError:
            trials.append(Trial(scale, None, "non-finite"))
            break
        if not math.isfinite(candidate.mean):
            trials.append(Trial(scale, candidate, "non-finite"))
            break
        if not GATES[gate](candidate, best, z):
            trials.append(Trial(scale, candidate, "rejected"))
            break
        trials.append(Trial(scale, candidate, "accepted"))
        accepted, best = scale, candidate
    return SearchResult(accepted, tuple(trials))


def line_search(
    score: Callable[[float], Score],
    gate: str = "better",
    z: float | None = 2.0,
    longest: float = 65536.0,
    refinements: int = 1,
) -> SearchResult:
    """Scale with the highest score that passes the gate against the start, found in few scores.

    1. Double the scale from 1 while the score improves, up to `longest`.
    2. If scale 1 does not improve on the start, try −½, halfway back to the anchor.
    3. Try the vertex of the parabola through the highest point and its neighbors. One such
       refinement maximizes a quadratic score exactly.

    Gate `significant` applies to forward jumps only; a backward jump (s < 0) needs just a better
    score. It lands between the start and the anchor, so a false one loses at most part of the last
    update.

    Args:
        score: see `first_failure_search`.
        gate: `not_worse`, `better` or `significant`, see `GATES`. The accepted point never scores
            below the start.
        z: threshold of `significant` in standard errors; `None` for the other gates.
        longest: largest scale tried.
        refinements: number of parabola steps.

    Example:
        >>> result = line_search(lambda s: Score(-(s - 5.5) ** 2))
        >>> result.accepted_scale, [trial.scale for trial in result.trials]
        (5.5, [0.0, 1.0, 2.0, 4.0, 8.0, 5.5])
    """
    line = Line(score, gate, z)
    return doubled(line, longest, refinements) if line.known else line.result()


class Line:
    """Scored points of one search; the start is scored on construction.

    Gate `significant` applies to forward jumps only; a backward jump needs a better score.

    Attributes:
        known: scale → mean of every finite score; empty if the start is not finite.
        scores: scale → score of every point tried; `None`: the weights are not finite there.
    """

    def __init__(self, score: Callable[[float], Score], gate: str, z: float | None):
        self._score, self._gate, self._z = score, gate, z
        self._start, self._accepted = score(0.0), 0.0
        finite = math.isfinite(self._start.mean)
        self.scores: dict[float, Score | None] = {0.0: self._start}
        self.known = {0.0: self._start.mean} if finite else {}
        self._trials = [Trial(0.0, self._start, "start" if finite else "non-finite")]

    def attempt(self, scale: float) -> None:
        """Score a scale and accept it if it wins; nothing if it has been scored."""
        if scale in self.scores:
            return
        try:
            candidate: Score | None = self._score(scale)
        except NonFiniteWeightsError:
            candidate = None
        self.scores[scale] = candidate
        if candidate is None or not math.isfinite(candidate.mean):
            self._trials.append(Trial(scale, candidate, "non-finite"))
            return
        self.known[scale] = candidate.mean
        asked = "better" if self._gate == "significant" and scale < 0 else self._gate
        wins = candidate.mean >= self.known[self._accepted] and GATES[asked](candidate, self._start, self._z)
        self._trials.append(Trial(scale, candidate, "accepted" if wins else "rejected"))
        self._accepted = scale if wins else self._accepted

    def result(self) -> SearchResult:
        """The accepted scale and all trials."""
        return SearchResult(self._accepted, tuple(self._trials))


def doubled(line: Line, longest: float, refinements: int = 1, halvings: int = 1) -> SearchResult:
    """The search of `line_search` on a line whose first points may have been scored.

    Args:
        line: the line, its start finite.
        longest: largest scale tried.
        refinements: number of parabola steps.
        halvings: number of backward scales −½, −¾, −⅞, … tried at most. The first one that does not
            improve on the one before is the last.
    """
    known, scale, peak = line.known, 1.0, 0.0
    while scale <= longest:
        line.attempt(scale)
        if not known.get(scale, -math.inf) > known[peak]:
            break
        peak, scale = scale, 2 * scale
    for halving in range(1, 1 + halvings) if peak == 0.0 else ():
        scale = 0.5**halving - 1
        line.attempt(scale)
        if not known.get(scale, -math.inf) > known[peak]:
            break
        peak = scale
    for _ in range(refinements):
        vertex = _vertex(known, max(known, key=known.__getitem__), longest)
        if vertex is None:
            break
        line.attempt(vertex)
    return line.result()


def _vertex(known: Mapping[float, float], best: float, longest: float) -> float | None:
    """Vertex of the parabola through `best` and its neighbors; `None` if there is no usable one.

    Usable: the parabola opens downwards, and the vertex is a new point between the scored points
    next to `best`. At an end, the bound is the anchor (−1) or `longest`.
    """
    below, above = sorted(s for s in known if s < best), sorted(s for s in known if s > best)
    near = [*below[-1:], best, *above[:1]] if below and above else [*below[-2:], best, *above[:2]]
    if len(near) < 3:
        return None
    a, b, c = near
    slopes = (known[b] - known[a]) / (b - a), (known[c] - known[b]) / (c - b)
    curvature = (slopes[1] - slopes[0]) / (c - a)
    if not curvature < 0:
        return None
    vertex = 0.5 * (a + b) - 0.5 * slopes[0] / curvature
    low, high = below[-1] if below else -1.0, above[0] if above else longest
    inside = low < vertex < high and min(abs(vertex - s) for s in near) > 1e-9 * (c - a)
    return vertex if inside else None
