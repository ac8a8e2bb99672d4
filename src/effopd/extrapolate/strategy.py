"""`Strategy`: schedule, direction, search and settings of a look-ahead, as one registry entry.

    schedule → direction (or prediction) → search → move

Each strategy is one entry of `STRATEGIES` in a file of its own. To add one, see
docs/add-a-strategy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from effopd.extrapolate.movable import Direction, displacement
from effopd.extrapolate.predicting import Fit
from effopd.extrapolate.search import Score, SearchResult

#: Every setting of `EffOPDConfig` that a strategy can read, with the paper's values. A value of
#: `validation_size` selects scoring by accuracy, one of `score_rollouts` scoring by the divergence
#: from the teacher.
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
    """Arguments of a strategy without any."""


def last_displacement(seed: int, step: int) -> Direction:
    """D = Δ = W − anchor, independent of seed and step."""
    return displacement


@dataclass(frozen=True)
class Strategy:
    """One strategy: how it searches, along which direction, and which settings it reads.

    Attributes:
        help: one line for `--help` and the model card.
        search: (score: s → Score of W + s·D, config, args) → `SearchResult`.
        settings: the settings that the strategy reads, with its values. Other settings are refused.
        args: frozen dataclass of the strategy's own arguments; raises `ValueError` if a value is
            out of range.
        direction: (seed, step) → direction D of a search; must return the same D on every call.
        needs_full_matrices: true if D is not Δ. LoRA adapters and sharded matrices are then
            refused.
        fit: predicts D from the first steps; replaces `direction` and the schedule.
        calibrates_rate: with `adapt_learning_rate`, the first search sets the learning rate
            (`calibrated_factor`).
        steers_by_slope: with `adapt_learning_rate`, the slope of the loss after each step changes
            the learning rate too (`slope_steering`).
    """

    help: str
    search: Callable[[Callable[[float], Score], Any, Any], SearchResult]
    settings: Mapping[str, Any] = field(default_factory=lambda: PAPER)
    args: type = NoArgs
    direction: Callable[[int, int], Direction] = last_displacement
    needs_full_matrices: bool = False
    fit: Fit | None = None
    calibrates_rate: bool = False
    steers_by_slope: bool = False


#: Strategies by name; each file in `strategies/` adds its entries.
STRATEGIES: dict[str, Strategy] = {}


def without(*names: str) -> dict[str, Any]:
    """The paper's settings except `names`.

    Example:
        >>> "gate" in without("gate", "min_z"), "schedule" in without("gate", "min_z")
        (False, True)
    """
    return {name: value for name, value in PAPER.items() if name not in names}
