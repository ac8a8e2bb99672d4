r"""`newton_search`: scale s of W + s·Δ from slope and curvature at W, then checked and corrected.

    s₁ = −D′(0) / D″(0)                              Newton's step on the scored divergence D
    D(s) ≈ D(0) + D′(0) s + (D(s₁) − D(0) − D′(0) s₁) (s / s₁)²,   s₂ = its minimum

D″(0) is the Gauss–Newton curvature E var_π(δz), which is positive. Doubling the scale until the
score falls takes about log₂ s + 4 scores. This search takes two to five for any distance.
A correction that does not improve on the best score is the last one. Only while all candidates are
worse than scale 1 do corrections go on beyond the second: Newton's step can be far too long if one
rollout's divergence rises steeply further out.

If scale 1 is not better than the start, the step was too long. The minimum is then behind it
(D′(0) > 0: s₁ as above, at least −127/128, which keeps 1/128 of Δ) or just ahead of it (D′(0) < 0:
s₁ is the vertex of the parabola through D(0) and D(1) with this slope). One correction follows, so
the search takes two to four scores.

Slope and curvature come from the difference between scales 0 and 1. If that difference is large,
or D(1) far above what they predict, they mean nothing. Then, and without a slope, scales −½, −¾,
−⅞, … are tried while the score improves, then the vertex of the parabola through the best one.

A forward jump goes half of the way to the best scale. The scores are those of rollouts from W,
and a model far from W samples other rollouts. On SmolLM2-135M, the best scale along the first step
was 40 on rollouts from W and 17 to 33 on the candidates' own (docs/log.md). For a quadratic score,
half of the way gets three quarters of the gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from effopd.extrapolate.search import Line, Score, SearchResult, Trial, doubled

#: A candidate closer than this to a scored point, as a share of its scale, is not scored.
CLOSE = 0.15
#: A correction moves the scale by at most this factor.
_FACTOR = 4.0
#: Corrections after Newton's step of a forward search, and of one after a step that was too long.
_CORRECTIONS, _CORRECTIONS_BACK = 2, 1
#: Corrections of a forward search at most, while all candidates are worse than scale 1.
_CORRECTIONS_IF_TOO_LONG = 6
#: Share of the way to the best scale that a forward jump takes; of the first one if it follows one
#: of several steps on its rollouts.
WAY, WAY_OF_ONE_STEP = 0.5, 0.75
#: Scales tried towards the anchor without a slope; the last one keeps 1/128 of Δ.
_HALVINGS = 7
#: After a step that was too long, slope and curvature are used up to this D″(0), in nats (twice the
#: divergence between scales 0 and 1), and up to this (D(1) − D(0)) / (|D′(0)| + D″(0)/2).
_MOST_CURVED, _MOST_ABOVE = 0.25, 3.0
#: Lowest scale, and the smallest |scale| that is tried after a step that was too long.
_LOWEST, _SMALLEST = 0.5**_HALVINGS - 1, 0.125


def newton_search(
    score: Callable[[float], Score],
    slope: Callable[[], tuple[float, float] | None],
    gate: str = "significant",
    z: float | None = 2.0,
    longest: float = 65536.0,
    way: float = WAY,
) -> SearchResult:
    """Score 0, 1, Newton's step and up to two corrections; jump towards the best that passes.

    Gate `significant` applies to forward jumps only, as in `line_search`. The accepted scale is
    `way` · s for a passing scale s > 0. That point is not scored itself; its trial comes last.

    Args:
        score: s → score of W + s·Δ, larger is better; −D.
        slope: called after scales 0 and 1 have been scored. Returns (D′(0), Gauss–Newton D″(0)) on
            the scored examples; `None` if they are not known: then `line_search` decides.
        gate: `not_worse`, `better` or `significant`, see `GATES`; against the start.
        z: threshold of `significant` in standard errors; `None` for the other gates.
        longest: largest scale tried.
        way: share of the way to the best scale that a forward jump takes.

    Example:
        >>> loss = lambda s: (s - 40.0) ** 2
        >>> result = newton_search(lambda s: Score(-loss(s)), lambda: (-80.0, 2.0), "better", None)
        >>> result.accepted_scale, result.best_scale, [trial.scale for trial in result.trials]
        (20.0, 40.0, [0.0, 1.0, 40.0, 20.0])
    """
    line = Line(score, gate, z)
    if not line.known:
        return line.result()
    start = line.known[0.0]
    line.attempt(1.0)
    fall = line.known.get(1.0, -math.inf) - start  # D(0) − D(1)
    known = slope() if math.isfinite(fall) else None
    if known is None or not _is_local(fall, *known):
        return _part(doubled(line, longest, halvings=_HALVINGS), way)
    first, second = known
    if fall > 0:
        _correct(line, first, -first / second, (0.0, longest), _CORRECTIONS)
    elif first > 0:
        _correct(line, first, -first / second, (_LOWEST, 0.0), _CORRECTIONS_BACK)
    else:
        _correct(line, first, _vertex(line, first, 1.0), (0.0, 1.0), _CORRECTIONS_BACK)
    return _part(line.result(), way)


def _is_local(fall: float, first: float, second: float) -> bool:
    """Whether slope and curvature describe D between scales 0 and 1."""
    if not second > 0:
        return False
    if fall > 0:
        return first < 0
    return second <= _MOST_CURVED and -fall <= _MOST_ABOVE * (abs(first) + second / 2)


def _correct(line: Line, first: float, scale: float, bounds: tuple[float, float], corrections: int) -> None:
    """Score `scale`, then corrected scales between the bounds while the score improves."""
    before, back = max(line.known.values()), line.known[1.0] <= line.known[0.0]
    for done in range(1 + (corrections if back else _CORRECTIONS_IF_TOO_LONG)):
        best = max(line.known.values())
        if done > corrections and best > before:
            return
        scale = min(max(scale, bounds[0]), bounds[1])
        close = (abs(scale - other) <= CLOSE * max(abs(scale), abs(other)) for other in line.scores)
        if (back and abs(scale) < _SMALLEST) or any(close):
            return
        line.attempt(scale)
        value = line.known.get(scale)
        if value is not None and value <= best and best > before:
            return
        vertex, size = _vertex(line, first, scale), abs(scale)
        scale = math.copysign(min(max(abs(vertex), size / _FACTOR), _FACTOR * size), scale)


def _vertex(line: Line, first: float, scale: float) -> float:
    """Vertex of the parabola in s through D(0) and D(scale) with D′(0) = `first`.

    0 if D(scale) is not finite; ±∞, the sign that of `scale`, if D falls faster than its slope.
    """
    value, start = line.known.get(scale), line.known[0.0]
    bend = math.inf if value is None else (start - value - first * scale) / scale**2
    return -first / (2 * bend) if bend > 0 else math.copysign(math.inf, scale)


def _part(result: SearchResult, way: float) -> SearchResult:
    """The result with `way` times its scale if it is a forward jump."""
    scale = way * result.accepted_scale
    return SearchResult(scale, (*result.trials, Trial(scale, None, "accepted"))) if scale > 0 else result
