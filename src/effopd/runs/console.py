"""What a run says while it trains: a line a logged step, a line an evaluation, and where everything is at the end.

    step 12/96  KL 0.0123  lr 3.0e-05  length 11  net 14 s (search 7 %)  tokens 12,345  jump 21.7Δ
    eval @12  KL 0.0031 ± 0.0004  accuracy 0.789 [0.735, 0.835]  greedy 0.969  length 11

Lines are pure functions of rows. The callbacks take the place of transformers' own, which print whole rows; those are in
`metrics.jsonl`, `evals.jsonl` and the trackers of `report_to` anyway.
"""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from effopd.common.files import read_rows
from effopd.runs.best_model import Kept, full_name
from effopd.runs.records import CONFIG, EVALS, METRICS, SEARCHES
from effopd.runs.run_dir import read_kept

Row = Mapping[str, Any]

#: Old names that TRL 1.16 and PEFT still use on every rollout; nothing that a user could change.
_RENAMED = ("is_gradient_checkpointing", "gradient_checkpointing_disable", "gradient_checkpointing_enable")


# -- lines ------------------------------------------------------------------------------------------------------------


def step_line(
    row: Row, step: int, steps: int, *, loss_is_kl: bool = True, averaged: bool = False, clock: str = "wall"
) -> str:
    """A training row in one line; what the row lacks, or has as `None`, is left out.

    Args:
        row: as in `metrics.jsonl`, of a distillation or of a reinforcement-learning run (which has a `reward`).
        steps: how many there will be.
        loss_is_kl: the loss is the reverse KL of all the step's tokens (nats); otherwise it is shown beside the KL that the
            health metrics found on some of them.
        averaged: the row is a mean over several optimizer steps, of their jumps, too.
        clock: `cost_clock` of the run.
    """
    learning = isinstance(row.get("reward"), int | float)
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    if learning:
        parts += [_part(row, "reward", "reward", _three), _share(row, "frac_reward_zero_std", "tied groups {}")]
        parts += [_part(row, "kl", "KL to start", number), _part(row, "entropy", "entropy", _three)]
    elif loss_is_kl:
        parts.append(_part(row, "loss", "KL", number))
    else:
        parts += [_part(row, "loss", "loss", number), _part(row, "health/reverse_kl", "KL", number)]
    parts.append(_part(row, "learning_rate", "lr", "{:.1e}".format))
    parts.append(_length(row, "completions/mean_length", "completions/clipped_ratio"))
    parts += [net_seconds(row, clock), _part(row, "cost/net_generated_tokens", "tokens", "{:,.0f}".format)]
    parts.append(_jump(row, averaged))
    return _joined(parts)


def eval_line(row: Row, step: int) -> str:
    """An evaluation's row in one line: KL ± standard error, accuracy with its 95 % interval; the host's own evaluation has
    a loss only. Says so where most answers had nothing to grade."""
    prefix = _prefix(row)
    found, answers = row.get(f"{prefix}_answers_found"), row.get(f"{prefix}_answers")
    return _joined(
        [
            f"{prefix} @{step}",
            *held_out(row),
            _length(row, f"{prefix}_response_length", f"{prefix}_truncated_share"),
            f"(only {found} of {answers} answers could be graded)" if mostly_missing(found, answers) else "",
        ]
    )


def mostly_missing(found: float | None, answers: float | None) -> bool:
    """Whether fewer than half of the answers had something that the verifier could grade; not if that is unknown."""
    return found is not None and answers is not None and found < answers / 2


def missing_answers(
    task: str, accuracy: float, answers: int, found: int | None, cut: int, empty: int, *, limit: int
) -> str:
    """A sentence for an evaluation whose verifier found nothing to grade in most answers; "" for any other.

    Args:
        task: its name; the kind before the colon says what the verifier looks for.
        accuracy: the share of right answers that was measured.
        answers: how many there were; `found`, `cut` and `empty` of them had something to grade, were cut at the limit, and
            had no text.
        limit: tokens at most of an answer.
    """
    if not mostly_missing(found, answers):
        return ""
    missing, ways = answers - (found or 0), []
    if cut > answers / 4:
        ways.append(f"raise --max_new_tokens ({cut} answers were cut at {limit})")
    if empty > answers / 4:
        ways.append(f"check --as_chat and the chat template ({empty} answers are empty)")
    ways += ["change --prompt_suffix, which asks for the form of the answer"] * (empty < missing)
    kind = task.partition(":")[0]
    sought = {"math": "\\boxed{}", "reasoning-gym": "<answer> tags"}.get(kind, "answer to grade")
    return (
        f"{missing} of {answers} answers have no {sought}: accuracy {accuracy:.3f} says little about what the model can do "
        f"here. To do: {'; '.join(ways)}."
    )


