"""`effopd train --dry_run`: the plan of a run and its estimated memory.

It makes all checks of the run itself that need neither weights nor network, and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from effopd.common.statistics import share_of
from effopd.distill.horizon import horizon_length
from effopd.distill.residuals import residualized
from effopd.distill.scoring import first_rollouts, rollouts_per_step, rollouts_per_update, wanted_rollouts
from effopd.launch.memory_estimate import (
    NOT_COUNTED,
    SETUPS,
    MemoryEstimate,
    estimate_memory,
    sizes_of,
    teacher_choices,
)
from effopd.launch.model_size import ModelSize
from effopd.launch.offline import Stored, check_answers, rollouts_text, stored_rollouts
from effopd.launch.opd import (
    RunSettings,
    check_models_of,
    check_prompts,
    check_settings,
    lengths,
    why_answers,
)
from effopd.launch.plan_rows import (
    adapter_text,
    objective_text,
    optimizer_rows,
    replay_bytes,
    rollouts_used_text,
    start_text,
)
from effopd.launch.prompts import Prompts, evaluates, graded_splits, load_prompts
from effopd.launch.run_checks import check_space
from effopd.launch.run_models import NamedModel, RunSizes, check_lengths, frozen_models, kept_columns, tokenizer_of
from effopd.launch.served import ServedText, served_text
from effopd.tasks import check_grading, needs_network
from effopd.tasks.builtin_models import spoken_name
from effopd.tasks.code.rows import shapes_text
from effopd.tasks.row_columns import field_of


def plan_tables(settings: RunSettings) -> tuple[Table, Table, *tuple[Text, ...]]:
    """(plan of the run, estimated memory per rank, warnings if there are any).

    Raises:
        EffOPDError: a check of the run fails.
    """
    checked = _checked(settings)
    sizes = sizes_of(settings, checked.models)
    estimate = estimate_memory(settings, checked.rows.longest if checked.rows else None, sizes)
    tables = run_table(_run_rows(settings, checked, sizes)), memory_table(estimate)
    warning = checked.served.warning
    return (*tables, Text(f"Warning: {warning}", style="bold yellow")) if warning else tables


def run_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Table of the plan, from (name, value) rows."""
    run = Table(title="the run", box=box.SIMPLE, pad_edge=False, show_header=False)
    for name, value in rows:
        run.add_row(name, escape(value))
    return run


def print_plan(tables: Iterable[Table | Text]) -> None:
    """Print tables and warnings, 140 columns wide if the output is not a terminal."""
    for table in tables:
        Console(width=None if sys.stdout.isatty() else 140).print(table)


class _Checked(NamedTuple):
    """Results of the checks.

    Attributes:
        models: models on the meta device, the student first; empty if one is not on disk.
        rows: prompts. `None`: loading them needs the network.
        stored: stored rollouts.
        served: words on the teacher's server; empty without one.
    """

    models: list[NamedModel]
    rows: Prompts | None
    stored: Stored | None
    served: ServedText


def _checked(settings: RunSettings) -> _Checked:
    """Run the checks."""
    model, task, opd, effopd = settings.model, settings.task, settings.opd, settings.effopd
    check_settings(settings)
    on_disk = _models_on_disk(settings)
    models = check_models_of(settings) if on_disk else []
    tokenizer = tokenizer_of(model, frozen_models(opd), opd) if on_disk else None
    stored = stored_rollouts(model, opd, tokenizer, network=False)
    given = check_answers(opd, tokenizer)
    if needs_network(task):
        check_grading(task, graded_splits(opd, why_answers(settings)))
        return _Checked(models, None, stored, _server(settings, tokenizer, models, None))
    rows = load_prompts(task, opd, tokenizer, why_answers(settings), keep=kept_columns(opd))
    check_prompts(settings, rows.train, stored, rows.held_out)
    rows = rows._replace(longest=max(rows.longest or 0, given, 0 if stored is None else stored.longest) or None)
    if on_disk:
        check_lengths(models, *lengths(settings, rows.longest, stored))
        check_space(model, opd, models, len(rows.train), rollouts_per_step(opd), effopd=effopd.enabled)
    return _Checked(models, rows, stored, _server(settings, tokenizer, models, rows.longest))


