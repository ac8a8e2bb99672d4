"""Interventions that change the update itself: its components, norm or direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from effopd.errors import ConfigError
from effopd.interventions.edits import component_count, components, norm_scaled, on_base, random_direction, rescaled
from effopd.interventions.points import Point, PointInputs, require_trajectories, trained_name
from effopd.weights.difference import Update
from effopd.weights.parts import Part

#: Modules whose matrices the rank intervention edits.
SPECTRAL = ("attention", "mlp")


def rank_points(inputs: PointInputs) -> list[Point]:
    r"""The leading, or trailing, p % of the components of every attention and MLP update.

    $W_0 + c · ΔW_k/‖ΔW_k‖$ for the leading components, with c set by `rank_norm`; W0 + ΔW_k for the
    trailing ones.

    Source: arXiv 2605.11739, section 5 (top-k % and bottom-k % models), fig. 3, with
    `rank_norm="shared"`.
    """
    options = inputs.options
    tables = [inputs.norms(run) for run in inputs.steps] if options.rank_norm == "shared" else []

    def target(part: Part) -> float:
        return sum(table[part] for table in tables) / len(tables)

    def point(run: str, percent: float, end: str) -> Point:
        norm = options.rank_norm if end == "top" else "own"

        def edit(update: Update) -> Tensor | None:
            if not _is_spectral(update.part):
                return update.trained
            k = component_count(percent, min(update.part.shape))
            if k == min(update.part.shape) and norm != "shared":
                return update.trained
            delta_MN = components(update, k, end)
            if norm != "own":
                delta_MN = rescaled(delta_MN, target(update.part) if norm == "shared" else update.norm())
            return on_base(update, delta_MN)

        whole = percent == 100 and norm != "shared" and options.rest == "trained"
        where = {"end": end, "percent": percent, "norm": norm, "rest": options.rest}
        selects = _is_spectral if options.rest == "base" else lambda part: True
        return Point("rank", run, where, edit, selects, model=trained_name(run, inputs) if whole else "")

    return [point(run, float(p), end) for run in inputs.steps for end in options.ends for p in options.percents]


def norm_scaling_points(inputs: PointInputs) -> list[Point]:
    """Early updates ΔW_t scaled by β toward the final norm of each matrix (needs a run directory).

    Raises:
        ConfigError: a run has a single checkpoint, or lacks a requested early step.
    """
    require_trajectories(inputs, "norm_scaling")
    points = []
    for run, steps in inputs.steps.items():
        early = (
            [step for step in steps[:-1] if step] if inputs.options.early_steps is None else inputs.options.early_steps
        )
        missing = [step for step in early if step not in steps[:-1]]
        if missing or not early:
            known = ", ".join(str(step) for step in steps[:-1] if step)
            raise ConfigError(
                f"--early_steps: run '{run}' has {f'no step {missing[0]}' if missing else 'no step'} before its last, "
                f"{steps[-1]}. Expected steps among: {known or 'none; pass a trajectory with more steps'}."
            )
        final = inputs.norms(run)
        for step in early:
            points += [
                _norm_scaling_point(inputs, run, steps.index(step), float(beta), final)
                for beta in inputs.options.betas
            ]
    return points


def _norm_scaling_point(
    inputs: PointInputs, run: str, snapshot: int, beta: float, final: Mapping[Part, float]
) -> Point:
    def edit(update: Update) -> Tensor | None:
        if beta == 0:
            return update.trained
        delta = update.delta()
        return on_base(update, norm_scaled(delta, final[update.part], beta)) if delta.any() else None

    where = {"step": inputs.steps[run][snapshot], "beta": beta}
    model = "" if beta else trained_name(run, inputs, snapshot)
    return Point("norm_scaling", run, where, edit, snapshot=snapshot, model=model)


def random_points(inputs: PointInputs) -> list[Point]:
    """The control: the base moved in a random direction by the norm of the update."""

    def point(run: str, seed: int) -> Point:
        def edit(update: Update) -> Tensor | None:
            name = f"{update.part.tensor}:{update.part.place}"
            move = random_direction(update.part.shape, update.norm(), seed, name)
            return on_base(update, move.to(update.base.device))

        return Point("random", run, {"seed": seed}, edit)

    return [point(run, seed) for run in inputs.steps for seed in inputs.options.random_seeds]


def _is_spectral(part: Part) -> bool:
    return part.is_matrix and part.place.module in SPECTRAL
