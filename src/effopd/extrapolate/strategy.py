"""What a strategy is: when and where to look, how far to go, and the settings that it reads.

    schedule → direction (or prediction) → search → move

Every strategy is one entry of `STRATEGIES`, made in a file of its own. Adding one:
docs/add-a-strategy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from effopd.extrapolate.movable import Direction, displacement
from effopd.extrapolate.predicting import Fit
from effopd.extrapolate.search import Score, SearchResult

#: Every setting of `EffOPDConfig` that a strategy may read, with the paper's values. Where
#: `validation_size` has a value, candidates are scored by answers; where `score_rollouts` has one,
#: by the divergence from the teacher.
PAPER: dict[str, Any] = {
    "schedule": "powers_of_two",
    "parameters": "attention+mlp",
    "validation_size": 50,
    "score_rollouts": None,
    "gate": "not_worse",
    "min_z": 2.0,
    "reset_moments": False,
    "adapt_learning_rate": False,
}


@dataclass(frozen=True)
class NoArgs:
    """The arguments of a strategy that has none."""


def last_displacement(seed: int, step: int) -> Direction:
    """D = Δ = W − anchor, whatever the seed and the step."""
    return displacement


@dataclass(frozen=True)
class Strategy:
    """What happens at a trigger.

    Attributes:
        help: one line for `--help`.
        search: (score: s → Score of W + s·D, config, args) → decision.
        settings: the settings that the strategy reads, with its values. A setting that is left out
            is refused.
        args: frozen dataclass of the strategy's own settings; raises `ValueError` where a value is
            out of range.
        direction: (seed, step) → the direction D of a search; must give the same D every time.
        needs_full_matrices: D is not Δ tensor by tensor, so neither LoRA factors nor shards of a
            matrix will do.
        fit: how to predict D from the first steps; it takes the place of `direction` and of the
            schedule.
    """

    help: str
    search: Callable[[Callable[[float], Score], Any, Any], SearchResult]
    settings: Mapping[str, Any] = field(default_factory=lambda: PAPER)
    args: type = NoArgs
    direction: Callable[[int, int], Direction] = last_displacement
    needs_full_matrices: bool = False
    fit: Fit | None = None


#: Strategies by name; each file in `strategies/` adds its own.
STRATEGIES: dict[str, Strategy] = {}


def without(*names: str) -> dict[str, Any]:
    """The paper's settings without some.

    Example:
        >>> sorted(without("gate", "min_z", "schedule", "parameters", "validation_size", "score_rollouts"))
        ['adapt_learning_rate', 'reset_moments']
    """
    return {name: value for name, value in PAPER.items() if name not in names}
