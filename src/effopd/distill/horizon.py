"""Rollout length schedules: TOPD (a fixed share), ESR (a fixed number), POPD (a growing share).

Source: arXiv 2605.31490 (TOPD, POPD) and 2605.27028 (ESR).

Late positions cost the most and teach the least, and OPD needs no final answer. Training therefore
generates and learns only the first H tokens of an answer. Evaluations and validation answers have
full length; the scorer `teacher_kl` reads the short training rollouts. A divergence beyond H is not
trained, and can grow: `whole_answers.py` removes this bias. H depends only on the step,
so resuming needs no extra state. When H changes, the look-ahead takes a new anchor, because an
update Δ must not span two objectives. Prune-OPD, whose H depends on the answers, is in `prune.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from effopd.common.statistics import share_of
from effopd.distill.callback import EffOPDCallback
from effopd.distill.trl_host.state import log_metrics
from effopd.extrapolate.effopd import EffOPD

logger = logging.getLogger(__name__)

#: Share of the held-out KL beyond the horizon above which `HorizonCallback` warns.
MOST = 0.5


def topd(max_length: int, fraction: float) -> int:
    """H = ⌈ρ · T_max⌉ tokens, at least 1.

    Example:
        >>> topd(24, 0.25)
        6
    """
    return max(1, share_of(max_length, fraction))


def esr(max_length: int, tokens: int) -> int:
    """H = min(N, T_max) tokens.

    Example:
        >>> esr(2048, 100), esr(64, 100)
        (100, 64)
    """
    return min(tokens, max_length)


def popd(step: int, total_steps: int, max_length: int, start: float, stages: int, growth: float) -> int:
    """H_k = H_0 + ⌊k / Δk⌋ · ΔH tokens, rounded up: from start · T_max to T_max.

    The length grows in `stages` equal increments over the first `growth` of training.

    Args:
        step: k, optimizer steps done so far.
        start: H_0 / T_max, in (0, 1].
        growth: share of training, in (0, 1].

    Example:
        >>> [popd(step, 16, 16, 0.5, 2, 0.5) for step in range(10)]
        [8, 8, 8, 8, 12, 12, 12, 12, 16, 16]
    """
    done = min(stages, math.floor(round(stages * step / max(1.0, growth * total_steps), 9)))
    return max(1, min(max_length, share_of(max_length, start + (1 - start) * done / stages)))


def set_length(trainer: Any, length: int) -> None:
    """Set the maximum number of tokens of the answers that a trainer samples."""
    trainer.generation_config.max_new_tokens = length
    trainer.max_completion_length = length  # bound over all turns of an answer with tool calls
    if trainer.use_vllm:
        trainer.vllm_generation.max_completion_length = length


def look_aheads(trainer: Any) -> Iterator[EffOPD]:
    """The trainer's look-aheads while it trains."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EffOPDCallback) and callback.look_ahead is not None:
            yield callback.look_ahead


def horizon_length(args: Any, step: int, total_steps: int) -> int:
    """Maximum number of tokens per rollout in the step after `step`.

    Args:
        args: an `OPDConfig` whose `rollout_horizon` is `topd`, `esr` or `popd`.
    """
    if args.rollout_horizon == "topd":
        return topd(args.max_completion_length, args.horizon_fraction)
    if args.rollout_horizon == "esr":
        return esr(args.max_completion_length, args.horizon_tokens)
    return popd(
        step, total_steps, args.max_completion_length, args.horizon_start, args.horizon_stages, args.horizon_growth
    )


class HorizonCallback(TrainerCallback):
    """Sets the rollout length before each step; `OPDTrainer` adds it.

    Args:
        trainer: an `OPDTrainer` whose `args.rollout_horizon` is not `full`.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._args = trainer, trainer.args
        self._warned = False

    def see(self, share: float) -> None:
        """Warn, once, if most of the held-out KL lies where training does not reach.

        Args:
            share: of the KL, beyond the horizon.
        """
        flag = {"topd": "horizon_fraction", "esr": "horizon_tokens"}.get(self._args.rollout_horizon)
        if share > MOST and flag and not self._args.horizon_whole_share and not self._warned:
            self._warned = True
            logger.warning(
                "%.0f %% of the held-out KL lies beyond the %d tokens of the rollouts, where nothing is trained and "
                "the KL can grow. Raise --%s, or set --horizon_whole_share, for example 0.25.",
                100 * share, self.length(self._trainer.state.global_step, self._trainer.state.max_steps), flag,
            )  # fmt: skip

    def length(self, step: int, total_steps: int) -> int:
        """Maximum number of tokens per rollout in the step after `step`."""
        return horizon_length(self._args, step, total_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the length before the rollouts of a step; take a new anchor if it changed."""
        step, last = state.global_step, state.max_steps
        length = self.length(step, last)
        if step > 0 and self._changed(step, last):
            for look_ahead in look_aheads(self._trainer):
                look_ahead.reanchor(step)
        set_length(self._trainer, length)
        log_metrics(self._trainer, {"horizon": float(length)})

    def on_step_end(self, args, state, control, **kwargs):
        """Restore the full length for generation between steps."""
        set_length(self._trainer, self._args.max_completion_length)

    def _changed(self, step: int, total_steps: int) -> bool:
        """Whether the length after `step` differs too much from that of the look-ahead's anchor."""
        return self.length(step, total_steps) != self.length(step - 1, total_steps)
