"""`effopd intervene`: a scan of models between a base and trained ones, evaluated in memory or written as checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from effopd.analysis.plan import labelled
from effopd.commands.evaluate import MeasuringParser, SamplingArguments, parsed_as_trained
from effopd.commands.parser import OneSpelling
from effopd.common.optional import is_available
from effopd.common.progress import Counted
from effopd.common.versions import versions
from effopd.errors import ConfigError
from effopd.interventions.options import ScanOptions
from effopd.interventions.points import SCAN_FIELDS, SCANS, Point, reference_points
from effopd.interventions.results import Results, merged_settings, write_settings
from effopd.interventions.run import Evaluator, LiveBase, Sources, run_scan, save_point
from effopd.launch.meta_model import check_positions_of
from effopd.launch.preflight import check_models, check_task
from effopd.models.files import check_dtype, load_model, load_tokenizer
from effopd.runs.console import quiet_hosts
from effopd.runs.lines import missing_answers
from effopd.tasks import Task, TaskConfig, load_task
from effopd.tasks.builtin_models import resolve_model

#: Columns of the printed table when it does not go to a terminal.
_PRINTED_WIDTH = 140


class _Extend(argparse.Action):
    """Repeated flags add up, and together replace what a YAML file says."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest, self.default)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


@dataclass
class InterveneArguments:
    """Flags of `effopd intervene` besides those of the sampling, the scan and the task."""

    base: str = field(metadata={"help": "Folder of the base model, W0; testbed:student ships."})
    trained: list[str] = field(
        metadata={
            "help": "LABEL=DIR, once or more: a checkpoint, a LoRA adapter, or a run directory with a trajectory "
            "(testbed:teacher ships). The same label again is another seed.",
            "action": _Extend,
            "metavar": "LABEL=DIR",
        }
    )
    out: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the results; needed with --task. A rerun goes on where it stopped, and other scans of "
            "the same models and task may share it."
        },
    )
    save_dir: str | None = field(
        default=None,
        metadata={"help": "Also write the model of every point as a checkpoint in this folder; works without --task."},
    )
    steps: list[int] | None = field(
        default=None,
        metadata={"help": "Use these steps of the trajectories only; the last is the trained model. Default: all."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id; also measure the exact reverse KL to this model on the answers sampled."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the weights evaluated and written; in bfloat16 small updates vanish."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository."})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.out is None and self.save_dir is None:
            raise ConfigError("--out is missing: expected a folder for the results (or --save_dir, to only write).")
        if self.save_dir is not None and self.out is not None and Path(self.save_dir) == Path(self.out):
            raise ConfigError(f"--save_dir and --out: expected two folders, got {self.out} for both.")

    def runs(self) -> dict[str, list[str]]:
        """Label → folders, in the order given.

        Raises:
            ConfigError: not LABEL=DIR, or a label that cannot be used.
        """
        return {label: [str(resolve_model(path)) for path in paths] for label, paths in labelled(self.trained).items()}


@dataclass
class ScanTaskConfig(TaskConfig):
    """`TaskConfig` whose task may be left out, for a scan that only writes checkpoints."""

    _argument_group_name = "task"

    task: str = field(default="", metadata=TaskConfig.__dataclass_fields__["task"].metadata)

    def __post_init__(self) -> None:
        self.task = self.task or self.eval_task or ""
        if self.task:
            super().__post_init__()


class _Parser(MeasuringParser):
    own_task = False  # without a task, a scan only writes checkpoints

    def models(self, found: argparse.Namespace) -> list[str]:
        """The trained models; a mistake among them is said where they are opened."""
        return [path for _, _, path in (str(one).partition("=") for one in found.trained or ()) if path]


def intervene_parser() -> MeasuringParser:
    """The parser of `effopd intervene`."""
    width = max(map(len, SCANS))
    lines = [f"  {name:<{width}}  {(build.__doc__ or '').splitlines()[0]}" for name, build in SCANS.items()]

    parser = _Parser(
        [InterveneArguments, ScanOptions, SamplingArguments, ScanTaskConfig],
        prog="effopd intervene",
        usage="effopd intervene SCAN --base DIR --trained LABEL=DIR [--trained LABEL=DIR …] --task TASK --out DIR",
        description="Test which part of an update carries the gain: models between and beside a base W0 and trained\n"
        "ones W0 + ΔW, each evaluated on the same prompts with the same sampling noise. Of models in run directories, prompts\n"
        "are written and answers sampled as config.yaml there says, unless a flag says otherwise.\n\nscans:\n"
        + "\n".join(lines),
        epilog="Example: effopd intervene alpha --base testbed:student --trained rl=testbed:teacher "
        "--task testbed:chain_sum\n           --eval_size 200 --max_new_tokens 24 --out runs/alpha",
        formatter_class=OneSpelling,
    )
    parser.add_argument("scan", choices=list(SCANS), metavar="SCAN", help="one of the scans above")
    return parser


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    scan: str
    models: InterveneArguments
    options: ScanOptions
    sampling: SamplingArguments
    task: ScanTaskConfig


def parse_intervene(argv: Sequence[str]) -> Request:
    """Command line and YAML → `Request`.

    Raises:
        ConfigError: an unknown setting in the YAML file, a value out of range, or nothing to do.
    """
    models, options, sampling, task, extra = parsed_as_trained(intervene_parser(), argv)
    if task.task and models.out is None:
        raise ConfigError("--out is missing: expected a folder for the results of --task.")
    if not task.task and models.save_dir is None:
        raise ConfigError(
            "--task is missing: expected what to evaluate on (or --save_dir, to only write checkpoints)."
        )
    return Request(extra.scan, models, options, sampling, task)


def run_intervene(argv: Sequence[str]) -> int:
    """Parse, check everything that can be checked without a model, then measure or write every point."""
    request = parse_intervene(argv)
    models = request.models
    sources = Sources(str(resolve_model(models.base)), models.runs(), models.steps)
    decided = _model_settings(sources, request)
    if models.save_dir is not None:
        merged_settings(Path(models.save_dir), decided)
    results = task = tokenizer = None
    if request.task.task:
        results = Results(str(models.out), decided | _task_settings(request))
        task, tokenizer = _load_task(sources, request)
    study = sources.study(request.options)
    points = SCANS[request.scan](study)
    if results is not None:
        _evaluate([*reference_points(study), *points], sources, request, results, task, tokenizer)
        _report(results, request.scan, sources)
        if text := _missing(results, request):
            print(text)
    if models.save_dir is not None:
        _save(points, sources, request, decided)
    return 0


def _model_settings(sources: Sources, request: Request) -> dict[str, Any]:
    """What decides the models of the points."""
    trained = {
        run: [{"step": snapshot.step, "path": str(snapshot.path.resolve())} for snapshot in snapshots]
        for run, snapshots in sources.snapshots.items()
    }
    return {
        "base": str(sources.base.path.resolve()),
        "trained": trained,
        "dtype": request.models.dtype,
        "scans": {request.scan: {name: getattr(request.options, name) for name in SCAN_FIELDS[request.scan]}},
    }


def _task_settings(request: Request) -> dict[str, Any]:
    """What decides how they are measured."""
    return {
        "task": dataclasses.asdict(request.task),
        "sampling": request.sampling.settings(),
        "teacher": resolve_model(request.models.teacher),
    }


def _load_task(sources: Sources, request: Request) -> tuple[Task, Any]:
    """The evaluation's prompts and the base's tokenizer, checked against each other and the teacher."""
    load = {"trust_remote_code": request.models.trust_remote_code}
    tokenizer = load_tokenizer("--base", str(sources.base.path), **load)
    task = load_task(request.task, "eval", why="Answers are needed to tell right from wrong.")
    longest = check_task(task, tokenizer, request.task.max_prompt_length, **request.sampling.template)
    answer = request.sampling.max_new_tokens
    check_positions_of("--base", str(sources.base.path), longest, answer, "--max_new_tokens", **load)
    if request.models.teacher is not None:
        check_positions_of(
            "--teacher", str(resolve_model(request.models.teacher)), longest, answer, "--max_new_tokens", **load
        )
        check_models(str(sources.base.path), str(resolve_model(request.models.teacher)), tokenizer, **load)
    return task, tokenizer


def _evaluate(
    points: Sequence[Point], sources: Sources, request: Request, results: Results, task: Any, tokenizer: Any
) -> None:
    """Load the base (and the teacher), prove that edits can be undone, and measure what is not measured yet."""
    if all(point.id in results for point in points):
        print(f"all {len(points)} points are in {results.root} already")
        return
    load = {"dtype": request.models.dtype, "trust_remote_code": request.models.trust_remote_code}
    teacher = request.models.teacher
    with quiet_hosts(bars=True):
        model = load_model("--base", str(sources.base.path), **load)
        live = LiveBase(model, sources)
        loaded = None if teacher is None else load_model("--teacher", str(resolve_model(teacher)), **load)
    evaluator = Evaluator(model, tokenizer, task, request.sampling.settings(), loaded)
    results.begin([f"{name} {version}" for name, version in versions().items()])
    run_scan(points, live, sources, evaluator, results)


def _save(points: Sequence[Point], sources: Sources, request: Request, settings: dict[str, Any]) -> None:
    """Every point as a checkpoint `save_dir/scan/run/coordinates`; finished ones are left alone."""
    root, name = Path(str(request.models.save_dir)), request.models.dtype
    merged = merged_settings(root, settings)
    root.mkdir(parents=True, exist_ok=True)
    write_settings(root, merged)
    with Counted(len(points), "checkpoints", "point") as bar:
        for point in points:
            if not (root / point.id).exists():
                save_point(point, sources, root / point.id, None if name == "auto" else getattr(torch, name))
            bar.update()
    print(f"checkpoints: {len(points)} in {root / request.scan}")


def _report(results: Results, scan: str, sources: Sources) -> None:
    """The table, where the files are, and the figure."""
    frame = results.write_table()
    _print(frame[frame["scan"].isin(["reference", scan])].dropna(axis="columns", how="all"), results, scan)
    if scan == "embedding" and all(part.place.module != "head" for part in sources.base.parts()):
        print("The base ties its head to its embeddings: the base's embeddings are also the base's head here.")
    print(f"table:  {results.root / 'results.csv'} (and .parquet)")
    if not is_available("matplotlib"):
        print("figure: none, matplotlib is not installed (pip install 'effopd[plots]' and run this again)")
        return
    from effopd.report.intervention_figures import draw

    print(f"figure: {draw(frame, scan, results.root / 'figures' / f'{scan}.png')}")


def _missing(results: Results, request: Request) -> str:
    """Where most answers of a point had nothing to grade: the worst point, and what to do."""
    worst: tuple[int, str, Mapping[str, Any]] | None = None
    for name, row in results.rows.items():
        found = row["measured"].get("answers_found")
        if found is not None and row["scan"] in ("reference", request.scan) and (worst is None or found < worst[0]):
            worst = (found, name, row["measured"])
    if worst is None:
        return ""
    found, name, measured = worst
    text = missing_answers(
        request.task.eval_task or request.task.task,
        measured["accuracy"],
        measured["n"] * request.sampling.n,
        found,
        measured["answers_cut"],
        measured["answers_empty"],
        limit=request.sampling.max_new_tokens,
    )
    return f"{name}: {text}" if text else ""


def _print(frame: pd.DataFrame, results: Results, scan: str) -> None:
    """Coordinates that are the same everywhere go to the title."""
    points = frame[frame["scan"] == scan]
    rows = [row for row in results.rows.values() if row["scan"] == scan]
    coordinates = list(dict.fromkeys(key for row in rows for key in row["coordinates"]))
    constant = [name for name in coordinates if points[name].nunique() == 1 and len(points) > 1]
    shown = [name for name in coordinates if name not in constant]
    title = [f"{int(frame['n'].iloc[0])} prompts", *(f"{name} {_cell(points[name].iloc[0])}" for name in constant)]
    table = Table(title=f"{scan}: {', '.join(title)}", box=None, header_style="bold", pad_edge=False)
    change = "change_from_trained" if scan == "embedding" else "accuracy_change"
    changed = "change from trained" if scan == "embedding" else "change from base"
    for name in ("run", *shown, "‖W − W0‖", "accuracy [95 %]", changed):
        table.add_column(name, justify="left" if name in ("run", *shown) else "right", no_wrap=True)
    if "kl" in frame:
        table.add_column("KL to the teacher", justify="right", no_wrap=True)
    for _, row in frame.iterrows():
        name = row["run"] if row["scan"] == scan or row["run"] == "base" else f"{row['run']}, trained"
        cells = [name, *(_cell(row[key]) if row["scan"] == scan else "" for key in shown), f"{row['update_norm']:.4g}"]
        cells += [_interval(row, "accuracy", ".3f"), _interval(row, change, "+.3f")]
        table.add_row(*cells, *([_interval(row, "kl", ".4f")] if "kl" in frame else []))
    console = Console()
    console = console if console.is_terminal else Console(width=_PRINTED_WIDTH)
    console.print(table)


def _cell(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _interval(row: pd.Series, name: str, form: str) -> str:
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
