"""`effopd intervene`: evaluate edited versions of a trained update, or write them to disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from effopd.analysis.progress import file_marks
from effopd.commands.intervene_parser import Request, parse_intervene
from effopd.common.optional import is_available
from effopd.common.progress import Counted
from effopd.common.versions import versions
from effopd.interventions.editable_model import EditableModel, save_point
from effopd.interventions.kinds import INTERVENTIONS, reference_points
from effopd.interventions.measure import Evaluator
from effopd.interventions.points import Point
from effopd.interventions.results import InterventionResults, merged_settings, write_settings
from effopd.interventions.sources import Sources
from effopd.launch.meta_model import check_positions_of
from effopd.launch.preflight import check_models, check_task
from effopd.models.files import load_model, load_tokenizer
from effopd.report.intervention_page import PAGE, write_intervention_page
from effopd.report.intervention_table import intervention_table
from effopd.report.linearity_table import linearity_table
from effopd.runs.console import quiet_hosts
from effopd.runs.missing_answers import Counts, missing_answers, mostly_missing
from effopd.tasks import Task, load_task
from effopd.tasks.builtin_models import resolve_model

#: Width of the printed table, in characters, if the output is not a terminal.
_PRINTED_WIDTH = 140


def run_intervene(argv: Sequence[str]) -> int:
    """Run `effopd intervene`: check what needs no weights, then measure or write all points."""
    request = parse_intervene(argv)
    models = request.models
    sources = Sources(str(resolve_model(models.base)), models.runs(), models.steps)
    decided = _model_settings(sources, request)
    if models.save_dir is not None:
        merged_settings(Path(models.save_dir), decided)
    results: Any = None
    task: Any = None
    tokenizer: Any = None
    if request.task.task:
        results = InterventionResults(str(models.out), decided | _task_settings(request))
        task, tokenizer = _load_task(sources, request)
    inputs = sources.point_inputs(request.options)
    kind = INTERVENTIONS[request.intervention]
    points = kind.points(inputs)
    if results is not None:
        references = reference_points(inputs) if kind.graded else []
        _evaluate([*references, *points], sources, request, results, task, tokenizer)
        _report(results, request.intervention, sources)
        if text := _missing(results, request, task):
            print(text)
    if models.save_dir is not None:
        _save(points, sources, request, decided)
    return 0


def _model_settings(sources: Sources, request: Request) -> dict[str, Any]:
    """Settings that determine the models of the points."""
    trained = {
        run: [{"step": snapshot.step, "path": str(snapshot.path.resolve())} for snapshot in snapshots]
        for run, snapshots in sources.snapshots.items()
    }
    paths = [sources.base.path, *(s.path for snapshots in sources.snapshots.values() for s in snapshots)]
    return {
        "base": str(sources.base.path.resolve()),
        "trained": trained,
        "files": {str(path.resolve()): file_marks(path) for path in paths},
        "dtype": request.models.dtype,
        "interventions": {
            request.intervention: {
                name: getattr(request.options, name) for name in INTERVENTIONS[request.intervention].options
            }
        },
    }


def _task_settings(request: Request) -> dict[str, Any]:
    """Settings that determine the measurement of the points."""
    teacher = resolve_model(request.models.teacher)
    folder = None if teacher is None else Path(teacher)
    return {
        "task": dataclasses.asdict(request.task),
        "sampling": dataclasses.asdict(request.sampling),
        "teacher": teacher,
        "teacher_files": {} if folder is None or not folder.is_dir() else {teacher: file_marks(folder)},
    }


def _load_task(sources: Sources, request: Request) -> tuple[Task, Any]:
    """Load the prompts and the base's tokenizer; check prompts, tokenizer and models together."""
    load = {"trust_remote_code": request.models.trust_remote_code}
    tokenizer = load_tokenizer("--base", str(sources.base.path), **load)
    graded = INTERVENTIONS[request.intervention].graded
    why = "Answers are needed to tell right from wrong."
    task = load_task(request.task, "eval", answers_required=graded, why=why)
    longest = check_task(task, tokenizer, request.task.max_prompt_length, request.sampling.template, graded=graded)
    answer = request.sampling.max_new_tokens
    check_positions_of("--base", str(sources.base.path), longest, answer, "--max_new_tokens", **load)
    if request.models.teacher is not None:
        check_positions_of(
            "--teacher", str(resolve_model(request.models.teacher)), longest, answer, "--max_new_tokens", **load
        )
        teacher = str(resolve_model(request.models.teacher))
        check_models(str(sources.base.path), teacher, tokenizer, trust_remote_code=load["trust_remote_code"])
    return task, tokenizer


