"""`effopd quickstart`: plain OPD, EffOPD and newton_search compared on the built-in testbed.

All runs share seed and prompts and use the code of `effopd train`. `make demo` runs it.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers
from rich.console import Console
from transformers import PrinterCallback

from effopd.commands.parser import CommandParser, OneSpelling, parsed
from effopd.commands.quickstart_progress import Bar, Lines, Watch, bars
from effopd.commands.quickstart_results import conclude
from effopd.commands.quickstart_settings import ARMS, FAST, FULL, QuickstartArguments, settings
from effopd.errors import ConfigError
from effopd.launch.opd import build_trainer

#: Files and folders that a finished or interrupted demo leaves in its folder.
_OWN = {*ARMS, "summary.json", "figure.png", "report.html", ".summary.json.tmp", ".report.html.tmp"}


def run_quickstart(argv: Sequence[str]) -> int:
    """Run `effopd quickstart`: all runs, their comparison, the table."""
    parser = CommandParser(
        [QuickstartArguments],
        prog="effopd quickstart",
        description="Run plain OPD, the paper's EffOPD and this package's newton_search on the built-in testbed with "
        "the same seed and prompts. Print the net speed-ups.",
        formatter_class=OneSpelling,
    )
    (arguments,) = parsed(parser, argv)
    quiet()
    console = Console(soft_wrap=True)
    root = Path(arguments.output_dir)
    root = root.resolve() if ".." in root.parts else root  # its last part is its name
    for arm in ARMS:
        settings(arm, arguments, root / arm)  # wrong ones end here, before anything is renamed
    _move_aside(root, console)
    console.print(introduction(arguments, root), highlight=False, markup=False)
    if console.is_terminal:
        with bars(console) as progress:
            tasks = {arm: progress.add_task(label, total=arguments.max_steps) for arm, label in ARMS.items()}
            for arm in ARMS:
                _run_arm(arm, arguments, root / arm, Bar(progress, tasks[arm]))
    else:
        start = time.monotonic()
        for i, arm in enumerate(ARMS):
            _run_arm(arm, arguments, root / arm, Lines(ARMS[arm], i, arguments.max_steps, start, console))
    conclude(root, arguments, console)
    console.print(NEXT, highlight=False, markup=False)
    return 0


def introduction(arguments: QuickstartArguments, root: Path) -> str:
    """What the demo does, how long it takes, and where the results go."""
    used = {name: getattr(arguments, name) for name in FULL}
    duration = "about 3 minutes" if used == FULL else "under a minute" if used == FAST else ""
    takes = f"This takes {duration} on 2 CPU cores and downloads" if duration else "This downloads"
    return (
        f"Trains the built-in student on testbed:{arguments.family} {len(ARMS)} times, {arguments.max_steps} steps "
        f"each: {', '.join(ARMS.values())}.\n{takes} nothing. Results: {root}"
    )


#: What to do after the demo.
NEXT = """
Next, with your own models and data:
  effopd init                        # three questions; writes opd.yaml and checks it
  effopd train --config opd.yaml     # trains; rows and model in runs/opd
  effopd report runs/opd             # draws an HTML page of the run"""


def quiet() -> None:
    """Silence the libraries' progress bars and messages below errors; the demo shows its own."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _move_aside(root: Path, console: Console) -> None:
    """Rename the folder of an earlier demo.

    Raises:
        ConfigError: the path is not a folder, holds other files, or contains the working directory.
    """
    if root.exists() and not root.is_dir():
        raise ConfigError(f"--output_dir {root} is a file: expected a folder or a new path.")
    held = {path.name for path in root.iterdir()} if root.exists() else set()
    held.discard(".DS_Store")  # written by the macOS Finder
    others = sorted(held - _OWN) or sorted(held if "plain" not in held else ())
    if others:
        raise ConfigError(
            f"--output_dir {root} holds {', '.join(others[:3])}{', …' if len(others) > 3 else ''}, which "
            "is not from a demo: expected a new or empty folder, or one of an earlier demo. Choose another "
            f"folder, such as {root / 'demo'}. Nothing was changed."
        )
    if held:
        if Path.cwd().is_relative_to(root.resolve()):
            raise ConfigError(
                f"--output_dir {root} holds an earlier demo and cannot be renamed because it is, or contains, the "
                "working directory. Choose another folder, or change the working directory."
            )
        renamed = root.with_name(f"{root.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(root.stat().st_mtime))}")
        root.rename(renamed)
        console.print(f"an earlier demo was kept as {renamed}")


def _run_arm(arm: str, arguments: QuickstartArguments, output_dir: Path, display: Bar | Lines) -> None:
    trainer = build_trainer(settings(arm, arguments, output_dir))
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if not isinstance(callback, PrinterCallback)
    ]
    trainer.add_callback(Watch(display))
    trainer.train()
