"""The files of a run and what their rows hold."""

from __future__ import annotations

METRICS, EVALS, SEARCHES = "metrics.jsonl", "evals.jsonl", "searches.jsonl"
CONFIG = "config.yaml"
BEST = "best.json"

#: What `evaluate_task` can return → whether more of it is better; `None`: neither more nor less is.
DIRECTIONS: dict[str, bool | None] = {
    "kl": False,
    "kl_se": False,
    "loss": False,
    "accuracy": True,
    "accuracy_low": True,
    "accuracy_high": True,
    "accuracy_greedy": True,
    "accuracy_greedy_low": True,
    "accuracy_greedy_high": True,
    "truncated_share": False,
    "answers": None,
    "answers_cut": None,
    "answers_empty": None,
    "response_length": None,
    "runtime": None,
}


def metric_names(*, teacher: bool, greedy: bool) -> list[str]:
    """The metrics that `evaluate_task` returns, known before there is a model."""
    without = [] if teacher else ["kl", "kl_se", "loss"]
    return [name for name in DIRECTIONS if name not in without and (greedy or "greedy" not in name)]
