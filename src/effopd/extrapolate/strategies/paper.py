"""`effopd` (arXiv 2605.11739) and `effopd-released`: growing scales along Δ until one fails."""

from __future__ import annotations

from effopd.extrapolate.scales import ScalesArgs, until_one_fails
from effopd.extrapolate.strategy import PAPER, STRATEGIES, Strategy

STRATEGIES["effopd"] = Strategy(
    "the paper's search: growing scales along the last update Δ until one fails", until_one_fails, args=ScalesArgs
)
STRATEGIES["effopd-released"] = Strategy(
    "the authors' public code: accepts only strictly better scores, and also moves post-attention and q/k norms",
    until_one_fails,
    PAPER | {"gate": "better", "parameters": "released-code"},
    ScalesArgs,
)
