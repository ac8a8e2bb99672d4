"""`alpha_opd`, after AlphaRL (arXiv 2510.00553): predict each update from its rank-1 path.

The predicted update of a matrix is û·v1ᵀ, with v1 of the last observed step. For û, partial least
squares with one component relates x_t = ‖ΔW_t‖·u1(t) to y_t = accuracy / target accuracy over the
first steps, with the signs of u1 aligned forward in time. The fit is inverted at y = 1.

With fewer steps than rows, the in-sample R² is useless: on noise unrelated to y it is near 1 if all
x_t have the same norm, and about 0.8 if the norm grows in proportion to t (8 steps). The
leave-one-out Q² is therefore reported, with the same Q² for shuffled accuracies. A Q² that does not
exceed the shuffled one marks a worthless prediction. A higher Q² is weak evidence: a random walk
unrelated to the accuracy reaches 0.93 (8 steps; −0.4 shuffled) if the accuracy rises with time.

Differs from the public code: the update is added to W_0, not to the last checkpoint, which already
contains an update.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from effopd.errors import ConfigError
from effopd.extrapolate.observations import Observations
from effopd.extrapolate.predicting import Fit, FitArgs, Prediction
from effopd.extrapolate.rank_one import RankOne, align_forward, leading
from effopd.extrapolate.search import unscored
from effopd.extrapolate.strategy import STRATEGIES, Strategy, without

#: Values whose relative difference is below this count as equal.
_SAME = 1e-12


@dataclass(frozen=True)
class AlphaFit:
    """Predicted update of one matrix: ΔW ≈ u_M v_Nᵀ.

    Attributes:
        u_M, v_N: fp32; v_N has norm 1.
        r2: in-sample R²; uninformative alone.
        q2: leave-one-out, 1 − Σ(y_t − ŷ_(−t))² / Σ(y_t − ȳ_(−t))².
        q2_null: mean Q² over random permutations of y.
    """

    u_M: Tensor
    v_N: Tensor
    r2: float
    q2: float
    q2_null: float


@dataclass(frozen=True)
class Pls:
    """Partial least squares of y_T on standardized X_TM with one component.

    Equals scikit-learn's `PLSRegression(1)`, followed by a straight line from the score to y.
    """

    mean_M: np.ndarray
    scale_M: np.ndarray
    weight_M: np.ndarray
    loading_M: np.ndarray
    slope: float
    intercept: float

    def predict(self, x_M: np.ndarray) -> float:
        """ŷ for a new row."""
        return float(((x_M - self.mean_M) / self.scale_M) @ self.weight_M * self.slope + self.intercept)

    def invert(self, y: float) -> np.ndarray:
        """The x_M on the fitted path whose ŷ is `y`."""
        return (y - self.intercept) / self.slope * self.loading_M * self.scale_M + self.mean_M


def fit_pls(x_TM: np.ndarray, y_T: np.ndarray) -> Pls | None:
    """Fit y_T on x_TM; `None` if either is constant or they are uncorrelated.

    Variation within rounding error counts as constant: inverting a slope that was fitted to
    rounding errors would give weights of 1e30.
    """
    if np.ptp(y_T) <= _SAME * np.abs(y_T).max():
        return None
    mean_M, scale_M = x_TM.mean(0), x_TM.std(0, ddof=1)
    varies_M = scale_M > _SAME * np.abs(mean_M)
    scale_M = np.where(varies_M, scale_M, 1.0)
    z_TM, centered_T = np.where(varies_M, (x_TM - mean_M) / scale_M, 0.0), y_T - y_T.mean()
    weight_M = z_TM.T @ centered_T
    length = np.linalg.norm(weight_M)
    if not length > 0:
        return None
    weight_M = weight_M / length
    score_T = z_TM @ weight_M
    power = score_T @ score_T
    slope = float(score_T @ centered_T / power) if power > 0 else 0.0
    if slope == 0.0 or not math.isfinite(slope):
        return None
    return Pls(mean_M, scale_M, weight_M, z_TM.T @ score_T / power, slope, float(y_T.mean()))


def leave_one_out(x_TM: np.ndarray, y_T: np.ndarray) -> float:
    """Q² = 1 − Σ(y_t − ŷ_(−t))² / Σ(y_t − ȳ_(−t))²; a failed fit predicts the mean."""
    steps = len(y_T)
    errors, baseline = 0.0, 0.0
    for left in range(steps):
        rest = np.arange(steps) != left
        mean, fit = y_T[rest].mean(), fit_pls(x_TM[rest], y_T[rest])
        errors += (y_T[left] - (fit.predict(x_TM[left]) if fit else mean)) ** 2
        baseline += (y_T[left] - mean) ** 2
    return float(1 - errors / baseline) if baseline > 0 else math.nan


def predict(
    points: Sequence[RankOne], quality: Sequence[float], goal: float = 1.0, permutations: int = 20, seed: int = 0
) -> AlphaFit | None:
    """Predict the update at which accuracy / target accuracy equals `goal`.

    Args:
        points: leading components of the updates from the start, in the order of steps; their signs
            are arbitrary.
        quality: accuracy / target accuracy at the same steps.
        goal: value of accuracy / target accuracy to predict for.
        permutations: number of shuffles for `q2_null`.
        seed: seed of the shuffles.

    Returns:
        The prediction; `None` if there is nothing to fit (no movement, or constant accuracy).

    Raises:
        ConfigError: fewer than 4 points, or not one accuracy per point.
    """
    if len(points) < 4 or len(points) != len(quality):
        raise ConfigError(
            f"AlphaOPD needs at least 4 observations with one accuracy each, got {len(points)} and {len(quality)}."
        )
    aligned = align_forward(points)
    x_TM = np.stack([point.norm * point.u_M.cpu().double().numpy() for point in aligned])
    y_T = np.asarray(quality, dtype=np.float64)
    fit = fit_pls(x_TM, y_T) if np.isfinite(y_T).all() else None
    if fit is None:
        return None
    predicted = np.array([fit.predict(row) for row in x_TM])
    rng = np.random.default_rng(seed)
    null = [leave_one_out(x_TM, rng.permutation(y_T)) for _ in range(permutations)]
    return AlphaFit(
        torch.from_numpy(fit.invert(goal)).float(),
        aligned[-1].v_N,
        float(1 - ((y_T - predicted) ** 2).sum() / ((y_T - y_T.mean()) ** 2).sum()),
        leave_one_out(x_TM, y_T),
        float(np.mean(null)) if null else math.nan,
    )


def summary(fits: Mapping[str, AlphaFit | None]) -> dict[str, float]:
    """Medians over fitted matrices, and the share of matrices fitted (0–1)."""
    fitted = [fit for fit in fits.values() if fit is not None]
    figures = {"fitted_share": len(fitted) / max(1, len(fits))}
    for name in ("r2", "q2", "q2_null"):
        figures[name] = statistics.median([getattr(fit, name) for fit in fitted]) if fitted else math.nan
    return figures


@dataclass(frozen=True)
class AlphaArgs(FitArgs):
    """Steps at which to observe and predict, and the target accuracy."""

    target: float | None = field(
        default=None,
        metadata={
            "help": "target accuracy on the validation prompts, in (0, 1]; unset: the teacher's, measured once "
            "and included in the cost"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"target must be an accuracy in (0, 1], got {self.target}")


def keep_leading(delta: Tensor) -> dict[str, Tensor]:
    """Leading component, norm and shape of an update, as named tensors."""
    point = leading(delta)
    scalars = torch.tensor([point.s1, point.norm], dtype=torch.float64)
    return {"u": point.u_M, "v": point.v_N, "s1_norm": scalars, "shape": torch.tensor(delta.shape)}


def predict_all(observations: Observations, args: AlphaArgs, seed: int) -> Prediction:
    """Predictions for all matrices that can be fitted."""
    fits, delta, quality = {}, {}, observations.quality()
    for name, points in observations.by_parameter.items():
        path = [RankOne(p["u"], float(p["s1_norm"][0]), p["v"], float(p["s1_norm"][1])) for p in points]
        fit = fits[name] = predict(path, quality, seed=seed)
        if fit is not None:
            delta[name] = torch.outer(fit.u_M, fit.v_N).reshape(points[0]["shape"].tolist())
    return Prediction(delta, summary(fits))


STRATEGIES["alpha_opd"] = Strategy(
    "AlphaOPD: one unscored jump to the update predicted from each matrix's rank-1 path and the accuracies along it",
    lambda score, config, args: unscored(1.0),
    without("schedule", "score_rollouts", "gate", "min_z", "adapt_learning_rate"),
    AlphaArgs,
    needs_full_matrices=True,
    fit=Fit(keep_leading, predict_all, target=lambda args: args.target),
)
