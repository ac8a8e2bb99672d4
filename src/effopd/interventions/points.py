r"""Scans: which models to look at to learn what part of an update carries the gain.

A scan is a list of points; a point is a rule that gives each matrix or vector of one new model, from the base's and the
trained one's. Only rules here: no weights are read, nothing is generated.

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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from effopd.errors import ConfigError
from effopd.interventions.edits import (
    component_count,
    components,
    interpolated,
    norm_scaled,
    on_base,
    random_direction,
    rescaled,
)
from effopd.interventions.options import ScanOptions
from effopd.weights.difference import Update
from effopd.weights.naming import MODULES, Part

#: A rule for one part: the new tensor (any floating dtype, the part's shape), or `None` where the base stays.
Edit = Callable[[Update], Tensor | None]
#: The matrices whose update has a spectrum in the paper's sense.
SPECTRAL = ("attention", "mlp")
#: Half-width of the paper's windows, and the number of layers of its smallest model.
_HALF_WIDTH, _LAYERS = 8, 28


@dataclass(frozen=True)
class Study:
    """What the scans are planned from.

    Attributes:
        parts: every matrix and vector of the base.
        steps: the kept steps of each run, ascending; the last is the trained model. A single checkpoint has one.
        norms: ‖ΔW_T‖ of every part at the end of a run.
    """

    parts: Sequence[Part]
    steps: Mapping[str, Sequence[int | None]]
    norms: Callable[[str], Mapping[Part, float]]
    options: ScanOptions


@dataclass(frozen=True)
class Point:
    """One model of a scan.

    Attributes:
        scan, run: where it belongs.
        coordinates: what identifies it within scan and run.
        edit: the rule for a part that `selects` picks; all others stay the base's.
        selects: whether a part can change at all; decided without reading a tensor.
        snapshot: position in the run's `Study.steps` of the update that `edit` is given; −1 is the last.
        model: names the model; points of equal `model` are the same model, from whatever scan. Empty: nobody else's.
        measures: further numbers for the results table.
    """

    scan: str
    run: str
    coordinates: Mapping[str, Any]
    edit: Edit
    selects: Callable[[Part], bool] = lambda part: True
    snapshot: int = -1
    model: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`scan/run/coordinate=value,…`; also a relative path that is safe on every file system we know."""
        values = [f"{k}={v:.12g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.coordinates.items()]
        return "/".join(filter(None, [self.scan, self.run, ",".join(values)]))

    @property
    def same_model(self) -> str:
        """The name under which an equal model is recognised."""
        return self.model or self.id


#: `Point.model` of the untouched base.
BASE = "base"


def _trained(run: str, study: Study, snapshot: int = -1) -> str:
    """`Point.model` of an unmodified checkpoint of a run."""
    return f"trained/{run}/{snapshot % len(study.steps[run])}"


def _take_trained(update: Update) -> Tensor | None:
    return update.trained


def _stay(update: Update) -> Tensor | None:
    return None


# -- the scans ----------------------------------------------------------------------------------------------------


def reference_points(study: Study) -> list[Point]:
    """The base, and each run's trained model: what every scan is compared with."""
    base = Point("reference", "base", {}, _stay, lambda part: False, model=BASE)
    return [base, *(Point("reference", run, {}, _take_trained, model=_trained(run, study)) for run in study.steps)]


def alpha_points(study: Study) -> list[Point]:
    """The line from the base to the trained model: W0 + αΔW of every parameter."""

    def point(run: str, alpha: float) -> Point:
        model = {0.0: BASE, 1.0: _trained(run, study)}.get(alpha, "")
        return Point("alpha", run, {"alpha": alpha}, lambda update: interpolated(update, alpha), model=model)

    return [point(run, float(alpha)) for run in study.steps for alpha in study.options.alphas]


def trajectory_points(study: Study) -> list[Point]:
    """Along training: the model of every kept step (needs a run directory).

    Raises:
        ConfigError: a run has a single checkpoint.
    """
    _require_trajectories(study, "trajectory")
    return [
        Point("trajectory", run, {"step": step}, _take_trained, snapshot=i, model=_trained(run, study, i))
        for run, steps in study.steps.items()
        for i, step in enumerate(steps)
    ]


def embedding_points(study: Study) -> list[Point]:
    """The trained model with the base's token embeddings, or with the base's head where it has its own."""
    present = [m for m in ("embedding", "head") if any(part.place.module == m for part in study.parts)]
    return [
        Point(
            "embedding", run, {"replaced": module}, _take_trained, _not(_in_module(module)),
            model=f"without/{run}/{module}",
        )
        for run in study.steps
        for module in present
    ]  # fmt: skip


def window_points(study: Study) -> list[Point]:
    """The base with the MLP, or the attention, of layers l−h … l+h trained, for every layer l.

    Windows are cut at the ends. `measures` has `layer_norm`, ‖ΔW‖ of that module in layer l alone.
    """
    layers = _layers(study)
    half = study.options.half_width
    half = default_half_width(layers) if half is None else half

    def point(run: str, module: str, centre: int) -> Point:
        window = range(max(0, centre - half), min(layers, centre + half + 1))

        def selects(part: Part) -> bool:
            return part.place.module == module and part.place.layer in window

        squares = [
            norm**2
            for part, norm in study.norms(run).items()
            if part.place.module == module and part.place.layer == centre
        ]
        where = {"module": module, "centre": centre, "half_width": half}
        return Point("window", run, where, _take_trained, selects, measures={"layer_norm": math.sqrt(sum(squares))})

    return [point(run, module, c) for run in study.steps for module in ("mlp", "attention") for c in range(layers)]


def default_half_width(layers: int) -> int:
    """The paper's 8 for models of its size (28 layers) or more, in proportion below.

    Example:
        >>> default_half_width(4), default_half_width(28), default_half_width(64)
        (1, 8, 8)
    """
    return min(_HALF_WIDTH, round(layers * _HALF_WIDTH / _LAYERS))


def swap_points(study: Study) -> list[Point]:
    """Each module and each layer: only it trained, and everything trained without it."""
    units: dict[str, Callable[[Part], bool]] = {m: _in_module(m) for m in MODULES}
    units |= {f"layer_{layer}": _in_layer(layer) for layer in range(_layers(study))}
    present = {name: picks for name, picks in units.items() if any(map(picks, study.parts))}

    def pair(run: str, name: str, picks: Callable[[Part], bool]) -> list[Point]:
        where = {"unit": name}
        return [
            Point("swap", run, where | {"side": "only"}, _take_trained, picks),
            Point("swap", run, where | {"side": "without"}, _take_trained, _not(picks), model=f"without/{run}/{name}"),
        ]

    return [point for run in study.steps for name, picks in present.items() for point in pair(run, name, picks)]


def rank_points(study: Study) -> list[Point]:
    r"""Only the leading, or the trailing, p % of the components of every attention and MLP update.

    $W_0 + c · ΔW_k/‖ΔW_k‖$ with c by `rank_norm` for the leading ones, W0 + ΔW_k for the trailing ones.

    Source: arXiv 2605.11739, section 5 (top-k % and bottom-k % models), fig. 3, with `rank_norm="shared"`.
    """
    options = study.options
    tables = [study.norms(run) for run in study.steps] if options.rank_norm == "shared" else []

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
        return Point("rank", run, where, edit, selects, model=_trained(run, study) if whole else "")

    return [point(run, float(p), end) for run in study.steps for end in options.ends for p in options.percents]


def norm_scaling_points(study: Study) -> list[Point]:
    """Early updates ΔW_t stretched by β towards the final norm of each matrix (needs a run directory).

    Raises:
        ConfigError: a run has a single checkpoint, or not the early step asked for.
    """
    _require_trajectories(study, "norm_scaling")
    points = []
    for run, steps in study.steps.items():
        early = (
            [step for step in steps[:-1] if step] if study.options.early_steps is None else study.options.early_steps
        )
        missing = [step for step in early if step not in steps[:-1]]
        if missing or not early:
            known = ", ".join(str(step) for step in steps[:-1] if step)
            raise ConfigError(
                f"--early_steps: run '{run}' has {f'no step {missing[0]}' if missing else 'no step'} before its last, "
                f"{steps[-1]}. Expected steps among: {known or 'none; give a trajectory with more steps'}."
            )
        final = study.norms(run)
        for step in early:
            points += [
                _norm_scaling_point(study, run, steps.index(step), float(beta), final) for beta in study.options.betas
            ]
    return points


def _norm_scaling_point(study: Study, run: str, snapshot: int, beta: float, final: Mapping[Part, float]) -> Point:
    def edit(update: Update) -> Tensor | None:
        if beta == 0:
            return update.trained
        delta = update.delta()
        return on_base(update, norm_scaled(delta, final[update.part], beta)) if delta.any() else None

    where = {"step": study.steps[run][snapshot], "beta": beta}
    model = "" if beta else _trained(run, study, snapshot)
    return Point("norm_scaling", run, where, edit, snapshot=snapshot, model=model)


def random_points(study: Study) -> list[Point]:
    """The control: the base moved by the norm of the update in a random direction."""

    def point(run: str, seed: int) -> Point:
        def edit(update: Update) -> Tensor | None:
            name = f"{update.part.tensor}:{update.part.place}"
            move = random_direction(update.part.shape, update.norm(), seed, name)
            return on_base(update, move.to(update.base.device))

        return Point("random", run, {"seed": seed}, edit)

    return [point(run, seed) for run in study.steps for seed in study.options.random_seeds]


#: Name of a scan → its points.
SCANS: dict[str, Callable[[Study], list[Point]]] = {
    "alpha": alpha_points,
    "trajectory": trajectory_points,
    "embedding": embedding_points,
    "window": window_points,
    "swap": swap_points,
    "rank": rank_points,
    "norm_scaling": norm_scaling_points,
    "random": random_points,
}
#: Name of a scan → the fields of `ScanOptions` it reads.
SCAN_FIELDS: dict[str, tuple[str, ...]] = {
    "alpha": ("alphas",),
    "trajectory": (),
    "embedding": (),
    "window": ("half_width",),
    "swap": (),
    "rank": ("percents", "ends", "rank_norm", "rest"),
    "norm_scaling": ("betas", "early_steps"),
    "random": ("random_seeds",),
}


def _in_module(module: str) -> Callable[[Part], bool]:
    return lambda part: part.place.module == module


def _in_layer(layer: int) -> Callable[[Part], bool]:
    return lambda part: part.place.layer == layer


def _not(picks: Callable[[Part], bool]) -> Callable[[Part], bool]:
    return lambda part: not picks(part)


def _is_spectral(part: Part) -> bool:
    return part.is_matrix and part.place.module in SPECTRAL


def _layers(study: Study) -> int:
    layers = [part.place.layer for part in study.parts if part.place.layer is not None]
    if not layers:
        raise ConfigError(
            "this scan works layer by layer, and no parameter of the base has a layer number in its name. Use another "
            "scan."
        )
    return max(layers) + 1


def _require_trajectories(study: Study, scan: str) -> None:
    single = [run for run, steps in study.steps.items() if len(steps) < 2]
    if single:
        raise ConfigError(
            f"{scan} needs a trajectory, but --trained '{single[0]}' is a single checkpoint. Give the run directory, "
            "with weights of several steps in trajectory/ or checkpoints/ (train with --trajectory powers_of_two)."
        )
