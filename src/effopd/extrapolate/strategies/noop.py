"""`noop`, a control: pays for scoring and never moves."""

from __future__ import annotations

from effopd.extrapolate.search import first_failure_search
from effopd.extrapolate.strategy import STRATEGIES, Strategy, without

STRATEGIES["noop"] = Strategy(
    "control: pays for scoring and never moves",
    lambda score, config, args: first_failure_search(score, (0.0,), config.gate, config.min_z),
    without("reset_moments", "adapt_learning_rate"),
)
