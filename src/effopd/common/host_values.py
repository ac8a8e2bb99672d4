"""Settings of transformers and TRL: the text of an enum, and those that only one feature reads."""

from __future__ import annotations

from typing import Any

#: Starts of the names of settings that nothing reads without evaluation, without evaluation by
#: steps, and without vLLM.
EVALUATION_ONLY = ("eval_delay", "metric_for_best_model", "greater_is_better")
EVALUATION_BY_STEPS_ONLY = ("eval_steps",)
VLLM_ONLY = ("vllm_",)


def name_of(value: Any) -> str:
    """The text of an enum of transformers, or of its value."""
    return str(getattr(value, "value", value))
