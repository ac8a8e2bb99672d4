"""`effopd report`: a page about one run, or about several over each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from effopd.report.run_page import write_run_page

PAGE = "report.html"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `effopd report`."""
    parser = argparse.ArgumentParser(
        prog="effopd report",
        description="Draw run directories of `effopd train` or `effopd rl` as one self-contained HTML "
        "page: held-out KL and\n"
        "accuracy against steps and net seconds, every search along its ray, costs by phase, what training logged.\n"
        "Works while a run is going on, and on one that was killed.",
        epilog="Examples:\n"
        "  effopd report runs/first                             # writes runs/first/report.html\n"
        "  effopd report runs/plain runs/first --out both.html  # the same axes for both",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run directories.")
    parser.add_argument(
        "--out", type=Path, help=f"The page. Default: {PAGE} in the run directory, or here if several are given."
    )
    return parser


def run_report(argv: Sequence[str]) -> int:
    """`effopd report`."""
    arguments = build_parser().parse_args(list(argv))
    out = arguments.out or (arguments.runs[0] / PAGE if len(arguments.runs) == 1 else Path(PAGE))
    print(write_run_page(arguments.runs, out))
    return 0
