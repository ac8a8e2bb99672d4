"""Settings that only one feature reads, and the text of an enum of transformers and TRL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Starts of the names of settings that nothing reads without evaluation, also before the first
#: step; without evaluation during training; without evaluation by steps; and without vLLM.
ANY_EVALUATION_ONLY = (
    "eval_temperature", "eval_greedy", "eval_seed",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
    "bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "num_generations_eval", "do_eval",
)  # fmt: skip
EVALUATION_ONLY = ("eval_delay", "metric_for_best_model", "greater_is_better")
EVALUATION_BY_STEPS_ONLY = ("eval_steps",)
VLLM_ONLY = ("vllm_",)


def name_of(value: Any) -> str:
    """The text of an enum of transformers, or of its value."""
    return str(getattr(value, "value", value))


def turned_off(given: Callable[[str], str | None], file: Mapping[str, Any]) -> tuple[str, ...]:
    """Starts of the names of a file's settings whose only reader the command line turns off.

    Args:
        given: name → text of a flag on the command line; `None`: it is not given.
        file: the file's settings.
    """
    strategy, start, vllm = map(given, ("eval_strategy", "eval_on_start", "use_vllm"))
    unread: tuple[str, ...] = ()
    if strategy == "no":
        unread += EVALUATION_BY_STEPS_ONLY + EVALUATION_ONLY
    elif strategy not in (None, "steps"):
        unread += EVALUATION_BY_STEPS_ONLY
    regular = name_of(file.get("eval_strategy", "no")) if strategy is None else strategy
    first = bool(file.get("eval_on_start")) if start is None else not _is_false(start)
    if regular == "no" and not first and (strategy is not None or start is not None):
        unread += ANY_EVALUATION_ONLY
    if vllm is not None and _is_false(vllm):
        unread += VLLM_ONLY
    return unread


def _is_false(text: str) -> bool:
    return text.lower() in ("false", "no", "n", "f", "0")
