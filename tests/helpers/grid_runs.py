"""Runs of a grid with planted speed-ups, made without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from effopd.compare.grid_run import GridRun
from effopd.runs.records import Costs, EvaluationRecord

LR = 3e-5


def evaluation(step: int, kl: float, accuracy: float = 0.5, seconds: float | None = None, **more) -> EvaluationRecord:
    """An evaluation; a step costs `seconds` / step (default 1 s), 100 sampled and 300 forward
    tokens.
    """
    seconds = 1.0 * step if seconds is None else seconds
    costs = Costs(
        net_seconds=seconds,
        net_generated_tokens=100 * step,
        net_forward_tokens=300 * step,
        search_seconds=0.1 * seconds,
    )
    return EvaluationRecord(step, kl=kl, kl_se=0.001, accuracy=accuracy, costs=costs, **more)


def planted_run(
    strategy: str = "plain",
    rate: float = LR,
    seed: int = 0,
    speed: float = 1.0,
    *,
    noise: float = 0.03,
    task: str = "t",
    step_cost: float = 1.0,
    floor: float = 0.0,
    pace: Callable[[int], float] = lambda seed: 0.03 * (1 + 0.3 * math.sin(seed)),
    steps: Iterable[int] = range(0, 97, 2),
    rng: np.random.Generator | None = None,
    **more,
) -> GridRun:
    """KL = 0.1 · exp(−speed · pace of the seed · step) with noise, never below 0.1 · floor."""
    rng = rng or np.random.default_rng([seed, int(1e6 * rate), *map(ord, strategy + task)])
    decay = [math.exp(-speed * pace(seed) * step) for step in steps]
    evaluations = [
        evaluation(
            step,
            0.1 * max(left, floor) * math.exp(noise * rng.standard_normal()),
            accuracy=0.8 - 0.5 * left,
            seconds=step * step_cost,
        )
        for step, left in zip(steps, decay, strict=True)
    ]
    return GridRun(task, strategy, rate, seed, tuple(evaluations), **more)
