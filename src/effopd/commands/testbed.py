"""`effopd testbed build`: rebuild the built-in student, teacher and tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from effopd.errors import ConfigError


def run_testbed(argv: Sequence[str]) -> int:
    """Run `effopd testbed`: parse and build."""
    parser = argparse.ArgumentParser(
        prog="effopd testbed",
        description="Rebuild the testbed's student, teacher and tokenizer (under 30 minutes on 2 CPU cores).",
        epilog="Example: effopd testbed build --output_dir runs/testbed",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="run the recipe", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    build.add_argument(
        "--output_dir", default="runs/testbed", help="folder for student/, teacher/, card.json, build.log"
    )
    build.add_argument("--seed", type=int, default=0, help="seed; 0 rebuilds the pair that ships with the package")
    arguments = parser.parse_args(argv)
    out = Path(arguments.output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir {out} is a file: expected a folder or a new path.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--output_dir {out} is not empty; choose another folder. Nothing was changed.")
    from effopd.testbed.recipe import build as run_recipe

    card = run_recipe(out, seed=arguments.seed)
    print(f"student, teacher and card.json are in {out} ({card['parameters']:,} parameters each)")
    return 0