def _server(settings: RunSettings, tokenizer: Any, models: Sequence[NamedModel], longest: int | None) -> ServedText:
    student = next(iter(models), None)
    return served_text(settings.opd, tokenizer, student, longest) if settings.opd.served else ServedText("")


def _models_on_disk(settings: RunSettings) -> bool:
    names = [settings.model.model_name_or_path, *frozen_models(settings.opd).values()]
    return all(Path(name).is_dir() for name in names)


def _run_rows(settings: RunSettings, checked: _Checked, sizes: RunSizes) -> Iterator[tuple[str, str]]:
    opd, task, effopd = settings.opd, settings.task, settings.effopd
    rows, stored = checked.rows, checked.stored
    yield "student", f"{spoken_name(str(settings.model.model_name_or_path))}  {size_text(sizes.student)}"
    for flag, name in frozen_models(opd).items():
        role = flag.removeprefix("--").removesuffix("_model_name_or_path").replace("teachers ", "teacher ")
        yield role, f"{spoken_name(name)}  {size_text(sizes.frozen[flag])}{_rows_text(opd, role, rows)}"
    if choices := teacher_choices(settings, sizes):
        yield "teacher's weights" if opd.teacher_sources == {} else "teachers' weights", choices
    if stored is not None:
        yield "rollouts", rollouts_text(stored, str(opd.rollouts))
        if opd.residualize:
            yield "residualized", residualized(stored.rows)[1].text()
        if not opd.holds_teacher:
            yield "teacher", "none in memory"
    if checked.served.row:
        yield "teacher", checked.served.row
    yield "task", f"{task.task}, {prompts_text(task, opd, rows)}"
    if rows is not None and (shapes := shapes_text(rows.train.examples)):
        yield "code rows", shapes
    yield (
        "each step",
        f"{rollouts_per_step(opd):,} prompts = {opd.per_device_train_batch_size} × "
        f"{opd.gradient_accumulation_steps} accumulated × "
        f"{opd.world_size} process(es); "
        f"{f'prompts up to {task.max_prompt_length}, ' if task.max_prompt_length else ''}"
        f"answers up to {opd.max_completion_length} tokens",
    )
    if opd.rollout_horizon != "full":
        yield "rollout horizon", horizon_text(opd)
    if opd.curriculum != "none":
        yield "curriculum", _curriculum_text(opd)
    yield "objective", objective_text(opd)
    if used := rollouts_used_text(opd, replay_bytes(settings.model, opd, sizes.frozen)):
        yield "use of rollouts", used
    yield from optimizer_rows(opd)
    if adapter := adapter_text(settings.model, sizes.trained):
        yield "adapter", adapter
    yield "length", length_text(opd)
    yield "start", start_text(opd)
    yield "look-ahead", _look_text(effopd, opd)
    yield "written to", str(opd.output_dir)
    if unchecked := unchecked_text(rows, _models_on_disk(settings)):
        yield "not checked", unchecked


def horizon_text(args: Any) -> str:
    """Length of rollouts: `esr: the first 6 of 24 tokens; whole answers: 2 of 8 per process`."""
    text, last = args.rollout_horizon, args.max_completion_length
    if text in ("esr", "topd"):
        text += f": the first {horizon_length(args, 0, 1)} of {last} tokens"
    elif text == "popd":
        text += f": the first {horizon_length(args, 0, 1)} tokens, growing to {last}"
    if args.horizon_whole_share:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        text += f"; whole answers: {share_of(rows, args.horizon_whole_share)} of {rows} per process"
    return text


def length_text(args: Any) -> str:
    """Number of steps or epochs, and the learning rate."""
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epoch(s)"
    return f"{length}, learning rate {args.learning_rate:g}"


def unchecked_text(rows: Prompts | None, on_disk: bool) -> str:
    """What a dry run could not check; "" if nothing."""
    unchecked = ["rows of the task (a Hub dataset or a folder)"] * (rows is None)
    unchecked += ["tokenizers and disk space (a model is not in a local folder)"] * (not on_disk)
    return ", ".join(unchecked)


def _rows_text(opd: Any, role: str, rows: Prompts | None) -> str:
    """Number of training prompts of one of several teachers."""
    if rows is None or not opd.teacher_sources or not role.startswith("teacher "):
        return ""
    label = role.removeprefix("teacher ")
    own = sum(str(field_of(dict(each.metadata), opd.teacher_column)) == label for each in rows.train.examples)
    return f", {own:,} training prompts"


