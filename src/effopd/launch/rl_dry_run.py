"""`effopd rl --dry_run`: the plan of a run and its estimated memory.

It makes all checks of the run itself that need neither weights nor network, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from effopd.distill.rl_config import TaskDGRPOConfig
from effopd.launch.dry_run import length_text, memory_table, prompts_text, run_table, size_text, unchecked_text
from effopd.launch.memory_estimate import estimate_rl_memory
from effopd.launch.plan_rows import adapter_text, optimizer_rows, start_text
from effopd.launch.prompts import Prompts, graded_splits, load_prompts
from effopd.launch.rl import (
    WHY_ANSWERS,
    RLRunSettings,
    check_fit,
    check_models_of,
    check_prompts,
    check_settings,
    prompts_per_batch,
    teacher_of,
)
from effopd.launch.run_models import STUDENT, NamedModel, RunSizes, run_sizes, tokenizer_of
from effopd.tasks import check_grading, needs_network
from effopd.tasks.builtin_models import spoken_name
from effopd.tasks.code.rows import shapes_text


def rl_plan_tables(settings: RLRunSettings) -> tuple[Table, Table]:
    """(plan of the run, estimated memory per rank).

    Raises:
        EffOPDError: a check of the run fails.
    """
    names = check_settings(settings)
    models, rows = _checked(settings, names)
    sizes = run_sizes(settings.model, teacher_of(settings.rl), settings.rl, models)
    estimate = estimate_rl_memory(settings, rows.longest if rows else None, sizes)
    return run_table(_run_rows(settings, names, rows, sizes)), memory_table(estimate)


def _checked(settings: RLRunSettings, names: Mapping[str, str]) -> tuple[list[NamedModel], Prompts | None]:
    """Run the remaining checks; return (models on the meta device, prompts).

    There are no models if one is not on disk, and the prompts are `None` if loading them needs the
    network.
    """
    model, task, rl = settings.model, settings.task, settings.rl
    on_disk = _on_disk(names)
    models = check_models_of(settings) if on_disk else []
    tokenizer = tokenizer_of(model, names, rl) if on_disk else None
    if needs_network(task):
        check_grading(task, graded_splits(rl, WHY_ANSWERS))
        return models, None
    rows = load_prompts(task, rl, tokenizer, WHY_ANSWERS)
    check_prompts(settings, rows.train)
    if on_disk:
        check_fit(settings, models, rows.train, rows.longest)
    return models, rows


def _on_disk(names: Mapping[str, str]) -> bool:
    return all(Path(name).is_dir() for name in names.values())


def _run_rows(
    settings: RLRunSettings, names: Mapping[str, str], rows: Prompts | None, sizes: RunSizes
) -> Iterator[tuple[str, str]]:
    rl, task = settings.rl, settings.task
    yield "algorithm", f"{rl.algorithm}, {_penalty_text(settings)}"
    for flag, name in names.items():
        size = sizes.student if flag == STUDENT else sizes.frozen[flag]
        yield "model" if flag == STUDENT else "teacher", f"{spoken_name(name)}  {size_text(size)}"
    yield "task", f"{task.task}, {prompts_text(task, rl, rows)}"
    if rows is not None and (shapes := shapes_text(rows.train.examples)):
        yield "code rows", shapes
    answers = rl.per_device_train_batch_size * rl.gradient_accumulation_steps * rl.world_size
    yield (
        "each step",
        f"{answers:,} answers = {rl.per_device_train_batch_size} × {rl.gradient_accumulation_steps} accumulated × "
        f"{rl.world_size} process(es); answers up to {rl.max_completion_length} tokens",
    )
    yield (
        "sampled at once",
        f"{prompts_per_batch(rl):,} prompts × {rl.num_generations} answers, used for "
        f"{rl.steps_per_generation} forward pass(es) per process",
    )
    yield from optimizer_rows(rl)
    if adapter := adapter_text(settings.model, sizes.trained):
        yield "adapter", adapter
    yield "length", length_text(rl)
    yield "start", start_text(rl)
    yield "written to", str(rl.output_dir)
    if unchecked := unchecked_text(rows, _on_disk(names)):
        yield "not checked", unchecked


def _penalty_text(settings: RLRunSettings) -> str:
    """Weight of the KL term, and the model it refers to."""
    rl = settings.rl
    if isinstance(rl, TaskDGRPOConfig):
        return f"beta {rl.beta:g} × KL to the teacher"
    return f"beta {rl.beta:g} × KL to the initial model" if rl.beta else "no KL term (beta 0)"
