"""Console lines of a run: one per logged step, one per evaluation, and a closing summary.

    step 12/96  KL 0.0123  lr 3.0e-05  length 11  net 14 s (search 7 %)  tokens 12,345  jump 21.7Δ
    eval @12  KL 0.0031 ± 0.0004  accuracy 0.789 [0.735, 0.835]  greedy 0.969  length 11

Pure functions of records; `runs.console` prints them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from effopd.runs.best_model import Kept, full_name, read_kept
from effopd.runs.missing_answers import mostly_missing
from effopd.runs.records import (
    CONFIG,
    Costs,
    EvaluationRecord,
    SearchRecord,
    StepRecord,
    read_evaluations,
    read_searches,
    read_steps,
)


def step_line(
    record: StepRecord, steps: int, *, loss_is_kl: bool = True, averaged: bool = False, clock: str = "wall"
) -> str:
    """One line for a logged step; values that were not logged are left out.

    Args:
        record: a step of distillation, or of reinforcement learning (with a `reward`).
        steps: total number of steps of the run.
        loss_is_kl: whether the loss is the reverse KL over all tokens of the step, in nats. If not,
            the line shows both the loss and the KL of the health metrics, measured on some tokens.
        averaged: whether the record is a mean over several optimizer steps.
        clock: the run's `cost_clock`.
    """
    costs = record.costs
    parts = [f"step {record.step:>{len(str(steps))}}/{steps}"]
    if record.reward is not None:
        parts += [_part("reward", record.reward, _three), _share(record.tied_groups_share, "tied groups {}")]
        parts += [_part("KL to start", record.kl, number), _part("entropy", record.entropy, _three)]
    elif loss_is_kl:
        parts.append(_part("KL", record.loss, number))
    else:
        parts += [_part("loss", record.loss, number), _part("KL", record.health.reverse_kl, number)]
    parts.append(_part("lr", record.learning_rate, "{:.1e}".format))
    parts.append(_length(record.mean_length, record.clipped_share))
    parts += [net_seconds(costs, clock), _part("tokens", costs.net_generated_tokens, "{:,.0f}".format)]
    parts.append(_jump(record.search.accepted_scale, averaged))
    return _joined(parts)


def eval_line(record: EvaluationRecord) -> str:
    """One line for an evaluation: KL ± standard error, accuracy with its 95 % interval.

    An evaluation without a task has its reward and loss instead. The line ends with a warning if
    fewer than half of the answers had something to grade.
    """
    gradable, answers = record.answers_found, record.answers
    return _joined(
        [
            f"{record.name} @{record.step}",
            *held_out(record),
            _length(record.response_length, record.truncated_share),
            f"(only {gradable} of {answers} answers could be graded)" if mostly_missing(gradable, answers) else "",
        ]
    )


def held_out(record: EvaluationRecord) -> list[str]:
    """KL and accuracy of an evaluation; reward and loss if it has neither."""
    parts = []
    if record.kl is not None:
        shown = number(record.kl)
        error = number(record.kl_se, 1e-3 if "e" in shown else 5e-5) if record.kl_se is not None else ""
        parts.append(f"KL {shown}" + (f" ± {error}" if error else ""))
    if record.accuracy is not None:
        low, high = record.accuracy_low, record.accuracy_high
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"accuracy {record.accuracy:.3f}{interval}")
        parts.append(_part("greedy", record.accuracy_greedy, _three))
    if not parts:
        parts = [_part("reward", record.reward, _three), _part("loss", record.loss, number)]
    return [part for part in parts if part]


def net_seconds(costs: Costs, clock: str = "wall") -> str:
    """`net 14 s (search 7 %)`: all seconds except evaluation, and the share of search, if any."""
    if costs.net_seconds is None:
        return ""
    net, search = costs.net_seconds, costs.search_seconds
    unit = " of CPU" if clock == "cpu" else ""
    return f"net {duration(net)}{unit}" + (f" (search {percent(search / net)})" if search and net else "")


def searches_text(searches: Sequence[SearchRecord]) -> str:
    """Number of searches, accepted jumps and backward jumps (s < 0), as text."""
    scales = [search.accepted_scale for search in searches]
    back = sum(scale < 0 for scale in scales)
    return f"jumps accepted in {sum(map(bool, scales))} of {len(scales)} searches" + (
        f" ({back} back)" if back else ""
    )


def number(value: float, smallest: float = 1e-3) -> str:
    """Four decimals; three digits and an exponent below `smallest` and from 1000 on."""
    plain = value == 0 or smallest <= abs(value) < 1e3 or not math.isfinite(value)
    return f"{value:.4f}" if plain else f"{value:.2e}"


def percent(share: float) -> str:
    """A share (0–1) as a whole percentage."""
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """Seconds below 100 s, minutes below 100 min, otherwise hours."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _part(label: str, value: float | None, written: Callable[[float], str]) -> str:
    return "" if value is None else f"{label} {written(value)}"


