"""`effopd methods`: a table of all training methods with their papers, flags and needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from effopd.distill.methods import KINDS, METHODS, NEEDS, Method


def build_parser() -> argparse.ArgumentParser:
    """The parser of `effopd methods`."""
    parser = argparse.ArgumentParser(
        prog="effopd methods",
        description="List the training methods of this package: paper, flags, what each optimizes, and what it needs.",
        epilog="Examples:\n"
        "  effopd methods                          # all methods\n"
        "  effopd methods --kind objective         # one kind\n"
        "  effopd methods --without answers        # methods that need no answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=KINDS, help="Only methods of this kind.")
    parser.add_argument(
        "--without", choices=NEEDS, action="append", default=[], metavar="NEED",
        help=f"Only methods that do not need this; repeatable. One of: {', '.join(NEEDS)}.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    return parser


def chosen(kind: str | None, without: Iterable[str]) -> list[Method]:
    """Methods of `kind` (`None`: all) that need nothing of `without`."""
    return [
        method for method in METHODS if kind in (None, method.kind) and not set(without) & set(method.needs)
    ]  # fmt: skip


def table_of(methods: Sequence[Method]) -> Table:
    """The methods as a table, one row each, with a line between kinds."""
    table = Table(*("method", "paper", "needs", "objective", "signal", "dynamics", "on-policy", "flags"))
    for before, method in zip([None, *methods], methods, strict=False):
        if before is not None and before.kind != method.kind:
            table.add_section()
        table.add_row(
            method.name, method.paper or "here", ", ".join(method.needs) or "–", method.objective, method.signal,
            method.dynamics or "–", "yes" if method.on_policy else "no", method.flags.replace("[", "\\["),
        )  # fmt: skip
    return table


def run_methods(argv: Sequence[str]) -> int:
    """Run `effopd methods`."""
    arguments = build_parser().parse_args(list(argv))
    methods = chosen(arguments.kind, arguments.without)
    if arguments.json:
        print(json.dumps([asdict(method) for method in methods], ensure_ascii=False, indent=2))
        return 0
    console = Console()
    (console if console.is_terminal else Console(width=190)).print(table_of(methods))
    return 0
