"""`newton_search`: `line_search` with Newton's step and a learning rate set by the first search."""

from __future__ import annotations

from typing import Any

from effopd.extrapolate.newton import WAY, WAY_OF_ONE_STEP, newton_search
from effopd.extrapolate.search import SearchResult
from effopd.extrapolate.searcher import Along
from effopd.extrapolate.strategy import STRATEGIES, NoArgs, Strategy


def _search(score: Any, config: Any, args: NoArgs) -> SearchResult:
    if not isinstance(score, Along):  # a plain function s → score
        return newton_search(score, lambda: None, config.gate, config.min_z)
    way = WAY_OF_ONE_STEP if score.after_one_of_several else WAY
    with score.with_slope() as slope:
        return newton_search(score, slope, config.gate, config.min_z, way=way)


STRATEGIES["newton_search"] = Strategy(
    "line_search with Newton's step first; the first search sets the learning rate",
    _search,
    {name: value for name, value in STRATEGIES["line_search"].settings.items() if name != "validation_size"},
    calibrates_rate=True,
    steers_by_slope=True,
)