def _share(share: float | None, text: str) -> str:
    """The text with the share as a percentage; empty if the share is 0 or `None`."""
    return text.format(percent(share)) if share else ""


def _length(mean: float | None, cut: float | None) -> str:
    length = _part("length", mean, "{:.0f}".format)
    return length + _share(cut, " ({} cut)") if length else ""


def _jump(scale: float | None, averaged: bool) -> str:
    if scale is None:
        return ""
    return ("mean jump " if averaged else "jump ") + (f"{scale:.3g}Δ" if scale else "none")


def _joined(parts: Iterable[str]) -> str:
    return "  ".join(part for part in parts if part)


def closing_lines(root: Path, step: int, costs: Costs, unfinished_of: int | None = None) -> str:
    """Closing summary: folder of the model, first → last evaluation, cost, and the next command.

    Args:
        unfinished_of: number of steps of a run that was stopped before its last one.
    """
    evaluations, searches = read_evaluations(root), read_searches(root)
    rewards = [record.reward for record in read_steps(root) if record.reward is not None]
    done, kept = f"Done: step {step}.", read_kept(root)
    if unfinished_of is not None:
        done = f"Stopped by SIGTERM after step {step} of {unfinished_of}, with a checkpoint."
    if kept is not None:  # leave out evaluations of later models
        done += f" The model is that of {kept_text(kept)}."
        evaluations = [record for record in evaluations if record.step <= kept.step]
    lines = [f"{done} The model, its card and all rows are in {root}"]
    if evaluations:
        lines.append(f"  held out, {steps_text(evaluations)}:  " + _joined(first_to_last(evaluations)))
    if rewards:
        lines.append(f"  reward {rewards[0]:.3f} → {rewards[-1]:.3f} (first and last logged step)")
    tokens = _part("tokens", costs.net_generated_tokens, "{:,.0f}".format)
    clock = "cpu" if (root / CONFIG).is_file() and "\ncost_clock: cpu\n" in (root / CONFIG).read_text() else "wall"
    if cost := _joined([net_seconds(costs, clock), tokens]):
        lines.append(f"  {cost}")
    if searches:
        lines.append(f"  look-ahead: {searches_text(searches)}")
    following = f"effopd report {shlex.quote(str(root))}"
    if unfinished_of is not None:
        following = "repeat the command with --resume_from_checkpoint true"
    return "\n".join([*lines, f"Next: {following}"])


def kept_text(kept: Kept) -> str:
    """The step that `load_best_model_at_end` restored, with its metric."""
    return f"step {kept.step}, the best by {full_name(kept.metric)} ({number(kept.value)})"


def steps_text(evaluations: Sequence[EvaluationRecord]) -> str:
    """`step 2 → step 6`: first and last evaluation; the first can come after the first jumps."""
    steps = dict.fromkeys((evaluations[0].step, evaluations[-1].step))
    return " → ".join(f"step {step}" for step in steps)


def first_to_last(evaluations: Sequence[EvaluationRecord]) -> list[str]:
    """`held_out` of the last evaluation, each value preceded by the first evaluation's: `a → b`."""
    last = held_out(evaluations[-1])
    if len(evaluations) == 1:
        return last
    starts = dict(part.split(" ")[:2] for part in held_out(evaluations[0]))
    return [
        part.replace(" ", f" {starts[name]} → ", 1) if (name := part.split(" ")[0]) in starts else part
        for part in last
    ]
