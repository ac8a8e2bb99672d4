"""RELEX (arXiv 2605.21468): a straight line through the rank-1 coefficients of the first steps,
extended.

For each tensor on its own, the displacements ΔW_t of the observed steps are stacked as rows of M
[T, D]. The leading right singular vector v of M is the one direction that explains most of them;
the coefficients c_t = ΔW_t · v are fitted by c ≈ a·t + b over the step numbers t, and the
prediction for step t* is (a·t* + b)·v. The projection also filters out what is not common to the
steps. Higher ranks and curved fits are left out: the paper finds they do not help.

A good line is no proof of a direction: for a random walk of 8 steps in many dimensions, the first
component explains 0.82 of the displacements, with R² = 0.96 and Q² = 0.93 of the line.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from effopd.common.float64 import for_float64
from effopd.errors import ConfigError
from effopd.extrapolate.observations import Observations
from effopd.extrapolate.predicting import Fit, FitArgs, Prediction
from effopd.extrapolate.search import unscored
from effopd.extrapolate.strategy import STRATEGIES, Strategy, without


@dataclass(frozen=True)
class RelexFit:
    """A prediction for one tensor.

    Attributes:
        delta: predicted displacement from the start, fp32, shape of the tensor.
        slope, intercept: of the line c ≈ slope · t + intercept.
        explained: σ1² / Σσ² of the stacked displacements (0–1); high by construction for any path
            that leaves the start.
        r2: of the line, in sample.
        q2: of the line, leave-one-out: 1 − Σ(c_t − ĉ_(−t))² / Σ(c_t − c̄_(−t))².
    """

    delta: Tensor
    slope: float
    intercept: float
    explained: float
    r2: float
    q2: float


def predict(displacements: Sequence[Tensor], steps: Sequence[int], at_step: float) -> RelexFit | None:
    """Predict the displacement at `at_step`; `None` for a tensor that has not moved.

    Only the T × T Gram matrix M Mᵀ is formed; memory is that of the displacements and a few copies
    of one.

    Raises:
        ConfigError: fewer than 3 steps, or not one displacement a step.
    """
    if len(steps) < 3 or len(displacements) != len(steps):
        raise ConfigError(
            f"RELEX fits a line: expected one displacement a step and at least 3, got {len(displacements)} "
            f"displacements for {len(steps)} steps."
        )
    flat = [for_float64(delta).flatten() for delta in displacements]
    gram_TT = np.zeros((len(flat), len(flat)))
    for i, row in enumerate(flat):
        for j in range(i + 1):
            gram_TT[i, j] = gram_TT[j, i] = _dot(row, flat[j])
    if not np.trace(gram_TT) > 0:
        return None
    values, vectors = np.linalg.eigh(gram_TT)
    sigma, u_T = math.sqrt(values[-1]), vectors[:, -1]
    coefficients_T = sigma * u_T  # = M v
    t = np.asarray(steps, dtype=np.float64)
    slope, intercept = np.polyfit(t, coefficients_T, 1)
    along = (slope * at_step + intercept) / sigma  # v = Mᵀu / σ
    delta = torch.zeros_like(flat[0], dtype=torch.float64)
    for weight, row in zip(along * u_T, flat, strict=True):
        delta.add_(row, alpha=float(weight))
    return RelexFit(
        delta.float().reshape(displacements[0].shape),
        float(slope),
        float(intercept),
        float(values[-1] / np.trace(gram_TT)),
        *_line_quality(t, coefficients_T),
    )


def _dot(a: Tensor, b: Tensor, chunk: int = 2**22) -> float:
    """a · b in float64, a strip at a time."""
    return sum(float(torch.dot(x.double(), y.double())) for x, y in zip(a.split(chunk), b.split(chunk), strict=True))


def _line_quality(t: np.ndarray, c: np.ndarray) -> tuple[float, float]:
    """R² and leave-one-out Q² of a straight line; NaN where c varies by no more than rounding."""
    if np.ptp(c) <= 1e-12 * np.abs(c).max():
        return math.nan, math.nan
    residual = c - np.polyval(np.polyfit(t, c, 1), t)
    spread = ((c - c.mean()) ** 2).sum()
    leverage = 1 / len(t) + (t - t.mean()) ** 2 / ((t - t.mean()) ** 2).sum()
    left_out = ((residual / (1 - leverage)) ** 2).sum()
    means_left_out = (len(t) / (len(t) - 1)) ** 2 * spread
    return float(1 - (residual**2).sum() / spread), float(1 - left_out / means_left_out)


def summary(fits: Mapping[str, RelexFit | None]) -> dict[str, float]:
    """Medians over tensors (NaNs left out), and the share of tensors fitted."""
    found = [fit for fit in fits.values() if fit is not None]
    figures = {"fitted_share": len(found) / max(1, len(fits))}
    for name in ("explained", "r2", "q2"):
        values = [getattr(fit, name) for fit in found if not math.isnan(getattr(fit, name))]
        figures[name] = statistics.median(values) if values else math.nan
    return figures


@dataclass(frozen=True)
class RelexArgs(FitArgs):
    """When to observe and predict, and for which step."""

    factor: float = field(
        default=6.0,
        metadata={"help": "predict the weights of step factor × until; the paper: 6 to 20 times"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1 and finite, got {self.factor}")


def predict_all(observations: Observations, args: RelexArgs, seed: int) -> Prediction:
    """The prediction for every tensor that has one."""
    steps = observations.steps
    fits = {
        # a resume reads the earlier points into main memory
        name: predict([p["delta"].to(points[-1]["delta"].device) for p in points], steps, args.factor * steps[-1])
        for name, points in observations.by_parameter.items()
    }
    return Prediction({name: fit.delta for name, fit in fits.items() if fit}, summary(fits))


STRATEGIES["relex"] = Strategy(
    "RELEX: extends a straight line through the rank-1 coefficients of the first steps, once, without scoring",
    lambda score, config, args: unscored(1.0),
    without("schedule", "validation_size", "score_rollouts", "gate", "min_z", "adapt_learning_rate"),
    RelexArgs,
    needs_full_matrices=True,
    fit=Fit(lambda delta: {"delta": delta.clone()}, predict_all),
)
