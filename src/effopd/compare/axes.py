"""Cost axes of the envelope: steps, net seconds, tokens by kind, and priced seconds."""

from __future__ import annotations

from collections.abc import Sequence

from effopd.compare.prices import PriceList
from effopd.runs.records import EvaluationRecord

#: An axis by name, or priced seconds by a price list.
Axis = str | PriceList
#: Axis → its cost up to an evaluation; `None`: neither recorded nor derived.
COSTS = {
    "steps": lambda evaluation: evaluation.step,
    "seconds": lambda evaluation: evaluation.costs.net_seconds,
    "generated_tokens": lambda evaluation: evaluation.costs.net_generated_tokens,
    "forward_tokens": lambda evaluation: evaluation.costs.net_forward_tokens,
    "student_forward_tokens": lambda evaluation: evaluation.costs.student_forward_tokens,
    "student_backward_tokens": lambda evaluation: evaluation.costs.student_backward_tokens,
    "teacher_tokens": lambda evaluation: evaluation.costs.teacher_tokens,
}
#: Axes of the envelope, without priced seconds.
ENVELOPE_AXES = (
    "seconds", "generated_tokens", "student_forward_tokens", "student_backward_tokens", "teacher_tokens",
)  # fmt: skip
_NAMES = {
    "steps": "steps",
    "seconds": "net seconds",
    "generated_tokens": "sampled tokens",
    "forward_tokens": "forward tokens",
    "student_forward_tokens": "student forward tokens",
    "student_backward_tokens": "student backward tokens",
    "teacher_tokens": "teacher tokens",
}


def axis_key(axis: Axis) -> str:
    """Key of an axis in results.json: its name, or `priced:` and the name of the price list."""
    return axis if isinstance(axis, str) else f"priced:{axis.name}"


def axis_name(key: str) -> str:
    """Name of an axis on a page, from its key."""
    return _NAMES.get(key) or f"priced seconds ({key.removeprefix('priced:')})"


def cost_on(evaluation: EvaluationRecord, axis: Axis) -> float | None:
    """Net cost of a run up to an evaluation; `None`: neither recorded nor derived."""
    value = COSTS[axis](evaluation) if isinstance(axis, str) else axis.seconds(evaluation.costs)
    return None if value is None else float(value)


def envelope_axes(prices: Sequence[PriceList]) -> list[Axis]:
    """`ENVELOPE_AXES`, then priced seconds by each list."""
    return [*ENVELOPE_AXES, *prices]
