"""`effopd analyze`: measure weight updates, print a summary, write tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from effopd.analysis.analyze import SUMMARY, Analysis, execute
from effopd.analysis.measure import GROUPS
from effopd.analysis.plan import AnalysisPlan, labelled, prepare
from effopd.common.optional import is_available
from effopd.common.progress import Counted
from effopd.errors import ConfigError
from effopd.report.dynamics_figures import draw
from effopd.tasks.builtin_models import resolve_model
from effopd.weights import MODULES

#: Printed metric → (label, format). "%" prints a share as a percentage.
_ROWS = {
    "frobenius_norm": ("update norm per matrix", ".3g"),
    "relative_norm": ("… relative to the matrix", ".2%"),
    "spectral_norm": ("spectral norm s1", ".3g"),
    "spectral_to_frobenius": ("s1 / norm", ".1%"),
    "effective_rank": ("effective rank", ".1f"),
    "effective_rank_noise_floor": ("… of pure rounding noise", ".1f"),
    "top1pct_norm_ratio": ("norm in the top 1 % of directions", ".1%"),
    "early_left_overlap_1": ("early: u1, overlap with final", ".1%"),
    "early_left_overlap_{k}": ("early: top-{k} left, overlap with final", ".1%"),
    "early_right_overlap_{k}": ("early: top-{k} right, overlap with final", ".1%"),
    "u1_evr": ("path of u1: variance in a plane", ".1%"),
    "u1_evr_null_mean": ("… of a random walk", ".1%"),
    "bf16_unchanged_share": ("entries unchanged in bf16", ".1%"),
    "update_density": ("entries changed by more than 0.1 %", ".1%"),
    "low_magnitude_overlap": ("changed entries in W0's smallest 30 %", ".1%"),
    "principal_overlap": ("changed entries in W0's principal 30 %", ".1%"),
    "base_rotation_left_mean_degrees": ("rotation of W0's top-{k}, left (°)", ".2f"),
    "base_rotation_right_mean_degrees": ("rotation of W0's top-{k}, right (°)", ".2f"),
    "base_spectral_shift": ("shift of W0's singular values", ".2%"),
    "rounding_noise_to_update": ("rounding of the files / update", ".2g"),
}
#: Metrics that serve as reference for the line above them.
_YARDSTICKS = ("effective_rank_noise_floor", "u1_evr_null_mean")
_EXAMPLE = """\
written to --out:
  matrices, subspaces, directions, embeddings   tables, .parquet and .csv
  summary.json                                  means with 95 % intervals, settings, versions
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
        label: [str(resolve_model(path)) for path in paths] for label, paths in labelled(arguments.trained).items()
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
    console.print(_metrics_table(summary))
    for sentence in _sentences(summary):
        console.print(escape(sentence))
    console.print(_modules_table(summary))
    for note in summary["notes"]:
        console.print(escape(f"note: {note}"))
    tables = ", ".join(analysis.tables)
    console.print(f"summary: {escape(str(analysis.out / SUMMARY))}")
    console.print(f"tables:  {escape(str(analysis.out))}  ({tables}; each .parquet and .csv)")


def _metrics_table(summary: Mapping[str, Any]) -> Table:
    groups, pair = summary["groups"], _only_pair(summary)
    parts = summary["parts"]["averaged"]
    table = Table(
        title=f"final updates: mean over {parts} attention and MLP matrices [95 %]", box=box.SIMPLE, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for name, group in groups.items():
        table.add_column(escape(_heading(name, group)), justify="right", no_wrap=True)
    if pair:
        table.add_column("larger", no_wrap=True)
    norms = [_estimate(group["update_norm"], ".4g") for group in groups.values()]
    table.add_row("update norm, all parameters", *norms, *([_mark(pair["update_norm"])] if pair else []))
    for metric, name, style in _rows(summary):
        values = [group["metrics"].get(metric) for group in groups.values()]
        if all(value is None or value["mean"] is None for value in values):
            continue
        cells = [_estimate(value, style) for value in values]
        difference = None if not pair or metric in _YARDSTICKS else pair["metrics"].get(metric)
        table.add_row(escape(name), *cells, *([_mark(difference)] if pair else []))
    return table


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, label, format) of the printed lines."""
    k = summary["settings"]["k"]
    rows = {metric.format(k=k): (name.format(k=k), style) for metric, (name, style) in _ROWS.items()}
    return [(metric, name, style) for metric, (name, style) in rows.items()]


def _heading(name: str, group: Mapping[str, Any]) -> str:
    seeds = len(group["runs"])
    return f"{name} ({seeds} seeds)" if seeds > 1 else name


def _estimate(value: Mapping[str, Any] | None, style: str) -> str:
    if value is None or value["mean"] is None:
        return "–"
    text = format(value["mean"], style)
    if value["low"] is None:
        return text
    percent = "" if not style.endswith("%") else "%"
    low, high = (format(value[end], style).removesuffix("%") for end in ("low", "high"))
    return escape(f"{text.removesuffix('%')}{percent} [{low}, {high}]")


def _only_pair(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The difference between the groups if there are exactly two; otherwise `None`."""
    return summary["differences"][0] if len(summary["differences"]) == 1 else None


def _mark(difference: Mapping[str, Any] | None) -> str:
    """Name of the larger group; "·" if the difference is not significant, "" without interval."""
    if difference is None or all(difference.get(over) is None for over in ("over_matrices", "over_seeds")):
        return ""
    return escape(difference["larger"] or "·")


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    """Legend of the brackets and, for three or more groups, the significant differences."""
    over = {name: group["interval_over"] for name, group in summary["groups"].items()}
    kinds = sorted(set(over.values()))
    early = {
        f"{run['group']}: step {path['early_step']} of {path['steps'][-1]}"
        for run in summary["runs"].values()
        if (path := run["trajectory"])
    }
    lines = [f"Brackets: over {kinds[0]}." if len(kinds) == 1 else
             "Brackets: " + ", ".join(f"{name} over {kind}" for name, kind in over.items()) + "."]  # fmt: skip
    if "matrices" in kinds:
        lines[0] += " They do not cover the variation between runs; pass several seeds for that."
    if early:
        lines.append(f"early: the snapshot nearest to 10 % of training ({', '.join(sorted(early))}).")
    if len(summary["differences"]) == 1:
        lines.append("larger: the 95 % interval of the paired difference excludes 0; · means that it does not.")
        return lines
    for pair in summary["differences"]:
        by_side: dict[str | None, list[str]] = {}
        for metric, name, _ in _rows(summary):
            if metric in pair["metrics"] and metric not in _YARDSTICKS:
                by_side.setdefault(pair["metrics"][metric]["larger"], []).append(name.strip("… "))
        for larger, smaller in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
            if by_side.get(larger):
                lines.append(f"{larger} significantly above {smaller}: {'; '.join(by_side[larger])}.")
    return lines


def _modules_table(summary: Mapping[str, Any]) -> Table:
    groups, sizes = summary["groups"], summary["parts"]["modules"]
    total = sum(size["parameters"] for size in sizes.values())
    table = Table(title="share of the update's squared norm by module", box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name, group in groups.items():
        table.add_column(escape(_heading(name, group)), justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for module in (name for name in MODULES if name in sizes):
        size = sizes[module]
        cells = [_estimate(group["modules"][module]["share"], ".1%") for group in groups.values()]
        table.add_row(module, *cells, f"{size['parameters'] / total:.1%}")
    return table
