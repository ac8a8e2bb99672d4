"""`relex` (arXiv 2605.21468): extend a line through the rank-1 coefficients of the first steps.

The predicted update of a tensor at step t* is (a·t* + b)·v. Here v is the leading right singular
vector of M [T, D], whose rows are the updates ΔW_t of the observed steps. The line c_t ≈ a·t + b is
fitted to the coefficients c_t = ΔW_t · v. The projection on v also filters out components that the
steps do not share. Higher ranks and curved fits are left out: the paper finds that they do not
help.

A good fit does not prove a direction. For a random walk of 8 steps in many dimensions, the first
component explains 0.82 of the updates, and the line has R² = 0.96 and Q² = 0.93.
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
    """Prediction for one tensor.

    Attributes:
        delta: predicted update from the start, fp32, shape of the tensor.
        slope, intercept: coefficients of the line c ≈ slope · t + intercept.
        explained: σ1² / Σσ² of the stacked updates (0–1); high for any path that leaves the start.
        r2: in-sample R² of the line.
        q2: leave-one-out Q² of the line: 1 − Σ(c_t − ĉ_(−t))² / Σ(c_t − c̄_(−t))².
    """

    delta: Tensor
    slope: float
    intercept: float
    explained: float
    r2: float
    q2: float


def predict(displacements: Sequence[Tensor], steps: Sequence[int], at_step: float) -> RelexFit | None:
    """Predict the update at step `at_step`; `None` for a tensor that has not moved.

    Memory: the displacements and a few copies of one; only the T × T Gram matrix M Mᵀ is formed.

    Raises:
        ConfigError: fewer than 3 steps, or not one displacement per step.
    """
    if len(steps) < 3 or len(displacements) != len(steps):
        raise ConfigError(
            f"RELEX fits a line: expected one displacement per step and at least 3, got {len(displacements)} "
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
    """a · b in float64, chunk by chunk."""
    return sum(float(torch.dot(x.double(), y.double())) for x, y in zip(a.split(chunk), b.split(chunk), strict=True))


def _line_quality(t: np.ndarray, c: np.ndarray) -> tuple[float, float]:
    """R² and leave-one-out Q² of a straight line; NaN if c is constant up to rounding."""
    if np.ptp(c) <= 1e-12 * np.abs(c).max():
        return math.nan, math.nan
    residual = c - np.polyval(np.polyfit(t, c, 1), t)
    spread = ((c - c.mean()) ** 2).sum()
    leverage = 1 / len(t) + (t - t.mean()) ** 2 / ((t - t.mean()) ** 2).sum()
    left_out = ((residual / (1 - leverage)) ** 2).sum()
    means_left_out = (len(t) / (len(t) - 1)) ** 2 * spread
    return float(1 - (residual**2).sum() / spread), float(1 - left_out / means_left_out)


def summary(fits: Mapping[str, RelexFit | None]) -> dict[str, float]:
    """Medians over fitted tensors (NaN excluded), and the share of tensors fitted (0–1)."""
    fitted = [fit for fit in fits.values() if fit is not None]
    figures = {"fitted_share": len(fitted) / max(1, len(fits))}
    for name in ("explained", "r2", "q2"):
        values = [getattr(fit, name) for fit in fitted if not math.isnan(getattr(fit, name))]
        figures[name] = statistics.median(values) if values else math.nan
    return figures


@dataclass(frozen=True)
class RelexArgs(FitArgs):
    """Steps at which to observe and predict, and the step to predict."""

    factor: float = field(
        default=6.0,
        metadata={"help": "predict the weights of step factor × until; the paper uses 6 to 20"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1 and finite, got {self.factor}")


def predict_all(observations: Observations, args: RelexArgs, seed: int) -> Prediction:
    """Predictions for all tensors that have moved."""
    steps = observations.steps
    fits = {
        # after a resume, earlier points are in CPU memory
        name: predict([p["delta"].to(points[-1]["delta"].device) for p in points], steps, args.factor * steps[-1])
        for name, points in observations.by_parameter.items()
    }
    return Prediction({name: fit.delta for name, fit in fits.items() if fit}, summary(fits))


STRATEGIES["relex"] = Strategy(
    "RELEX: one unscored jump along a straight line through the rank-1 coefficients of the first steps",
    lambda score, config, args: unscored(1.0),
    without("schedule", "validation_size", "score_rollouts", "gate", "min_z", "adapt_learning_rate"),
    RelexArgs,
    needs_full_matrices=True,
    fit=Fit(lambda delta: {"delta": delta.clone()}, predict_all),
)
