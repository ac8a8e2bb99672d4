"""Ours: a line search along the last displacement by the KL to the teacher on rollouts that
training samples anyway.
"""

from __future__ import annotations

from effopd.extrapolate.search import line_search
from effopd.extrapolate.strategy import PAPER, STRATEGIES, Strategy

STRATEGIES["line_search"] = Strategy(
    "ours: a line search by the KL to the teacher on rollouts that training samples anyway, "
    "as often as jumps pay; every "
    "candidate is compared with the start, and for a step back any gain will do",
    lambda score, config, args: line_search(score, config.gate, config.min_z),
    PAPER
    | {
        "schedule": "adaptive",
        "parameters": "all",
        "validation_size": None,
        "score_rollouts": 0.25,
        "gate": "significant",
        "reset_moments": True,
        "adapt_learning_rate": True,
    },
)
