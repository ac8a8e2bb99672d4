"""`effopd compare`: run a grid of runs, then report each strategy's speed-up and its interval."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from effopd.common.files import check_writable, write_atomically
from effopd.common.optional import is_available
from effopd.common.progress import spoken_time, time_left
from effopd.compare import grid as grid_module
from effopd.compare.collect import PLAN, collect, with_roles
from effopd.compare.envelope_rows import envelopes
from effopd.compare.grid import Grid, PlannedRun, load_grid, run_settings
from effopd.compare.imported_runs import read_entries, runs_to_make, save_entries, saved_entries, sources
from effopd.compare.prices import PriceList, read_prices
from effopd.compare.runner import DONE, LOG, Runner, failure_of, is_done, only_one, progress_of
from effopd.compare.same_inputs import check_same_content, check_unchanged_teachers
from effopd.compare.uneven_evaluations import uneven_evaluations
from effopd.errors import ConfigError, EffOPDError
from effopd.report.compare_gate import gate_results
from effopd.report.compare_html import write_compare_page
from effopd.report.compare_page import render
from effopd.report.compare_terminal import summary_tables

#: The fields of a plan, from the docstring of `compare.grid`.
_PLAN_HELP = textwrap.dedent((grid_module.__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0])

RESULTS, PAGE, HTML, FIGURES = "results.json", "results.md", "results.html", "results"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `effopd compare`."""
    parser = argparse.ArgumentParser(
        prog="effopd compare",
        description="Run strategies × learning rates × seeds × tasks with `effopd train` and compare them: steps,\n"
        "net seconds and tokens until the baseline's final held-out KL, paired by seed, with 95 % intervals.\n"
        "Repeat the command to resume an interrupted grid; finished runs are not repeated.",
        epilog="A plan:\n" + textwrap.indent(_PLAN_HELP, "  ") + "\nExamples:\n"
        "  effopd compare recipes/compare-testbed.yaml --dry_run     # check every setting, show the grid\n"
        "  effopd compare recipes/compare-testbed.yaml --workers 2   # run or resume the grid\n"
        "  effopd compare recipes/compare-testbed.yaml --runs_from docs/results.json   # … begun on another machine\n"
        "  effopd compare --report runs/compare --out docs           # redraw without running\n"
        "  effopd compare --report docs/results.json --prices recipes/prices/1.7b-8b-1xh100.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "plan", nargs="?", help="YAML file with the fields below; example: recipes/compare-testbed.yaml."
    )
    parser.add_argument("--workers", type=int, help="Number of parallel runs. Default: the plan's.")
    parser.add_argument(
        "--runs_from",
        type=Path,
        action="append",
        default=[],
        metavar="RESULTS_JSON",
        help="Import finished runs from the results.json of another machine; repeatable. One of them per task "
        "is repeated here, to convert their seconds to this machine's.",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Run only the runs whose folder TASK/STRATEGY/lr-RATE/seed-N matches, e.g. '*/plain/*' or '*/seed-0'; "
        "repeatable, in this order. Repeat the command without it for the rest of the plan.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Check every setting and show the grid, without running or writing."
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="PATH",
        help="Redraw from a grid's folder (finished runs only) or from a results.json, without running. With a plan "
        "and a results.json: analyze its runs again with the plan's baselines, rivals, headline and claims.",
    )
    parser.add_argument(
        "--prices",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="Price every run again, in seconds per token: an axis “priced seconds” of the envelope for each YAML "
        "file, see recipes/prices/; repeatable. Default with --report RESULTS_JSON: the lists stored in it.",
    )
    parser.add_argument(
        "--join",
        metavar="LABEL=RESULTS_JSON",
        help="With --report: a second envelope, over the baselines of this grid and of another one on the same "
        "tasks, for example with another batch size. LABEL marks the other grid's strategies.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Folder for results.html, results.md, results.json and results/*.png. Default: the grid's folder.",
    )
    return parser


