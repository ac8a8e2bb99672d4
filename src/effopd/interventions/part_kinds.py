"""Interventions that mix the base and the trained model: each part comes from one of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from effopd.errors import ConfigError
from effopd.interventions.points import Point, PointInputs, take_trained
from effopd.weights.naming import MODULES
from effopd.weights.parts import Part

#: Half-width of the paper's windows, and the number of layers of its smallest model.
_HALF_WIDTH, _LAYERS = 8, 28


def embedding_points(inputs: PointInputs) -> list[Point]:
    """The trained model with the base's token embeddings, or with the base's head if untied."""
    present = [m for m in ("embedding", "head") if any(part.place.module == m for part in inputs.parts)]
    return [
        Point(
            "embedding", run, {"replaced": module}, take_trained, _not(_in_module(module)),
            model=f"without/{run}/{module}",
        )
        for run in inputs.steps
        for module in present
    ]  # fmt: skip


def window_points(inputs: PointInputs) -> list[Point]:
    """The base with trained MLP, or attention, in layers l−h … l+h, for every layer l.

    Windows are cut off at the first and last layer. `measures["layer_norm"]` is ‖ΔW‖ of that module
    in layer l alone.
    """
    layers = _layers(inputs)
    half = inputs.options.half_width
    half = default_half_width(layers) if half is None else half

    def point(run: str, module: str, center: int) -> Point:
        window = range(max(0, center - half), min(layers, center + half + 1))

        def selects(part: Part) -> bool:
            return part.place.module == module and part.place.layer in window

        squares = [
            norm**2
            for part, norm in inputs.norms(run).items()
            if part.place.module == module and part.place.layer == center
        ]
        where = {"module": module, "center": center, "half_width": half}
        return Point("window", run, where, take_trained, selects, measures={"layer_norm": math.sqrt(sum(squares))})

    return [point(run, module, c) for run in inputs.steps for module in ("mlp", "attention") for c in range(layers)]


def default_half_width(layers: int) -> int:
    """Half-width of the windows: the paper's 8 for 28 layers or more, in proportion below.

    Example:
        >>> default_half_width(4), default_half_width(28), default_half_width(64)
        (1, 8, 8)
    """
    return min(_HALF_WIDTH, round(layers * _HALF_WIDTH / _LAYERS))


def swap_points(inputs: PointInputs) -> list[Point]:
    """Only one module or layer trained, and all but that one trained, for each of them."""
    units: dict[str, Callable[[Part], bool]] = {m: _in_module(m) for m in MODULES}
    units |= {f"layer_{layer}": _in_layer(layer) for layer in range(_layers(inputs))}
    present = {name: picks for name, picks in units.items() if any(map(picks, inputs.parts))}

    def pair(run: str, name: str, picks: Callable[[Part], bool]) -> list[Point]:
        where = {"unit": name}
        return [
            Point("swap", run, where | {"side": "only"}, take_trained, picks),
            Point("swap", run, where | {"side": "without"}, take_trained, _not(picks), model=f"without/{run}/{name}"),
        ]

    return [point for run in inputs.steps for name, picks in present.items() for point in pair(run, name, picks)]


def _in_module(module: str) -> Callable[[Part], bool]:
    return lambda part: part.place.module == module


def _in_layer(layer: int) -> Callable[[Part], bool]:
    return lambda part: part.place.layer == layer


def _not(picks: Callable[[Part], bool]) -> Callable[[Part], bool]:
    return lambda part: not picks(part)


def _layers(inputs: PointInputs) -> int:
    layers = [part.place.layer for part in inputs.parts if part.place.layer is not None]
    if not layers:
        raise ConfigError(
            "this intervention needs numbered layers, but no parameter of the base has a layer number in its name. "
            "Choose another intervention."
        )
    return max(layers) + 1
