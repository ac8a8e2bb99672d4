"""Which way to jump and how to decide: one entry a strategy, one file of pure functions behind each.

    when (schedule) → where to (`direction` or `fit`) → how far (`search`) → move

A strategy either looks along a direction it can name right away (`direction`), or watches the first steps and predicts
where they lead (`fit`). Adding one: docs/add-a-strategy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effopd.extrapolate.live_weights import Direction, displacement
from effopd.extrapolate.search import Score, SearchResult, Trial, first_failure_search, line_search
from effopd.extrapolate.strategies import alpha_opd, relex
from effopd.extrapolate.strategies.random_direction import random_like, seed_of
from effopd.extrapolate.strategies.rank_one import RankOne, leading


@dataclass(frozen=True)
class Prediction:
    """Where a fit says training leads.

    Attributes:
        delta: predicted displacement from the start, by parameter name; parameters left out stay where they are.
        quality: figures that say how far to trust it, for the log.
    """

    delta: Mapping[str, Tensor]
    quality: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """A prediction from the first steps.

    Attributes:
        keep: what is remembered of one parameter's displacement W_t − W_0, as named tensors.
        predict: (observations by parameter, steps, accuracies relative to the target, config) → prediction.
        scored: whether every observation needs an accuracy.
    """

    keep: Callable[[Tensor], dict[str, Tensor]]
    predict: Callable[[Mapping[str, Sequence[Mapping[str, Tensor]]], Sequence[int], Sequence[float], Any], Prediction]
    scored: bool


@dataclass(frozen=True)
class Strategy:
    """What the look-ahead does at a trigger.

    Attributes:
        help: one line for `--help`.
        scorer: what it scores with: `accuracy` on D_v, `teacher_kl` on fresh rollouts, or `None`: it does not score.
        search: (score, config) → decision.
        direction: (seed, step) → the direction to look along; `None` for strategies that fit.
        fit: how to predict; `None` for strategies that look along a direction.
        gate: its source's gate.
        parameters: its source's choice of what moves.
        schedule: its source's triggers.
        optimizer: what happens to the optimizer's moments after a jump forwards: `keep` or `reset`.
        steer: whether the preferred scale steers the learning rate (`steering`).
    """

    help: str
    scorer: str | None
    search: Callable[[Callable[[float], Score], Any], SearchResult]
    direction: Callable[[int, int], Direction] | None = None
    fit: Fit | None = None
    gate: str = "ge"
    parameters: str = "attention+mlp"
    schedule: str = "powers_of_two"
    optimizer: str = "keep"
    steer: bool = False


# -- how far ----------------------------------------------------------------------------------------------------


def _first_failure(score: Callable[[float], Score], config: Any) -> SearchResult:
    return first_failure_search(score, config.scales, config.resolved_gate, config.gate_z)


def _nowhere(score: Callable[[float], Score], config: Any) -> SearchResult:
    return first_failure_search(score, (0.0,), config.resolved_gate, config.gate_z)


def _line(score: Callable[[float], Score], config: Any) -> SearchResult:
    return line_search(score, config.resolved_gate, config.gate_z)


#: Steering never takes the learning rate below this share of its schedule.
LOWEST_RATE = 0.125


def steering(best_scale: float, before: float = 0.0, so_far: float = 1.0) -> float:
    """What the learning rate is multiplied with: the scales that searches prefer say how far it is from right.

    √min(1 + s, 4) where more than the displacement again would have been better (s > 1), twice in a row: once may be due to
    the start, twice is due to the rate; ½√s with the smaller of the two scales, where that is more: a rate that is hundreds of
    times too low is there in a few steps. 1/√2 where less would have been better (s < 0), but never below `LOWEST_RATE` of
    the schedule. Else 1. A preference need not pass the gate: a rate that falls whenever nothing passes it dies out as soon as
    gains are smaller than the noise. Where scores are noise and nothing else, the rate goes down to `LOWEST_RATE`, and stays
    there (some 30 searches; a fall takes one preference, a rise two in a row).

    Args:
        best_scale: of this search.
        before: of the search before it, 0 if there was none.
        so_far: the product of all factors until now.
    """
    if best_scale > 1:
        if before <= 1:
            return 1.0
        return max(min(1 + best_scale, 4.0) ** 0.5, 0.5 * min(best_scale, before) ** 0.5)
    return 1.0 if best_scale >= 0 else max(0.5**0.5, min(1.0, LOWEST_RATE / so_far))


def unscored(scale: float) -> SearchResult:
    """Go to `scale` without asking anyone."""
    return SearchResult(scale, (Trial(0.0, None, "start"), Trial(scale, None, "accepted")))


# -- where to ---------------------------------------------------------------------------------------------------


def _last_displacement(seed: int, step: int) -> Direction:
    return displacement


def _random(seed: int, step: int) -> Direction:
    """Noise with the norm of the displacement, tensor by tensor; the same for every candidate of a search."""

    def direction(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
        delta = origin - anchor
        generator = torch.Generator(delta.device).manual_seed(seed_of(seed, step, name))
        return random_like(delta, generator)

    return direction


# -- what the first steps predict -----------------------------------------------------------------------------------


def _keep_leading(delta: Tensor) -> dict[str, Tensor]:
    point = leading(delta)
    scalars = torch.tensor([point.s1, point.norm], dtype=torch.float64)
    return {"u": point.u_M, "v": point.v_N, "s1_norm": scalars, "shape": torch.tensor(delta.shape)}


def _predict_alpha(observations, steps, quality, config) -> Prediction:
    fits, delta = {}, {}
    for name, points in observations.items():
        path = [RankOne(p["u"], float(p["s1_norm"][0]), p["v"], float(p["s1_norm"][1])) for p in points]
        fit = fits[name] = alpha_opd.predict(path, quality, seed=config.seed)
        if fit is not None:
            delta[name] = torch.outer(fit.u_M, fit.v_N).reshape(points[0]["shape"].tolist())
    return Prediction(delta, alpha_opd.summary(fits))


def _predict_relex(observations, steps, quality, config) -> Prediction:
    at_step = config.relex_factor * steps[-1]
    fits = {
        # a resume reads the earlier points into main memory
        name: relex.predict([point["delta"].to(points[-1]["delta"].device) for point in points], steps, at_step)
        for name, points in observations.items()
    }
    return Prediction({name: fit.delta for name, fit in fits.items() if fit}, relex.summary(fits))


STRATEGIES: dict[str, Strategy] = {
    "line_search": Strategy(
        "ours: a line search by the KL to the teacher on rollouts that training makes anyway, as often as it pays",
        "teacher_kl",
        _line,
        _last_displacement,
        gate="margin",
        parameters="all",
        schedule="adaptive",
        optimizer="reset",
        steer=True,
    ),
    "effopd": Strategy(
        "the paper's search along the last displacement", "accuracy", _first_failure, _last_displacement
    ),
    "effopd-released": Strategy(
        "the authors' public code: accepts only a strictly better score, moves also post-attention and q/k norms",
        "accuracy",
        _first_failure,
        _last_displacement,
        gate="gt",
        parameters="released-code",
    ),
    "noop": Strategy("control: pays for scoring, never moves", "accuracy", _nowhere, _last_displacement),
    "fixed": Strategy(
        "control: always jumps to W + 2kΔ, k = fixed_k, without scoring",
        None,
        lambda score, config: unscored(2.0 * config.fixed_k),
        _last_displacement,
    ),
    "random_direction": Strategy(
        "control: the paper's search along noise as long as Δ", "accuracy", _first_failure, _random
    ),
    "alpha_opd": Strategy(
        "AlphaOPD: predicts each matrix from its rank-1 path and the accuracies so far, once, without scoring",
        "accuracy",
        lambda score, config: unscored(1.0),
        fit=Fit(_keep_leading, _predict_alpha, scored=True),
    ),
    "relex": Strategy(
        "RELEX: extends a straight line through the rank-1 coefficients of the first steps, once, without scoring",
        None,
        lambda score, config: unscored(1.0),
        fit=Fit(lambda delta: {"delta": delta.clone()}, _predict_relex, scored=False),
    ),
}