def _curriculum_text(opd: Any) -> str:
    """Stages by difficulty, and the teacher of each."""
    order = "in random order" if opd.curriculum_order == "shuffled" else opd.curriculum_order.replace("_", " ")
    teachers = ", ".join(opd.curriculum_teachers or ())
    return f"{opd.stages} stages by {opd.curriculum}, {order}" + f"; teachers: {teachers}" * bool(teachers)


def prompts_text(task: Any, opd: Any, rows: Prompts | None) -> str:
    """Numbers of training and evaluation prompts."""
    if rows is not None:
        train, held_out = f"{len(rows.train):,}", f"{len(rows.held_out):,}" if rows.held_out else ""
    else:
        train = f"{task.train_size:,}" if task.train_size else "all rows not held out"
        held_out = f"{task.eval_size:,}" if task.eval_size else "all of eval_task" if task.eval_task else _HELD_OUT
    if not evaluates(opd):
        return f"training prompts: {train}; no evaluation (see --eval_strategy)"
    return f"training prompts: {train}, evaluated on: {held_out}"


def _look_text(effopd: Any, opd: Any) -> str:
    if not effopd.enabled:
        return "none: plain OPD"
    parts = [effopd.strategy, f"moves {effopd.parameters}"]
    if effopd.rules.fit is not None:
        parts.append(f"fits at step {effopd.strategy_args.until}")
    else:
        parts.append(f"searches by schedule '{effopd.schedule}'")
    if effopd.scorer == "accuracy":
        each = effopd.validation_size * (effopd.scorer_args.max_completion_length or opd.max_completion_length)
        parts.append(f"{effopd.validation_size} validation prompts: up to {each:,} sampled tokens per candidate")
    elif effopd.scorer == "teacher_kl":
        wanted = wanted_rollouts(opd, effopd.score_rollouts)
        scored = min(wanted, rollouts_per_update(opd))
        fewer = f" (all of a step, instead of {wanted})" if scored < wanted else ""
        new = rollouts_per_step(opd) - (rollouts_per_update(opd) if opd.num_mini_batches > 1 else 0)
        first = min(first_rollouts(opd, effopd.score_rollouts), new)
        more = f" ({first} in the first search)" if _sets_rate_early(effopd, opd) and first > scored else ""
        parts.append(f"scores {scored} rollouts per candidate{fewer}{more}, samples nothing")
    return ", ".join(parts)


def _sets_rate_early(effopd: Any, opd: Any) -> bool:
    """Whether the first search follows one of several steps on its rollouts."""
    return effopd.rules.calibrates_rate and effopd.adapt_learning_rate and opd.updates_per_rollouts > 1


#: Number of held-out rows of an unread source without eval_size.
_HELD_OUT = "100, or a tenth of the rows if that is less"


def memory_table(estimate: MemoryEstimate | None) -> Table:
    """Estimated memory by purpose, and its peak; `None`: the size of a model is unknown."""
    headings = [setup.heading for setup in SETUPS]
    title = "estimated memory per rank, GB" + (f" ({estimate.prompts})" if estimate else "")
    table = Table(title=title, caption=NOT_COUNTED, caption_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    if estimate is None:
        table.add_row("unknown: a model is not on disk and its name has no size", *("–" for _ in headings))
        return table
    for name in dict.fromkeys(name for column in reversed(estimate.columns) for name in column):
        table.add_row(name, *(_gb(column.get(name, 0)) for column in estimate.columns))
    most = (
        "peak"
        if estimate.complete
        else "sum, without activations and loss (the student's configuration is not on disk)"
    )
    table.add_row(f"[bold]{most}[/bold]", *(f"[bold]{_gb(peak)}[/bold]" for peak in estimate.peaks))
    return table


def _gb(value: int) -> str:
    return f"{value / 1e9:,.3g}" if value < 1e12 else f"{value / 1e9:,.0f}"


def size_text(size: ModelSize | None) -> str:
    """Number of parameters of a model and its source, in words."""
    if size is None:
        return "(size unknown)"
    unit, letter = (1e9, "B") if size.parameters >= 1e9 else (1e6, "M")
    return f"({size.parameters / unit:,.3g} {letter} parameters, from its {size.source})"
