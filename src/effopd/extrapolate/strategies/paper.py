"""EffOPD (arXiv 2605.11739): candidates at growing scales along the last displacement, until one
fails.
"""

from __future__ import annotations

from effopd.extrapolate.scales import ScalesArgs, until_one_fails
from effopd.extrapolate.strategy import PAPER, STRATEGIES, Strategy

STRATEGIES["effopd"] = Strategy("the paper's search along the last displacement", until_one_fails, args=ScalesArgs)
STRATEGIES["effopd-released"] = Strategy(
    "the authors' public code: accepts only a strictly better score, moves also post-attention and q/k norms",
    until_one_fails,
    PAPER | {"gate": "better", "parameters": "released-code"},
    ScalesArgs,
)
