"""The paper's search with configurable scales, shared by several strategies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from effopd.extrapolate.search import Score, SearchResult, first_failure_search


@dataclass(frozen=True)
class ScalesArgs:
    """Candidate scales of a search."""

    scales: tuple[float, ...] = field(
        default=(2.0, 4.0, 6.0, 8.0, 10.0),
        metadata={"help": "candidate scales s of W + s·Δ in the order tried"},
    )

    def __post_init__(self) -> None:
        if not self.scales or any(not 0 < scale < math.inf for scale in self.scales):
            raise ValueError(
                f"scales must be a non-empty list of positive finite numbers, got {list(self.scales)}; the paper uses "
                "[2, 4, 6, 8, 10]"
            )


def until_one_fails(score: Callable[[float], Score], config: Any, args: ScalesArgs) -> SearchResult:
    """The paper's search over `args.scales`, see `first_failure_search`."""
    return first_failure_search(score, args.scales, config.gate, config.min_z)
