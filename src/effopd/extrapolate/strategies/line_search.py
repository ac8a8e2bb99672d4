"""`line_search`, this package's strategy: a line search along Δ, scored on training rollouts."""

from __future__ import annotations

from effopd.extrapolate.search import line_search
from effopd.extrapolate.strategy import PAPER, STRATEGIES, Strategy

STRATEGIES["line_search"] = Strategy(
    "ours: line search along the last update Δ, scored by the divergence from the teacher on rollouts that training "
    "samples anyway; a forward jump must beat the start significantly, a backward jump only in the mean",
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
