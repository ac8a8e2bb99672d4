"""Entry point of the command line, with all `effopd` commands.

Flags follow TRL: every field of the config dataclasses is a flag, `--config file.yaml` sets any of
them, and flags on the command line take precedence. Look-ahead settings are written
`--effopd.FIELD`, or as an `effopd:` block in YAML. Each command imports the heavy libraries it
needs, and `help_cache` stores rendered help texts, so `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from effopd import __version__
from effopd.commands.help_cache import asks_for_help, help_text
from effopd.common.plugins import load_plugins, plugins
from effopd.errors import EffOPDError

#: Exit status if the reader of the output is gone: that of a process ended by SIGPIPE.
_UNREAD = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 2 after an `EffOPDError`, 130 after Ctrl-C, 141 if the reader of the output is gone, as
    after `| head`, and 143 after a clean stop by SIGTERM. Plugins of other packages are imported
    first (`common.plugins`).
    """
    status = 0
    try:
        try:
            status = _main(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich has redirected the output and exits with 1
                return _UNREAD
            _flush()  # a help text of argparse
            raise
        _flush()
        return status
    except BrokenPipeError:
        if not _redirect_unread():
            raise
        return status or _UNREAD


def _flush() -> None:
    """Write what is still buffered, because an error in the flush at exit cannot be handled."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _redirect_unread() -> bool:
    """Redirect standard output and error to the null device if they are pipes without a reader.

    Returns:
        whether one of them is; otherwise another pipe is broken.
    """
    unread = False
    for stream, probe in ((sys.stdout, "\n"), (sys.stderr, "")):  # a flush tells nothing if the buffer is empty
        try:
            print(end=probe, file=stream, flush=True)
        except BrokenPipeError:
            unread = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # for the flush at exit
            os.close(null)
    return unread


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="effopd",
        description="On-policy distillation with look-ahead along the weight update.",
        epilog="Help on a command: `effopd COMMAND --help`. Start with `effopd quickstart`.",
    )
    parser.add_argument("--version", action="version", version=f"effopd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if arguments and arguments[0] in COMMANDS:
        try:
            return _run(arguments[0], arguments[1:])
        except EffOPDError as error:
            from effopd.tasks.builtin_models import with_spoken_names

            message = with_spoken_names(_with_flags(str(error)))
            print(f"effopd {arguments[0]}: {type(error).__name__}: {message}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"effopd {arguments[0]}: interrupted", file=sys.stderr)
            return 130
    if arguments and not arguments[0].startswith("-"):
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        parser.error(f"unknown command {arguments[0]!r}.{hint} Expected one of {', '.join(COMMANDS)}.")
    parser.parse_args(arguments)
    return 2


def _run(command: str, argv: Sequence[str]) -> int:
    run = partial(COMMANDS[command][0], argv)
    if command != "doctor":  # which reports faulty plugins
        load_plugins()
    if command in _SLOW and asks_for_help(argv) and not plugins():  # the source of plugins can change
        print(help_text((command, *argv), run), end="")
        sys.exit(0)  # as argparse does
    return run()


def _with_flags(message: str) -> str:
    """Add the flag to each field of `EffOPDConfig` in a message."""
    return re.sub(r"EffOPDConfig\.(\w+)", r"EffOPDConfig.\1 (--effopd.\1)", message)


# -- train -----------------------------------------------------------------------------------------


def train(argv: Sequence[str]) -> int:
    """Run `effopd train`."""
    from effopd.commands.train import parse_command
    from effopd.launch.opd import run
    from effopd.runs.console import quiet_hosts

    settings, dry_run = parse_command(argv)
    if dry_run:
        from effopd.launch.dry_run import plan_tables, print_plan

        print_plan(plan_tables(settings))
        return 0
    with quiet_hosts(bars=not settings.opd.disable_tqdm):
        trainer = run(settings)
    return _finish(trainer)


def _finish(trainer: Any) -> int:
    """Print the location of the results on rank 0 and return the exit status of the run.

    The status is that of a process ended by SIGTERM if this signal stopped the run before its last
    step, so that scripts and `effopd compare` do not take the run for a finished one.
    """
    from effopd.common.distributed import exit_gloo
    from effopd.runs.lines import closing_lines

    state, status = trainer.state, 128 + signal.SIGTERM if trainer.terminated else 0
    if trainer.is_world_process_zero():
        unfinished_of = state.max_steps if trainer.terminated else None
        print(f"\n{closing_lines(trainer.run_dir.root, state.global_step, trainer.costs, unfinished_of)}")
    exit_gloo(status)
    return status


# -- cache -----------------------------------------------------------------------------------------


def cache(argv: Sequence[str]) -> int:
    """Run `effopd cache`."""
    from effopd.commands.cache import run_cache

    return run_cache(argv)


# -- rl --------------------------------------------------------------------------------------------


def rl(argv: Sequence[str]) -> int:
    """Run `effopd rl`."""
    from effopd.commands.rl import parse_command
    from effopd.launch.rl import run_rl
    from effopd.runs.console import quiet_hosts

    settings, dry_run = parse_command(argv)
    if dry_run:
        from effopd.launch.dry_run import print_plan
        from effopd.launch.rl_dry_run import rl_plan_tables

        print_plan(rl_plan_tables(settings))
        return 0
    with quiet_hosts(bars=not settings.rl.disable_tqdm):
        trainer = run_rl(settings)
    return _finish(trainer)


# -- eval ------------------------------------------------------------------------------------------


def eval_(argv: Sequence[str]) -> int:
    """Run `effopd eval`."""
    from effopd.commands.evaluate import run_eval

    return run_eval(argv)


# -- report ----------------------------------------------------------------------------------------


def report(argv: Sequence[str]) -> int:
    """Run `effopd report`."""
    from effopd.commands.report import run_report

    return run_report(argv)


# -- methods ---------------------------------------------------------------------------------------


def methods(argv: Sequence[str]) -> int:
    """Run `effopd methods`."""
    from effopd.commands.methods import run_methods

    return run_methods(argv)


# -- init and doctor -------------------------------------------------------------------------------


def init(argv: Sequence[str]) -> int:
    """Run `effopd init`."""
    from effopd.commands.init import run_init

    return run_init(argv)


def doctor(argv: Sequence[str]) -> int:
    """Run `effopd doctor`."""
    from effopd.commands.doctor import run_doctor

    return run_doctor(argv)


# -- compare ---------------------------------------------------------------------------------------


def compare(argv: Sequence[str]) -> int:
    """Run `effopd compare`."""
    from effopd.commands.compare import run_compare

    return run_compare(argv)


# -- analyze and intervene -------------------------------------------------------------------------


def analyze(argv: Sequence[str]) -> int:
    """Run `effopd analyze`."""
    from effopd.commands.analyze import run_analyze

    return run_analyze(argv)


def intervene(argv: Sequence[str]) -> int:
    """Run `effopd intervene`."""
    from effopd.commands.intervene import run_intervene

    return run_intervene(argv)


# -- quickstart and testbed ------------------------------------------------------------------------


def quickstart(argv: Sequence[str]) -> int:
    """Run `effopd quickstart`."""
    if not asks_for_help(argv):  # the import takes seconds
        print("effopd quickstart: plain OPD, EffOPD and newton_search on a small built-in model", flush=True)
    from effopd.commands.quickstart import run_quickstart

    return run_quickstart(argv)


def testbed(argv: Sequence[str]) -> int:
    """Run `effopd testbed`."""
    from effopd.commands.testbed import run_testbed

    return run_testbed(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "quickstart": (
        quickstart,
        "run plain OPD, EffOPD and newton_search on the built-in testbed; print net speed-ups",
    ),
    "init": (init, "write a commented YAML for your student, teacher and data, and dry-run it"),
    "train": (train, "distill a teacher into a student"),
    "cache": (cache, "sample rollouts once and store them, for training without a teacher in memory"),
    "rl": (rl, "train a model on a task with reinforcement learning: GRPO, DAPO, RLOO, dGRPO"),
    "eval": (eval_, "measure a model's accuracy on a task: avg@n, pass@k, confidence interval"),
    "methods": (methods, "list all training methods: paper, flags, what each optimizes and needs"),
    "report": (report, "draw one or more runs as an HTML page: KL, accuracy, searches, costs"),
    "compare": (compare, "compare strategies × learning rates × seeds × tasks: net speed-ups with intervals"),
    "analyze": (analyze, "measure weight updates: size, location, directions; RL against OPD"),
    "intervene": (intervene, "test which part of an update carries the gain: edit the weights, evaluate"),
    "doctor": (doctor, "show versions, devices, optional packages and what works here, for an issue"),
    "testbed": (testbed, "fetch SmolLM2-135M, a pre-trained model; rebuild the built-in student and teacher"),
}

#: Commands whose flags take seconds to import; their help is cached.
_SLOW = ("quickstart", "train", "cache", "rl", "eval", "analyze", "intervene")

if __name__ == "__main__":
    sys.exit(main())
