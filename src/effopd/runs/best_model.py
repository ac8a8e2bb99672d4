"""Which checkpoint is the best: the direction of every metric, checked before training.

transformers takes every metric whose name does not end in `loss` as better when it is greater, so
the best model by `eval_kl` would be the worst. Here the direction belongs to the metric:
`load_best_model_at_end`, `save_strategy best`, early stopping and the schedules that follow a
metric all read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from effopd.errors import ConfigError
from effopd.runs.records import BEST, DIRECTIONS

#: The same for TRL's own evaluation, on a dataset instead of a task.
HOST_DIRECTIONS: dict[str, bool | None] = {
    "loss": False,
    "completions/clipped_ratio": False,
    "entropy": None,
    "num_tokens": None,
    "num_input_tokens_seen": None,
    "completions/mean_length": None,
    "completions/min_length": None,
    "completions/max_length": None,
    "completions/mean_terminated_length": None,
    "completions/min_terminated_length": None,
    "completions/max_terminated_length": None,
    "tools/call_frequency": None,
    "tools/failure_frequency": None,
    "runtime": None,
    "samples_per_second": None,
    "steps_per_second": None,
    "model_preparation_time": None,
    "epoch": None,
}
#: Schedules that follow a metric; their `mode` says in which direction.
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")


class Kept(NamedTuple):
    """The step whose weights are the final model, and what it was chosen by."""

    step: int
    metric: str
    value: float


def read_kept(root: Path) -> Kept | None:
    """The step that the final model of a run is of, where it is not the last one."""
    path = root / BEST
    return Kept(**json.loads(path.read_text())) if path.is_file() else None


def full_name(metric: str) -> str:
    """A metric as an evaluation reports it: `eval_kl` for `kl`."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def direction(metric: str) -> bool | None:
    """Whether more of `metric` (with or without `eval_`) is better; `None` if it has no direction,
    or is unknown.

    The metrics of several evaluation datasets, such as `eval_first_loss`, have the direction of
    their last part.
    """
    name = full_name(metric).removeprefix("eval_")
    table = HOST_DIRECTIONS | DIRECTIONS
    while name not in table and "_" in name:
        name = name.split("_", 1)[1]
    return table.get(name)


def default_metric(args: Any, default: str) -> None:
    """Set `metric_for_best_model` where something reads it and it is not given."""
    reads = args.load_best_model_at_end or args.save_strategy == "best" or _follows(args)
    if reads and args.metric_for_best_model is None:
        args.metric_for_best_model = default


def settle_direction(args: Any, asked: bool | None) -> None:
    """Set `greater_is_better`, and the mode of a schedule that follows the metric.

    Args:
        args: training arguments, after the host's own checks.
        asked: `greater_is_better` as it was given; `None` if it was not.

    Raises:
        ConfigError: `asked` or the schedule's mode contradict the metric, or the best model is
            asked for without evaluations.
    """
    best = {
        "save_strategy='best'": args.save_strategy == "best",
        "load_best_model_at_end": args.load_best_model_at_end,
    }
    if any(best.values()) and args.eval_strategy == "no":
        raise ConfigError(
            f"{' and '.join(name for name, given in best.items() if given)}: expected "
            "evaluations to tell the best model by, got "
            "eval_strategy='no'. Set --eval_strategy steps --eval_steps N, or leave it out."
        )
    metric = args.metric_for_best_model
    greater = None if metric is None else direction(metric)
    if metric is None or greater is None:  # whether it exists is for `check_metric` to say
        return
    if asked is not None and asked is not greater:
        raise ConfigError(
            f"greater_is_better={asked} contradicts metric_for_best_model={metric!r}, of which "
            f"{'more' if greater else 'less'} is better. Leave --greater_is_better out."
        )
    args.greater_is_better = greater
    if _follows(args):
        settings, mode = dict(args.lr_scheduler_kwargs or {}), "max" if greater else "min"
        if settings.setdefault("mode", mode) != mode:
            raise ConfigError(
                f"lr_scheduler_kwargs sets mode={settings['mode']!r}, but "
                f"{'more' if greater else 'less'} of {metric!r} is "
                f"better: expected {mode!r}. Leave the mode out."
            )
        if greater or "mode" in (args.lr_scheduler_kwargs or {}):  # "min" is the schedules' own default
            args.lr_scheduler_kwargs = settings


def _follows(args: Any) -> bool:
    return getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type) in _FOLLOWING


def check_metric(args: Any, names: Collection[str]) -> None:
    """Refuse a metric that the run's evaluations do not have, or that says nothing about which
    model is better.

    Args:
        names: the metrics of an evaluation, without `eval_`.

    Raises:
        ConfigError: it is none of them, it has no direction, or `greater_is_better` contradicts it.
    """
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    name, greater = full_name(metric).removeprefix("eval_"), direction(metric)
    usable = ", ".join(f"eval_{one}" for one in names if direction(one) is not None)
    if name not in names:
        raise ConfigError(
            f"metric_for_best_model={metric!r}: this run's evaluations have no such metric. Expected one of {usable}."
        )
    if greater is None:
        raise ConfigError(
            f"metric_for_best_model={metric!r} does not say which model is better. Expected one of {usable}."
        )
    if args.greater_is_better is not greater:  # the arguments were changed after they were built
        raise ConfigError(
            f"greater_is_better={args.greater_is_better} contradicts "
            f"metric_for_best_model={metric!r}. Give both to the config's "
            "constructor, or leave greater_is_better out."
        )


def best_row(
    rows: Iterable[Mapping[str, Any]], metric: str, greater: bool, counts: Callable[[int], bool]
) -> Kept | None:
    """The first best evaluation among those whose step `counts`, from a trainer's log history;
    `None` if there is none.
    """
    best = None
    for row in rows:
        value = row.get(full_name(metric))
        if value is None or math.isnan(value) or row["step"] == 0 or not counts(row["step"]):
            continue
        if best is None or (value > best.value if greater else value < best.value):
            best = Kept(row["step"], metric, value)
    return best