def _evaluate(
    points: Sequence[Point],
    sources: Sources,
    request: Request,
    results: InterventionResults,
    task: Any,
    tokenizer: Any,
) -> None:
    """Load the base and the teacher, then measure the points that have no results yet."""
    if all(point.id in results for point in points):
        print(f"all {len(points)} points are already in {results.root}")
        return
    load = {"dtype": request.models.dtype, "trust_remote_code": request.models.trust_remote_code}
    teacher = request.models.teacher
    with quiet_hosts(bars=True):
        model = load_model("--base", str(sources.base.path), **load)
        editable = EditableModel(model, sources)
        loaded = None if teacher is None else load_model("--teacher", str(resolve_model(teacher)), **load)
    evaluator = Evaluator(model, tokenizer, task, request.sampling, loaded)
    results.begin([f"{name} {version}" for name, version in versions().items()])
    INTERVENTIONS[request.intervention].measure(points, editable, sources, evaluator, results)


def _save(points: Sequence[Point], sources: Sources, request: Request, settings: dict[str, Any]) -> None:
    """Write every point to `save_dir/intervention/run/coordinates`; existing ones are skipped."""
    root, name = Path(str(request.models.save_dir)), request.models.dtype
    merged = merged_settings(root, settings)
    root.mkdir(parents=True, exist_ok=True)
    write_settings(root, merged)
    with Counted(len(points), "checkpoints", "point") as bar:
        for point in points:
            if not (root / point.id).exists():
                save_point(point, sources, root / point.id, None if name == "auto" else getattr(torch, name))
            bar.update()
    print(f"checkpoints: {len(points)} in {root / request.intervention}")


def _report(results: InterventionResults, intervention: str, sources: Sources) -> None:
    """Print the table and the paths of the files; write the page and draw the figure."""
    frame = results.write_table()
    coordinates = results.coordinates(intervention)
    console = Console()
    console = console if console.is_terminal else Console(width=_PRINTED_WIDTH)
    linear = intervention == "linearity"
    console.print(linearity_table(frame) if linear else intervention_table(frame, intervention, coordinates))
    if intervention == "embedding" and all(part.place.module != "head" for part in sources.base.parts()):
        print("note: the base ties its head to its embeddings, so its embeddings also serve as its head.")
    print(f"table:  {results.root / 'results.csv'} (and .parquet)")
    measured = [name for name in dict.fromkeys(frame["intervention"]) if name != "reference"]
    page = results.root / PAGE
    rows = [results.root / name for name in ("results.csv", "results.jsonl", "config.yaml")]
    print(f"page:   {write_intervention_page(frame, {n: results.coordinates(n) for n in measured}, page, rows)}")
    if not is_available("matplotlib"):
        print("figure: skipped, matplotlib is missing (pip install 'effopd[plots]', then repeat the command)")
        return
    from effopd.report.intervention_figures import draw

    print(f"figure: {draw(frame, intervention, results.root / 'figures' / f'{intervention}.png')}")


def _missing(results: InterventionResults, request: Request, task: Task) -> str:
    """Warning about the point with the fewest gradable answers; "" if none is needed."""
    worst: tuple[int, str, Mapping[str, Any]] | None = None
    for name, row in results.rows.items():
        gradable = row["measured"].get("answers_found")
        if gradable is None or row["intervention"] not in ("reference", request.intervention):
            continue
        if worst is None or gradable < worst[0]:
            worst = (gradable, name, row["measured"])
    if worst is None:
        return ""
    gradable, name, measured = worst
    answers = measured["n"] * request.sampling.n
    if not mostly_missing(gradable, answers):
        return ""
    right = round(measured["accuracy"] * answers)
    counts = Counts(answers, gradable, measured["answers_cut"], measured["answers_empty"], right)
    limit, effect = request.sampling.max_new_tokens, "accuracy does not measure the model's ability"
    return f"{name}: {missing_answers(task, counts, limit=limit, flag='--max_new_tokens', effect=effect)}"
