"""`effopd report`: an HTML page about one run, or about several runs on the same axes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from effopd.common.files import check_writable
from effopd.errors import ConfigError
from effopd.report.run_data import check_is_folder
from effopd.report.run_page import write_run_page

PAGE = "report.html"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `effopd report`."""
    parser = argparse.ArgumentParser(
        prog="effopd report",
        description="Draw run directories of `effopd train` or `effopd rl` as one self-contained HTML page: held-out\n"
        "KL and accuracy against steps and net seconds, every search along its ray, costs by phase, and logged\n"
        "metrics. Runs in progress and killed runs work too.",
        epilog="Examples:\n"
        "  effopd report runs/first                             # write runs/first/report.html\n"
        "  effopd report runs/plain runs/first --out both.html  # two runs on the same axes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run directories.")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"Path of the page. Default: {PAGE} in the run directory; for several runs, in the working directory.",
    )
    return parser


def run_report(argv: Sequence[str]) -> int:
    """Run `effopd report`."""
    arguments = build_parser().parse_args(list(argv))
    if arguments.out is not None and arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out}: expected a file, got a folder. Write --out {arguments.out / PAGE}.")
    for root in arguments.runs:
        check_is_folder(root)
    out = arguments.out or (arguments.runs[0] / PAGE if len(arguments.runs) == 1 else Path(PAGE))
    check_writable(out.parent, "--out")
    print(write_run_page(arguments.runs, out))
    return 0
