"""`effopd analyze`: measure weight updates, print a summary, write tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from effopd.analysis.analyze import SUMMARY, Analysis, execute
from effopd.analysis.measure import GROUPS
from effopd.analysis.plan import AnalysisPlan, labeled, prepare
from effopd.common.optional import is_available
from effopd.common.progress import Counted
from effopd.errors import ConfigError
from effopd.report.compare_lookup import Table as Cells
from effopd.report.dynamics_figures import draw
from effopd.report.dynamics_page import PAGE, write_analysis_page
from effopd.report.dynamics_tables import legend, metrics_table, modules_table
from effopd.tasks.builtin_models import resolve_model

_EXAMPLE = """\
written to --out:
  matrices, subspaces, directions, embeddings   tables, .parquet and .csv
  summary.json                                  means with 95 % intervals, settings, versions
  report.html                                   page with a summary, tables and interactive figures
  figures/*.png                                 needs matplotlib: pip install 'effopd[plots]'

examples:
  effopd analyze --base testbed:student --trained rl=testbed:teacher --out runs/analysis
  effopd analyze --base BASE --trained opd=runs/opd-0 --trained opd=runs/opd-1 --trained rl=runs/rl --out OUT

A trained path is a checkpoint, a LoRA adapter, or a run directory whose trajectory/ is analyzed over training.
Repeat a label for further seeds. Repeat the command to resume an interrupted analysis.
"""


def analyze_parser() -> argparse.ArgumentParser:
    """The parser of `effopd analyze`."""
    parser = argparse.ArgumentParser(
        prog="effopd analyze",
        description="Measure weight updates: their size, their location and their directions.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", required=True, metavar="DIR", help="checkpoint before training, for example testbed:student")
    add(
        "--trained",
        required=True,
        action="extend",
        nargs="+",
        metavar="LABEL=DIR",
        help="trained checkpoint, adapter or run directory, with a label such as opd or rl; repeatable",
    )
    add("--out", required=True, metavar="DIR", help="new or empty folder, or the folder of an analysis to resume")
    add(
        "--k",
        type=int,
        default=20,
        help="number of leading singular directions per update (default: 20, as in the paper)",
    )
    add(
        "--steps",
        nargs="+",
        metavar="STEP",
        help="steps of the trajectory snapshots, for example 1,2,8 (default: all)",
    )
    add("--device", help="cpu, cuda, … (default: the accelerator if available, otherwise cpu)")
    add(
        "--metrics",
        nargs="+",
        metavar="GROUP",
        help=f"groups of metrics to measure: {','.join(GROUPS)} (default: all)",
    )
    add("--base_spectrum", action="store_true", help="also compare all singular values of W0 and W_T (slow)")
    add("--seed", type=int, default=0, help="seed of random walks, figures and bootstrap (default: 0)")
    return parser


def run_analyze(argv: Sequence[str]) -> int:
    """Run `effopd analyze`: parse, check everything, measure, draw and print."""
    arguments = analyze_parser().parse_args(list(argv))
    plan = plan_of(arguments)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    parts, snapshots, runs = (
        _count(n, word)
        for n, word in ((len(plan.parts), "tensor"), (plan.snapshots, "snapshot"), (len(plan.runs), "run"))
    )
    console.print(f"{parts} (fused tensors split), {snapshots} of {runs}, on {plan.options.device}")
    with _Bar() as bar:
        analysis = execute(plan, bar)
    show(analysis, console)
    if is_available("matplotlib"):
        figures = draw(analysis.out)
        console.print(
            f"figures: {escape(str(analysis.out / 'figures'))}  ({', '.join(path.stem for path in figures)})"
        )
    else:
        missing = "figures: skipped, matplotlib is missing (pip install 'effopd[plots]', then repeat the command)"
        console.print(escape(missing))
    console.print(f"page:    {escape(str(write_analysis_page(analysis.out, analysis.out / PAGE)))}")
    return 0


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def plan_of(arguments: argparse.Namespace) -> AnalysisPlan:
    """Checked plan of the analysis that the flags describe. Nothing is written.

    Raises:
        ConfigError: a flag is invalid.
        CheckpointError, WeightsError: a checkpoint cannot be analyzed.
    """
    trained = {
        label: [str(resolve_model(path)) for path in paths] for label, paths in labeled(arguments.trained).items()
    }
    if not 0 <= arguments.seed < 2**32:
        raise ConfigError(f"--seed: expected a whole number from 0 to 2^32 - 1, got {arguments.seed}.")
    return prepare(
        str(resolve_model(arguments.base)),
        trained,
        arguments.out,
        k=arguments.k,
        steps=_steps(arguments.steps),
        device=arguments.device,
        metrics=_words(arguments.metrics) if arguments.metrics else GROUPS,
        base_spectrum=arguments.base_spectrum,
        seed=arguments.seed,
    )


def _words(values: Sequence[str]) -> list[str]:
    return [word for value in values for word in value.split(",") if word]


def _steps(values: Sequence[str] | None) -> list[int] | None:
    if values is None:
        return None
    words = _words(values)
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--steps: expected whole numbers such as 1,2,8, got {' '.join(values)!r}.")
    return sorted({int(word) for word in words})


class _Bar:
    """Progress bar that starts at the matrices an interrupted analysis finished."""

    def __init__(self) -> None:
        self._bar: Counted | None = None
        self._done = 0

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, done: int, total: int, share: float) -> None:
        if self._bar is None:
            self._bar = Counted(total, "analyze", "matrix", done=done, share=share)
        else:
            self._bar.update(done - self._done, share)
        self._done = done

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.__exit__()


# -- printing --------------------------------------------------------------------------------------


def show(analysis: Analysis, console: Console) -> None:
    """Print the summary as two tables, its notes, and the paths of the files."""
    summary = analysis.summary
    parts = summary["parts"]["averaged"]
    title = f"final updates: mean over {parts} attention and MLP matrices [95 %]"
    console.print(_printed(metrics_table(summary), title))
    for sentence in legend(summary):
        console.print(escape(sentence))
    console.print(_printed(modules_table(summary), "share of the update's squared norm by module"))
    for note in summary["notes"]:
        console.print(escape(f"note: {note}"))
    tables = ", ".join(analysis.tables)
    console.print(f"summary: {escape(str(analysis.out / SUMMARY))}")
    console.print(f"tables:  {escape(str(analysis.out))}  ({tables}; each .parquet and .csv)")


def _printed(cells: Cells, title: str) -> Table:
    """A table of the terminal; numbers are aligned to the right."""
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for i, name in enumerate(cells.header):
        table.add_column(escape(name), justify="left" if i == 0 or name == "larger" else "right", no_wrap=True)
    for row in cells.rows:
        table.add_row(*map(escape, row))
    return table
