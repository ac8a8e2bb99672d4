"""Evaluations at logarithmically spaced steps, for time to target on a logarithmic axis."""

from __future__ import annotations

from typing import Any

from transformers import IntervalStrategy, TrainerCallback

from effopd.errors import ConfigError


def is_log_spaced(step: int) -> bool:
    """Whether a step is evaluated: a multiple of the largest power of two that is ≤ step / 6.

    Every step below 12, every second one below 24, every fourth one below 48, and so on: two
    evaluations are at most 17 % of the step apart.

    Example:
        >>> [step for step in range(1, 49) if is_log_spaced(step)][11:]
        [12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40, 44, 48]
    """
    gap = 1
    while 12 * gap <= step:
        gap *= 2
    return step % gap == 0


class LogSpacedEvaluation(TrainerCallback):
    """Adds the log-spaced steps to the evaluations of `eval_strategy="steps"`."""

    def on_step_end(self, args, state, control, **kwargs):
        regular = args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step
        if regular and is_log_spaced(state.global_step):
            control.should_evaluate = True
        return control


def check_log_spacing(args: Any) -> None:
    """Check that `eval_log_spacing` has evaluations by steps to add to.

    Raises:
        ConfigError: it has not, or the best model would be one of a step that is not saved.
    """
    if not args.eval_log_spacing:
        return
    if args.eval_strategy != IntervalStrategy.STEPS:
        raise ConfigError(
            f"eval_log_spacing=True adds to evaluations by steps, but eval_strategy="
            f"{getattr(args.eval_strategy, 'value', args.eval_strategy)!r}. Set --eval_strategy steps --eval_steps N."
        )
    if args.load_best_model_at_end:
        raise ConfigError(
            "eval_log_spacing=True evaluates steps that are not saved, so load_best_model_at_end=True could not load "
            "the best one. Leave out one of the two."
        )
