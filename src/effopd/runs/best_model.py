"""Selection of the best checkpoint: the direction of every metric, checked before training.

transformers maximizes every metric whose name does not end in `loss`, so it selects the worst model
by `eval_kl`. Here every metric has a fixed direction, which `load_best_model_at_end`,
`save_strategy best`, early stopping and the schedules that follow a metric use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from effopd.common.host_values import name_of
from effopd.errors import ConfigError
from effopd.runs.records import BEST, DIRECTIONS

#: `DIRECTIONS` for TRL's own evaluation, on a dataset instead of a task.
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
#: Schedules that follow a metric, in the direction of their `mode`.
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")


class Kept(NamedTuple):
    """The step whose weights are the final model, and the metric value that selected it."""

    step: int
    metric: str
    value: float


def read_kept(root: Path) -> Kept | None:
    """The step of a run's final model; `None`: the last step."""
    path = root / BEST
    return Kept(**json.loads(path.read_text())) if path.is_file() else None


def full_name(metric: str) -> str:
    """A metric's name in an evaluation: `eval_kl` for `kl`."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def direction(metric: str) -> bool | None:
    """Whether more of `metric` is better; `None`: it has no direction or is unknown.

    The prefix `eval_` is optional. A metric of one of several evaluation datasets, for example
    `eval_first_loss`, has the direction of its last part.
    """
    name = full_name(metric).removeprefix("eval_")
    table = HOST_DIRECTIONS | DIRECTIONS
    while name not in table and "_" in name:
        name = name.split("_", 1)[1]
    return table.get(name)


def default_metric(args: Any, default: str) -> None:
    """Set `metric_for_best_model` if a setting reads it and it is not given."""
    reads = args.load_best_model_at_end or args.save_strategy == "best" or _follows(args)
    if reads and args.metric_for_best_model is None:
        args.metric_for_best_model = default


def check_saved_steps(args: Any) -> None:
    """Check that `load_best_model_at_end` has an evaluation of every saved step.

    Args:
        args: training arguments, before the host's own checks, whose messages name another flag.

    Raises:
        ConfigError: a saved step would not be evaluated, or there are no evaluations.
    """
    if not args.load_best_model_at_end:
        return
    evaluated, saved = name_of(args.eval_strategy), name_of(args.save_strategy)
    why = "because --load_best_model_at_end needs an evaluation of every saved step"
    if evaluated == "no":
        raise ConfigError("--load_best_model_at_end needs evaluations. Add --eval_strategy steps --eval_steps N.")
    if saved == "best" or evaluated not in ("steps", "epoch"):
        return
    if saved != evaluated:
        raise ConfigError(f"--save_strategy {saved}: expected {evaluated}, as --eval_strategy, {why}.")
    steps, every = args.save_steps, args.eval_steps or args.logging_steps
    if evaluated != "steps" or not every:
        return
    if (steps < 1) != (every < 1):
        raise ConfigError(
            f"--save_steps {steps:g}: expected a {'share of training' if every < 1 else 'number of steps'}, as "
            f"--eval_steps {every:g}, {why}."
        )
    if round(steps * 10**6) % round(every * 10**6):
        raise ConfigError(f"--save_steps {steps:g}: expected a multiple of --eval_steps {every:g}, {why}.")


def settle_direction(args: Any, asked: bool | None) -> None:
    """Set `greater_is_better`, and the mode of a schedule that follows the metric.

    Args:
        args: training arguments, after the host's own checks.
        asked: `greater_is_better` as given; `None`: not given.

    Raises:
        ConfigError: `asked` or the schedule's mode contradicts the metric, or a best model is
            requested without evaluations.
    """
    best = {
        "save_strategy='best'": args.save_strategy == "best",
        "load_best_model_at_end": args.load_best_model_at_end,
    }
    if any(best.values()) and args.eval_strategy == "no":
        raise ConfigError(
            f"{' and '.join(name for name, given in best.items() if given)}: expected evaluations to select the best "
            "model, got eval_strategy='no'. Set --eval_strategy steps --eval_steps N, or leave it out."
        )
    metric = args.metric_for_best_model
    greater = None if metric is None else direction(metric)
    if metric is None or greater is None:  # `check_metric` checks that it exists
        return
    if asked is not None and asked is not greater:
        raise ConfigError(
            f"greater_is_better={asked} contradicts metric_for_best_model={metric!r}: "
            f"{'more' if greater else 'less'} of it is better. Leave --greater_is_better out."
        )
    args.greater_is_better = greater
    if _follows(args):
        settings, mode = dict(args.lr_scheduler_kwargs or {}), "max" if greater else "min"
        if settings.setdefault("mode", mode) != mode:
            raise ConfigError(
                f"lr_scheduler_kwargs sets mode={settings['mode']!r}: expected {mode!r}, because "
                f"{'more' if greater else 'less'} of {metric!r} is better. Leave the mode out."
            )
        if greater or "mode" in (args.lr_scheduler_kwargs or {}):  # "min" is the schedules' own default
            args.lr_scheduler_kwargs = settings


def _follows(args: Any) -> bool:
    return name_of(args.lr_scheduler_type) in _FOLLOWING


def check_metric(args: Any, names: Collection[str]) -> None:
    """Check that `metric_for_best_model` exists in the run's evaluations and has a direction.

    Args:
        names: the metrics of an evaluation, without `eval_`.

    Raises:
        ConfigError: the metric does not exist or has no direction, or `greater_is_better`
            contradicts it.
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
            f"metric_for_best_model={metric!r}: neither more nor less of it is better. Expected one of {usable}."
        )
    if args.greater_is_better is not greater:  # the arguments were changed after they were built
        raise ConfigError(
            f"greater_is_better={args.greater_is_better} contradicts metric_for_best_model={metric!r}. Pass both to "
            "the config's constructor, or leave greater_is_better out."
        )


def best_row(
    rows: Iterable[Mapping[str, Any]], metric: str, greater: bool, counts: Callable[[int], bool]
) -> Kept | None:
    """The best evaluation in a trainer's log history, the first of equals; `None`: there is none.

    Args:
        counts: whether a step is eligible. Step 0 never is.
    """
    best = None
    for row in rows:
        value = row.get(full_name(metric))
        if value is None or math.isnan(value) or row["step"] == 0 or not counts(row["step"]):
            continue
        if best is None or (value > best.value if greater else value < best.value):
            best = Kept(row["step"], metric, value)
    return best
