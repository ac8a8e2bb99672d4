"""What the schedules of transformers read: `get_scheduler` drops some settings silently."""

from __future__ import annotations

from typing import Any

from effopd.common.host_values import name_of

#: Schedules without a warm-up.
_NO_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
#: Schedules without settings.
_NO_SETTINGS = ("constant", "constant_with_warmup")
#: Values of `--optim` that warm up by themselves, over `warmup_steps`.
_WARM_UP_THEMSELVES = ("schedule_free_adamw", "schedule_free_sgd")


def reads_warm_up(args: Any) -> bool:
    """Whether the schedule or the optimizer of these training arguments reads `warmup_steps`."""
    if name_of(args.lr_scheduler_type) not in _NO_WARM_UP:
        return True
    return getattr(args, "optimizer_class", None) is None and name_of(args.optim) in _WARM_UP_THEMSELVES


def reads_settings(args: Any) -> bool:
    """Whether the schedule of these training arguments reads `lr_scheduler_kwargs`."""
    return name_of(args.lr_scheduler_type) not in _NO_SETTINGS
