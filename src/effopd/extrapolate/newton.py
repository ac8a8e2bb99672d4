r"""`newton_search`: scale s of W + s·Δ from slope and curvature at W, then checked and corrected.

    s₁ = −D′(0) / D″(0)                              Newton's step on the scored divergence D
    D(s) ≈ D(0) + D′(0) s + (D(s₁) − D(0) − D′(0) s₁) (s / s₁)²,   s₂ = its minimum

D″(0) is the Gauss–Newton curvature E var_π(δz), which is positive. Doubling the scale until the
score falls takes log₂ s + 3 scores; this search takes three to five, however far the minimum is.
A correction that does not improve on the best score is the last one.

If scale 1 is not better than the start, the step was too long, perhaps by so much that a slope
between the two means nothing. Then scales −½, −¾, −⅞, … towards the anchor are tried while the
score improves, then the vertex of the parabola through the best one.

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
#: Corrections after Newton's step.
_CORRECTIONS = 2
#: Share of the way to the best scale that a forward jump takes.
WAY = 0.5
#: Scales tried towards the anchor; the last one keeps 1/128 of Δ.
_HALVINGS = 7


def newton_search(
    score: Callable[[float], Score],
    slope: Callable[[], tuple[float, float] | None],
    gate: str = "significant",
    z: float | None = 2.0,
    longest: float = 65536.0,
) -> SearchResult:
    """Score 0, 1, Newton's step and up to two corrections; jump towards the best that passes.

    Gate `significant` applies to forward jumps only, as in `line_search`. The accepted scale is
    half of a passing scale s > 0. That point is not scored itself; its trial comes last.

    Args:
        score: s → score of W + s·Δ, larger is better; −D.
        slope: called after scales 0 and 1 have been scored. Returns (D′(0), Gauss–Newton D″(0)) on
            the scored examples; `None` if they are not known: then `line_search` decides.
        gate: `not_worse`, `better` or `significant`, see `GATES`; against the start.
        z: threshold of `significant` in standard errors; `None` for the other gates.
        longest: largest scale tried.

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
    known = slope() if line.known.get(1.0, -math.inf) > start else None
    if known is None or not (known[1] > 0 > known[0]):
        return _halfway(doubled(line, longest, halvings=_HALVINGS))
    first, second = known
    scale = min(-first / second, longest)
    for _ in range(1 + _CORRECTIONS):
        if any(abs(scale - other) <= CLOSE * max(abs(scale), abs(other)) for other in line.scores):
            break
        best = max(line.known.values())
        line.attempt(scale)
        value = line.known.get(scale)
        if value is not None and value <= best and best > line.known[1.0]:
            break
        bend = math.inf if value is None else (start - value - first * scale) / scale**2
        # above 0: the parabola has a minimum; otherwise D falls faster than its slope says
        vertex = -first / (2 * bend) if bend > 0 else math.inf
        scale = min(max(vertex, scale / _FACTOR), _FACTOR * scale, longest)
    return _halfway(line.result())


def _halfway(result: SearchResult) -> SearchResult:
    """The result with half of its scale if it is a forward jump."""
    scale = WAY * result.accepted_scale
    return SearchResult(scale, (*result.trials, Trial(scale, None, "accepted"))) if scale > 0 else result