def held_out(row: Row) -> list[str]:
    """What an evaluation found, in words; the loss or the reward where it is the host's own, without a task."""
    prefix = _prefix(row)
    values = {
        name: row.get(f"{prefix}_{name}") for name in ("kl", "kl_se", "accuracy", "accuracy_low", "accuracy_high")
    }
    parts = []
    if values["kl"] is not None:
        shown = number(values["kl"])
        error = number(values["kl_se"], 1e-3 if "e" in shown else 5e-5) if values["kl_se"] is not None else ""
        parts.append(f"KL {shown}" + (f" ± {error}" if error else ""))
    if values["accuracy"] is not None:
        interval = "" if values["accuracy_low"] is None else " [{accuracy_low:.3f}, {accuracy_high:.3f}]"
        parts.append(f"accuracy {values['accuracy']:.3f}{interval.format(**values)}")
        parts.append(_part(row, f"{prefix}_accuracy_greedy", "greedy", _three))
    if not parts:
        parts = [
            _part(row, f"{prefix}_reward", "reward", _three),
            _part(row, f"{prefix}_loss", "loss", number),
        ]
    return [part for part in parts if part]


def net_seconds(costs: Row, clock: str = "wall") -> str:
    """`net 14 s (search 7 %)`: all but evaluation, and the look-ahead's share of it if there was any. CPU seconds are
    called so."""
    net, search = costs.get("cost/net_seconds"), costs.get("cost/search_seconds")
    if net is None:
        return ""
    unit = " of CPU" if clock == "cpu" else ""
    return f"net {duration(net)}{unit}" + (f" (search {percent(search / net)})" if search and net else "")


def searches_text(searches: Sequence[Row]) -> str:
    """How often the look-ahead looked and what came of it."""
    scales = [row["accepted_scale"] for row in searches]
    back = sum(scale < 0 for scale in scales)
    return f"jumps accepted in {sum(map(bool, scales))} of {len(scales)} searches" + (
        f" ({back} back)" if back else ""
    )


def number(value: float, smallest: float = 1e-3) -> str:
    """Four decimals, or three digits and an exponent where they would say nothing: below `smallest` and from 1000 on."""
    plain = value == 0 or smallest <= abs(value) < 1e3 or not math.isfinite(value)
    return f"{value:.4f}" if plain else f"{value:.2e}"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _part(row: Row, key: str, label: str, written) -> str:
    value = row.get(key)
    return f"{label} {written(value)}" if isinstance(value, int | float) else ""


def _share(row: Row, key: str, text: str) -> str:
    """Only where it is more than nothing."""
    return text.format(percent(row[key])) if row.get(key) else ""


def _length(row: Row, mean: str, cut: str) -> str:
    length, share = _part(row, mean, "length", "{:.0f}".format), _share(row, cut, " ({} cut)")
    return length + share if length else ""


def _jump(row: Row, averaged: bool) -> str:
    scale = row.get("effopd/accepted_scale")
    if not isinstance(scale, int | float):
        return ""
    return ("mean jump " if averaged else "jump ") + (f"{scale:.3g}Δ" if scale else "none")


def _prefix(row: Row) -> str:
    return next((key.removesuffix("_runtime") for key in row if key.endswith("_runtime")), "eval")


def _joined(parts: Iterable[str]) -> str:
    return "  ".join(part for part in parts if part)


