r"""The interventions: which models to look at to learn what part of an update carries the gain.

An intervention is a list of points, each a rule that gives every matrix or vector of one new model
from the base's and the trained one's.

    alpha         W0 + α ΔW of everything, against ‖α ΔW‖                   (paper, fig. 1a)
    trajectory    every kept W_t, against ‖ΔW_t‖                            (fig. 1b)
    embedding     trained, with the base's embeddings or head               (fig. 2a)
    window        base, with trained MLP or attention in layers l−h … l+h   (fig. 2b)
    swap          a module or a layer trained alone, or all but it
    rank          the leading or the trailing p % of the components of ΔW   (fig. 3)
    norm_scaling  an early ΔW_t stretched towards the final norm            (fig. 4c)
    random        a random direction of the same norm: the control
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from effopd.interventions.edits import interpolated
from effopd.interventions.part_kinds import embedding_points, swap_points, window_points
from effopd.interventions.points import BASE, Point, PointInputs, require_trajectories, take_trained, trained_name
from effopd.interventions.update_kinds import norm_scaling_points, random_points, rank_points
from effopd.weights.difference import Update


def reference_points(inputs: PointInputs) -> list[Point]:
    """The base, and each run's trained model: what every point is compared with."""
    base = Point("reference", "base", {}, _stay, lambda part: False, model=BASE)
    return [
        base,
        *(Point("reference", run, {}, take_trained, model=trained_name(run, inputs)) for run in inputs.steps),
    ]


def _stay(update: Update) -> Tensor | None:
    return None


def alpha_points(inputs: PointInputs) -> list[Point]:
    """The line from the base to the trained model: W0 + αΔW of every parameter."""

    def point(run: str, alpha: float) -> Point:
        model = {0.0: BASE, 1.0: trained_name(run, inputs)}.get(alpha, "")
        return Point("alpha", run, {"alpha": alpha}, lambda update: interpolated(update, alpha), model=model)

    return [point(run, float(alpha)) for run in inputs.steps for alpha in inputs.options.alphas]


def trajectory_points(inputs: PointInputs) -> list[Point]:
    """Along training: the model of every kept step (needs a run directory).

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
        points: builds its points; the first line of its docstring is the help of `effopd
            intervene`.
        options: the fields of `InterventionOptions` that it reads.
    """

    points: Callable[[PointInputs], list[Point]]
    options: tuple[str, ...] = ()


INTERVENTIONS = {
    "alpha": Intervention(alpha_points, ("alphas",)),
    "trajectory": Intervention(trajectory_points),
    "embedding": Intervention(embedding_points),
    "window": Intervention(window_points, ("half_width",)),
    "swap": Intervention(swap_points),
    "rank": Intervention(rank_points, ("percents", "ends", "rank_norm", "rest")),
    "norm_scaling": Intervention(norm_scaling_points, ("betas", "early_steps")),
    "random": Intervention(random_points, ("random_seeds",)),
}