def run_compare(argv: Sequence[str]) -> int:
    """Run `effopd compare`."""
    arguments = build_parser().parse_args(list(argv))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)  # a file would get 80 columns
    if arguments.plan is None and arguments.report is None:
        raise ConfigError("expected either a plan to run, or --report with a grid's folder or a results.json.")
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    prices = read_prices(arguments.prices)
    if arguments.join is not None and arguments.report is None:
        raise ConfigError(f"--join {arguments.join}: needs --report. Run the plan first, then join the other grid.")
    if arguments.report is not None:
        if arguments.only:
            raise ConfigError("--only needs a plan. Leave it out: a report shows all finished runs.")
        if arguments.runs_from:
            raise ConfigError("--runs_from needs a plan. Leave it out: the grid's folder already holds these runs.")
        plan = None if arguments.plan is None else load_grid(arguments.plan)
        return _report(arguments.report, arguments.out, console, prices, plan, arguments.join)
    grid = load_grid(arguments.plan, workers=arguments.workers)
    check_writable(Path(grid.output_dir), "output_dir")
    entries = read_entries(grid, arguments.runs_from) or saved_entries(grid)
    to_make = runs_to_make(grid, sources(grid, entries))
    runs = matching(grid, to_make, arguments.only)
    finished = {run.path: run for run in grid.runs() if is_done(run)}
    pending = [run for run in runs if run.path not in finished]
    for _, error in faults(pending):
        raise error
    check_same_content(list(finished.values()))
    if pending:
        check_unchanged_teachers(list(finished.values()))
    for remark in uneven_evaluations(grid):
        console.print(escape(remark), highlight=False)
    if arguments.dry_run:
        console.print(grid_table(grid, runs))
        chosen = {run.path for run in runs}
        for remark in remarks(run for run in to_make if run.path not in chosen and not (run.path / DONE).is_file()):
            console.print(escape(remark), highlight=False)
        return 0
    with only_one(Path(grid.output_dir)) as lock, _terminated_like_interrupted():
        done = {run.path for run in runs if is_done(run)}
        text = Path(arguments.plan).read_text()
        if arguments.workers is not None:
            text = yaml.safe_dump(yaml.safe_load(text) | {"workers": grid.workers}, sort_keys=False)
        write_atomically(Path(grid.output_dir) / PLAN, lambda path: path.write_text(text))
        if arguments.runs_from:
            save_entries(grid, entries)
        failed = _run(grid, [run for run in runs if run.path not in done], len(done), console, lock)
    for run in failed:
        console.print(f"[red]failed:[/red] {escape(run.name)}: {escape(failure_of(run) or 'stopped')}")
        console.print(f"        full log: {run.path / LOG}", highlight=False)
    _report(Path(grid.output_dir), arguments.out, console, prices)
    return 1 if failed else 0


def matching(grid: Grid, runs: Sequence[PlannedRun], patterns: Sequence[str]) -> list[PlannedRun]:
    """Runs whose folder below the grid's matches a pattern, in the order of the patterns.

    Without patterns, all runs.

    Raises:
        ConfigError: a pattern matches no run of the plan.
    """
    folders = {run.path: run.path.relative_to(grid.output_dir).as_posix() for run in grid.runs()}
    chosen: dict[Path, PlannedRun] = {}
    for pattern in patterns:
        if not any(fnmatch(folder, pattern) for folder in folders.values()):
            raise ConfigError(
                f"--only {pattern}: expected a pattern of the plan's runs, such as {next(iter(folders.values()))}; "
                "none matches. Put it in quotes."
            )
        chosen |= {run.path: run for run in runs if fnmatch(folders[run.path], pattern) and run.path not in chosen}
    return list(chosen.values()) if patterns else list(runs)


def distinct(runs: Iterable[PlannedRun]) -> Iterator[PlannedRun]:
    """Runs to check: the first of each configuration, and the first of each seed.

    Two runs have the same configuration if they differ only in their seeds and folder. Runs of an
    arm differ in more if they have other learning rates, or texts with `{seed}`.
    """
    seen: set[str] = set()
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key not in _OF_A_SEED}
        searches = isinstance(settings.get("effopd"), Mapping)
        if searches:
            settings["effopd"] = {key: value for key, value in settings["effopd"].items() if key != "seed"}
        keys = {json.dumps(settings, sort_keys=True, default=str), f"seed {run.seed!r} {searches}"}
        if keys - seen:
            seen |= keys
            yield run


