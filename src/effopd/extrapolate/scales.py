"""The paper's search with its scales as arguments, for the strategies that share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from effopd.extrapolate.search import Score, SearchResult, first_failure_search


@dataclass(frozen=True)
class ScalesArgs:
    """Where a search along a direction looks."""

    scales: tuple[float, ...] = field(
        default=(2.0, 4.0, 6.0, 8.0, 10.0),
        metadata={"help": "candidate scales s of W + s·Δ in the order tried; the paper: 2k for k = 1 … 5"},
    )

    def __post_init__(self) -> None:
        if not self.scales or any(not 0 < scale < math.inf for scale in self.scales):
            raise ValueError(
                "scales must be a non-empty list of positive finite numbers, got "
                f"{list(self.scales)}; the paper's are "
                "[2, 4, 6, 8, 10]"
            )


def until_one_fails(score: Callable[[float], Score], config: Any, args: ScalesArgs) -> SearchResult:
    """The paper's search over `args.scales`."""
    return first_failure_search(score, args.scales, config.gate, config.min_z)