def closing_lines(root: Path, step: int, costs: Row) -> str:
    """Where the model is, what the run reached (first → last evaluation), what it cost, and the command to type next."""
    evals, searches = list(read_rows(root / EVALS)), list(read_rows(root / SEARCHES))
    rewards = [row["reward"] for row in read_rows(root / METRICS) if row.get("reward") is not None]
    done, kept = f"Done: step {step}.", read_kept(root)
    if kept is not None:  # what came later is of another model
        done += f" The model is that of {kept_text(kept)}."
        evals = [row for row in evals if row["step"] <= kept.step]
    lines = [f"{done} The model, its card and all rows are in {root}"]
    if evals:
        lines.append(f"  held out, {steps_text(evals)}:  " + _joined(first_to_last(evals)))
    if rewards:
        lines.append(f"  reward {rewards[0]:.3f} → {rewards[-1]:.3f} (first and last logged step)")
    tokens = _part(costs, "cost/net_generated_tokens", "tokens", "{:,.0f}".format)
    clock = "cpu" if (root / CONFIG).is_file() and "\ncost_clock: cpu\n" in (root / CONFIG).read_text() else "wall"
    if cost := _joined([net_seconds(costs, clock), tokens]):
        lines.append(f"  {cost}")
    if searches:
        lines.append(f"  look-ahead: {searches_text(searches)}")
    return "\n".join([*lines, f"Next: effopd report {shlex.quote(str(root))}"])


def kept_text(kept: Kept) -> str:
    """The step that `load_best_model_at_end` went back to, and why."""
    return f"step {kept.step}, the best by {full_name(kept.metric)} ({number(kept.value)})"


def steps_text(evals: Sequence[Row]) -> str:
    """`step 2 → step 6`: of the first evaluation, which may come after the first jumps, and of the last."""
    steps = list(dict.fromkeys(row["step"] for row in (evals[0], evals[-1])))
    return " → ".join(f"step {step}" for step in steps)


def first_to_last(evals: Sequence[Row]) -> list[str]:
    """`held_out` of the last evaluation, each value with the first evaluation's before it."""
    last = held_out(evals[-1])
    if len(evals) == 1:
        return last
    starts = dict(part.split(" ")[:2] for part in held_out(evals[0]))
    return [
        part.replace(" ", f" {starts[name]} → ", 1) if (name := part.split(" ")[0]) in starts else part
        for part in last
    ]


# -- callbacks --------------------------------------------------------------------------------------------------------


class _Lines(TrainerCallback):
    """Says the lines, on the first process; rows that are none of ours are shown like the host does."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            exact, averaged = _loss_is_kl(args), args.logging_strategy != "steps" or state.logging_steps > 1
            clock = getattr(args, "cost_clock", "wall")
            line = step_line(
                logs, state.global_step, state.max_steps, loss_is_kl=exact, averaged=averaged, clock=clock
            )
            _say(line)
        elif not any(key.endswith("_runtime") for key in logs):  # an evaluation is said below, the end by the command
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if state.is_world_process_zero and metrics:
            _say(eval_line(metrics, state.global_step))


class LinesAlone(_Lines, PrinterCallback):
    """For `disable_tqdm`."""


class LinesWithBar(_Lines, ProgressCallback):
    """With the host's progress bar, where standard error is a terminal."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = 0
        self.training_bar: Any = None
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)

    def end_bar(self) -> None:
        """Close the bar of a training that was interrupted: what is printed next starts on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def in_lines(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """The callbacks with ours in the place of transformers' two (a notebook's, or a subclass of yours, stays)."""
    ours: dict[type, type] = {PrinterCallback: LinesAlone, ProgressCallback: LinesWithBar}
    return [ours[type(callback)]() if type(callback) in ours else callback for callback in callbacks]


def end_bars(callbacks: Iterable[TrainerCallback]) -> None:
    """Close progress bars that are still open."""
    for callback in callbacks:
        if isinstance(callback, LinesWithBar):
            callback.end_bar()


@contextmanager
def quiet_hosts(*, bars: bool) -> Iterator[None]:
    """For the length of a command: no warning about names that TRL uses, and no bars of transformers (loading, saving) unless
    `bars` and there is a terminal to draw them on."""
    shown = transformers_logging.is_progress_bar_enabled()
    hide = shown and not (bars and sys.stderr.isatty())
    with warnings.catch_warnings():
        for name in _RENAMED:
            warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
        if hide:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if hide:
                transformers_logging.enable_progress_bar()


def _loss_is_kl(args: Any) -> bool:
    full = getattr(args, "loss_type", None) == "full"
    return full and args.beta == 1 and args.lambda_extrapolation == 1


def _say(line: str) -> None:
    tqdm.write(line)  # above the bar, if there is one
    sys.stdout.flush()