#: Settings of a run that follow from its seed and place.
_OF_A_SEED = ("seed", "task_seed", "output_dir")


def faults(runs: Iterable[PlannedRun]) -> Iterator[tuple[PlannedRun, ConfigError]]:
    """Check each distinct configuration; yield the faulty runs, at most one per task and strategy.

    A run is faulty if a setting is unknown or out of range, if a model, a file of prompts, stored
    rollouts or a package is missing, if a step takes more than `train_size` prompts, or if it does
    not evaluate at the start.
    """
    passed: set[tuple[str, str]] = set()
    faulty: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        for run in distinct(runs):
            arm = (run.task, run.strategy)
            if arm in faulty:
                continue
            error = _fault(run, Path(folder) / "run.yaml")
            if error is None:
                passed.add(arm)
                continue
            faulty.add(arm)
            place = f"strategy '{run.strategy}', task '{run.task}'"
            if arm in passed:  # the fault is not that of the whole arm
                place += f", learning rate {run.learning_rate:.3g}, seed {run.seed}"
            fault = ConfigError(f"{place}: {error}")
            fault.__cause__ = error
            yield run, fault


def _fault(run: PlannedRun, path: Path) -> EffOPDError | None:
    """The error of a run's settings, which are written to `path`; `None` if they pass."""
    from effopd.commands.train import parse_train
    from effopd.distill.offline_store import RolloutStore
    from effopd.launch.host_settings import check_unread
    from effopd.launch.offline import check_offline_settings
    from effopd.launch.opd import check_step, model_names
    from effopd.launch.optimizer_checks import check_copies, check_optimizer
    from effopd.launch.preflight import check_model_name
    from effopd.tasks import check_packages, check_sources

    path.write_text(yaml.safe_dump(run.settings))
    try:
        settings = parse_train(["--config", str(path)])
        check_packages(settings.task)
        check_sources(settings.task)
        for flag, name in model_names(settings).items():
            check_model_name(flag, name)
        check_unread(settings.model, settings.opd)
        check_optimizer(settings.opd)
        if settings.effopd.enabled:
            check_copies(settings.opd, lora=settings.model.use_peft)
        check_offline_settings(settings.opd, settings.effopd)
        if settings.task.train_size is not None and settings.opd.rollouts is None:
            check_step(settings.opd, settings.task.train_size)
        if settings.opd.traces is not None:
            RolloutStore(settings.opd.traces).header()
    except EffOPDError as error:
        return error
    if settings.opd.eval_strategy == "no" or not settings.opd.eval_on_start:
        return ConfigError(
            "the plan's base must evaluate, because time-to-target is read off the evaluations. "
            "Set eval_strategy: steps, eval_steps: N, eval_on_start: true."
        )
    return None


def remarks(others: Iterable[PlannedRun]) -> list[str]:
    """One line per fault of runs that `--only` leaves out; each names its tasks and strategies."""
    places: dict[str, list[str]] = {}
    for run, error in faults(others):
        places.setdefault(str(error.__cause__ or error), []).append(f"{run.task} {run.strategy}")
    return [f"Left out by --only, and cannot run yet ({', '.join(each)}): {text}" for text, each in places.items()]


