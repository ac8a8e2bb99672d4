r"""The interventions: edited models that show which part of an update carries the gain.

An intervention is a list of points. Each point is a rule that computes every matrix and vector of
one new model from those of the base and the trained model.

    alpha         W0 + α ΔW of all parameters, against ‖α ΔW‖                 (paper, fig. 1a)
    trajectory    every saved W_t, against ‖ΔW_t‖                             (fig. 1b)
    embedding     trained, with the base's embeddings or head                 (fig. 2a)
    window        base, with trained MLP or attention in layers l−h … l+h     (fig. 2b)
    swap          only one module or layer trained, or all but that one
    rank          the leading or trailing p % of the components of ΔW         (fig. 3)
    norm_scaling  an early ΔW_t scaled toward the final norm                  (fig. 4c)
    random        a random direction of the same norm, as the control
    linearity     the KL along W_t + sΔ predicted from two forwards, against the true KL
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from effopd.interventions.editable_model import EditableModel
from effopd.interventions.edits import interpolated
from effopd.interventions.linearity import linearity_points, measure_linearity
from effopd.interventions.measure import Evaluator, measure_points
from effopd.interventions.part_kinds import embedding_points, swap_points, window_points
from effopd.interventions.points import BASE, Point, PointInputs, require_trajectories, take_trained, trained_name
from effopd.interventions.results import InterventionResults
from effopd.interventions.sources import Sources
from effopd.interventions.update_kinds import norm_scaling_points, random_points, rank_points
from effopd.weights.difference import Update


def reference_points(inputs: PointInputs) -> list[Point]:
    """The base and each run's trained model, the references of all points."""
    base = Point("reference", "base", {}, _stay, lambda part: False, model=BASE)
    return [
        base,
        *(Point("reference", run, {}, take_trained, model=trained_name(run, inputs)) for run in inputs.steps),
    ]


def _stay(update: Update) -> Tensor | None:
    return None


def alpha_points(inputs: PointInputs) -> list[Point]:
    """W0 + αΔW of every parameter: the line from the base to the trained model."""

    def point(run: str, alpha: float) -> Point:
        model = {0.0: BASE, 1.0: trained_name(run, inputs)}.get(alpha, "")
        return Point("alpha", run, {"alpha": alpha}, lambda update: interpolated(update, alpha), model=model)

    return [point(run, float(alpha)) for run in inputs.steps for alpha in inputs.options.alphas]


def trajectory_points(inputs: PointInputs) -> list[Point]:
    """The model at every saved step of training (needs a run directory).

    Raises:
        ConfigError: a run has a single checkpoint.
    """
    require_trajectories(inputs, "trajectory")
    return [
        Point("trajectory", run, {"step": step}, take_trained, snapshot=i, model=trained_name(run, inputs, i))
        for run, steps in inputs.steps.items()
        for i, step in enumerate(steps)
    ]


@dataclass(frozen=True)
class Intervention:
    """One kind of intervention.

    Attributes:
        points: builds its points. `effopd intervene --help` prints the first line of its docstring.
        options: the fields of `InterventionOptions` that it reads.
        measure: measures the points that have no result yet.
        graded: whether answers are graded, next to those of the base and the trained models.
            Otherwise it needs a teacher, and writes no checkpoints.
    """

    points: Callable[[PointInputs], list[Point]]
    options: tuple[str, ...] = ()
    measure: Callable[[Sequence[Point], EditableModel, Sources, Evaluator, InterventionResults], None] = measure_points
    graded: bool = True


INTERVENTIONS = {
    "alpha": Intervention(alpha_points, ("alphas",)),
    "trajectory": Intervention(trajectory_points),
    "embedding": Intervention(embedding_points),
    "window": Intervention(window_points, ("half_width",)),
    "swap": Intervention(swap_points),
    "rank": Intervention(rank_points, ("percents", "ends", "rank_norm", "rest")),
    "norm_scaling": Intervention(norm_scaling_points, ("betas", "early_steps")),
    "random": Intervention(random_points, ("random_seeds",)),
    "linearity": Intervention(
        linearity_points, ("scales", "known_scales", "anchors"), measure_linearity, graded=False
    ),
}
