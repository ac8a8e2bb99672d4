"""`effopd testbed build`: the recipe as a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from effopd.errors import ConfigError


def run_testbed(argv: Sequence[str]) -> int:
    """Parse and build."""
    parser = argparse.ArgumentParser(
        prog="effopd testbed",
        description="Make the testbed's student, teacher and tokenizer from nothing (2 CPU cores, under 30 minutes).",
        epilog="Example: effopd testbed build --output_dir runs/testbed",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="run the recipe", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    build.add_argument(
        "--output_dir", default="runs/testbed", help="receives student/, teacher/, card.json, build.log"
    )
    build.add_argument("--seed", type=int, default=0, help="0 makes the pair that ships with the package")
    arguments = parser.parse_args(argv)
    out = Path(arguments.output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir {out} is a file: expected a folder, or a path where there is nothing yet.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--output_dir {out} is not empty; choose another folder (nothing was changed).")
    from effopd.testbed.recipe import build as run_recipe

    card = run_recipe(out, seed=arguments.seed)
    print(f"student, teacher and card.json are in {out} ({card['parameters']:,} parameters each)")
    return 0