def grid_table(grid: Grid, to_make: Sequence[PlannedRun]) -> Table:
    """Table of a dry run: per strategy its settings and the numbers of runs planned and done."""
    planned = grid.runs()
    table = Table(
        title=f"{len(planned)} runs into {grid.output_dir}: {len(grid.tasks)} task(s), {len(grid.seeds)} seed(s), "
        f"{grid.workers} at a time" + (f"; {len(to_make)} to run here" if len(to_make) != len(planned) else ""),
        box=box.SIMPLE,
        pad_edge=False,
    )
    for name in ("strategy", "learning rates", "runs", "to run here", "done", "own settings"):
        table.add_column(name)
    for strategy, settings in grid.strategies.items():
        runs = [run for run in planned if run.strategy == strategy]
        made_here = [run for run in to_make if run.strategy == strategy]
        rates = sorted({run.learning_rate for run in runs})
        table.add_row(
            strategy,
            ", ".join(f"{rate:.3g}" for rate in rates),
            str(len(runs)),
            str(len(made_here)),
            str(sum(is_done(run) for run in made_here)),
            escape(json.dumps(run_settings(settings))),
        )
    return table


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Handle SIGTERM (batch systems, `kill`) like Ctrl-C, so that no child run is left behind."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(grid: Grid, pending: list[PlannedRun], done: int, console: Console, lock: int) -> list[PlannedRun]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    start, total, ended = time.monotonic(), len(pending) + done, done
    with Progress(*columns, console=console, speed_estimate_period=36000) as progress:
        bar = progress.add_task("compare", total=total, completed=done)

        def report(event: str, run: PlannedRun) -> None:
            nonlocal ended
            if event in ("start", "running"):
                how_far = f": {progress_of(run)}" if event == "running" else ""
                progress.console.print(f"{event:<7} {escape(run.name)}{how_far}", highlight=False)
                return
            ended += 1
            left = time_left(time.monotonic() - start, ended - done, total - ended)
            how_far = "" if console.is_terminal else f"  ({ended}/{total}, about {spoken_time(left)} left)"
            progress.console.print(f"{event:<7} {escape(run.name)}{how_far}", highlight=False)
            progress.advance(bar)

        return Runner(grid, report, lock).run(pending)


def _read_results(path: Path, option: str = "--report") -> dict[str, Any]:
    """Content of a results.json.

    Raises:
        ConfigError: the file is not a results.json of `effopd compare`.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ConfigError(
            f"{option} {path}: expected a results.json of `effopd compare`; the file is not JSON ({error})."
        ) from error
    missing = [name for name in ("settings", "runs") if not isinstance(results, dict) or name not in results]
    if missing:
        raise ConfigError(
            f"{option} {path}: expected a results.json of `effopd compare`; it has no {', '.join(missing)}."
        )
    return results


def _read_join(text: str) -> tuple[str, dict[str, Any]]:
    """Label and content of `LABEL=RESULTS_JSON`.

    Raises:
        ConfigError: the text or the file has another form.
    """
    label, equals, path = text.partition("=")
    if not (label.strip() and equals and Path(path).is_file()):
        raise ConfigError(
            f"--join {text}: expected LABEL=RESULTS_JSON, such as '32 prompts=docs/ablation/results.json'."
        )
    return label.strip(), _read_results(Path(path), "--join")


def _report(
    source: Path,
    out: Path | None,
    console: Console,
    prices: Sequence[PriceList] = (),
    plan: Grid | None = None,
    join: str | None = None,
) -> int:
    other = None if join is None else _read_join(join)
    if source.is_file():
        results, folder = _read_results(source), out or source.parent
        if plan is not None:
            results = with_roles(results, plan, source)
    else:
        if plan is not None:
            raise ConfigError(f"--report {source}: a grid's folder holds its own plan. Leave the plan argument out.")
        results, folder = collect(source), out or source
    folder.mkdir(parents=True, exist_ok=True)
    results |= gate_results(folder) | envelopes(results, prices, other)
    write_atomically(folder / RESULTS, lambda path: path.write_text(json.dumps(results, allow_nan=False) + "\n"))
    figures: dict[str, Path] = {}
    if is_available("matplotlib"):
        from effopd.report.compare_figures import draw

        figures = draw(results, folder / FIGURES)
    page = render(results, {name: str(path.relative_to(folder)) for name, path in figures.items()})
    write_atomically(folder / PAGE, lambda path: path.write_text(page))
    write_compare_page(results, folder / HTML, folder / RESULTS)
    for table in summary_tables(results):
        console.print(table)
    files = [folder / name for name in (HTML, PAGE, RESULTS)]
    console.print(f"results: {', '.join(map(str, files))}" + (f", {folder / FIGURES}/" if figures else ""))
    return 0
