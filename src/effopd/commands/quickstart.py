"""`effopd quickstart`: plain OPD, EffOPD and line_search compared on the built-in testbed.

All runs share seed and prompts and use the code of `effopd train`. This file defines their
settings, shows progress and compares the results. `make demo` runs it.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl import ModelConfig

from effopd.commands.parser import CommandParser, OneSpelling, parsed
from effopd.common.files import write_atomically
from effopd.common.optional import is_available
from effopd.common.progress import spoken_time, time_left
from effopd.common.versions import versions
from effopd.compare.time_to_target import Cost, final_target, first_reach, speedup_by_gap
from effopd.distill.config import OPDConfig
from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch.opd import RunSettings, build_trainer
from effopd.report.run_figures import quality_figure
from effopd.report.run_page import write_run_page
from effopd.report.style import quiet_style, save
from effopd.runs.lines import held_out
from effopd.runs.records import EvaluationRecord, read_evaluations, read_searches
from effopd.tasks import TaskConfig
from effopd.tasks import builtin_models as testbed

#: Number of training prompts; the runs pass over them several times.
TRAIN_SIZE = 4096
#: Name → label of each run. All but the first use the strategy of that name.
ARMS = {"plain": "plain OPD", "effopd": "EffOPD", "line_search": "line_search"}
AHEAD = tuple(ARMS)[1:]
_WIDTH = max(map(len, ARMS.values())) + 1
#: Defaults of the demo, and of `--fast`, which takes a tenth of the time.
_FULL = {"max_steps": 96, "eval_steps": 2, "eval_size": 256, "prompts_per_step": 256}
_FAST = {"max_steps": 12, "eval_steps": 3, "eval_size": 64, "prompts_per_step": 64}
_UNSET: Any = None
#: Files and folders that a finished or interrupted demo leaves in its folder.
_OWN = {*ARMS, "summary.json", "figure.png", "report.html", ".summary.json.tmp", ".report.html.tmp"}


@dataclass
class QuickstartArguments:
    """Flags of `effopd quickstart`."""

    output_dir: str = field(
        default="runs/demo",
        metadata={
            "help": "Folder for rows, figure and summary.json: new, empty, or from an earlier demo. An earlier "
            "demo's folder is renamed first."
        },
    )
    family: str = field(default="", metadata={"help": "Task family of the testbed. Default: the first."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, sampling and validation prompts in all runs."})
    fast: bool = field(
        default=False,
        metadata={"help": "Take under a minute: fewer and smaller steps, fewer held-out prompts, noisy speed-ups."},
    )
    max_steps: int = field(default=_UNSET, metadata={"help": "Optimizer steps per run. Default: 96; with --fast, 12."})
    eval_steps: int = field(
        default=_UNSET,
        metadata={"help": "Steps between evaluations; their cost is not charged. Default: 2; with --fast, 3."},
    )
    eval_size: int = field(default=_UNSET, metadata={"help": "Held-out prompts. Default: 256; with --fast, 64."})
    prompts_per_step: int = field(default=_UNSET, metadata={"help": "Default: 256; with --fast, 64."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: the testbed's reference learning rate."}
    )
    cost_clock: str = field(
        default="wall",
        metadata={
            "help": "Clock of the net seconds: wall time, or CPU time, which excludes other processes.",
            "choices": ["wall", "cpu"],
        },
    )

    def __post_init__(self) -> None:
        self.family = self.family or next(iter(testbed.FAMILIES))
        if self.family not in testbed.FAMILIES:
            raise ConfigError(f"--family: expected one of {', '.join(testbed.FAMILIES)}; got {self.family!r}.")
        for name, default in (_FAST if self.fast else _FULL).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: expected at least 1, got {getattr(self, name)}.")


def run_quickstart(argv: Sequence[str]) -> int:
    """Run `effopd quickstart`: all runs, their comparison, the table."""
    parser = CommandParser(
        [QuickstartArguments],
        prog="effopd quickstart",
        description="Run plain OPD, the paper's EffOPD and this package's line_search on the built-in testbed with "
        "the same seed and prompts. Print the net speed-ups.",
        formatter_class=OneSpelling,
    )
    (arguments,) = parsed(parser, argv)
    quiet()
    console = Console(soft_wrap=True)
    root = Path(arguments.output_dir)
    root = root.resolve() if ".." in root.parts else root  # its last part is its name
    _move_aside(root, console)
    console.print(introduction(arguments, root), highlight=False, markup=False)
    if console.is_terminal:
        with _progress(console) as progress:
            tasks = {arm: progress.add_task(label, total=arguments.max_steps) for arm, label in ARMS.items()}
            for arm in ARMS:
                _run_arm(arm, arguments, root / arm, _Bar(progress, tasks[arm]))
    else:
        start = time.monotonic()
        for i, arm in enumerate(ARMS):
            _run_arm(arm, arguments, root / arm, _Lines(ARMS[arm], i, arguments.max_steps, start, console))
    conclude(root, arguments, console)
    console.print(NEXT, highlight=False, markup=False)
    return 0


def introduction(arguments: QuickstartArguments, root: Path) -> str:
    """What the demo does, how long it takes, and where the results go."""
    used = {name: getattr(arguments, name) for name in _FULL}
    duration = "about 8 minutes" if used == _FULL else "under a minute" if used == _FAST else ""
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


def conclude(root: Path, arguments: QuickstartArguments, console: Console) -> None:
    """Write and print summary, table and figure from the records of all runs, without a model."""
    summary = summarize(root, arguments)
    write_atomically(root / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    console.print(_table(summary))
    console.print(_verdict(summary))
    page = write_run_page([root / arm for arm in ARMS], root / "report.html")
    console.print(f"page:    {page}   every search, with interactive figures")
    if is_available("matplotlib"):
        console.print(f"figure:  {_figure(root, summary)}")
    else:
        console.print(escape("figure:  skipped, matplotlib is missing (pip install 'effopd[plots]')"))
    console.print(f"summary: {root / 'summary.json'}   rows: {root}/*/evals.jsonl, searches.jsonl, metrics.jsonl")


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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn(f"{{task.description:<{_WIDTH}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )


def settings(arm: str, arguments: QuickstartArguments, output_dir: Path) -> RunSettings:
    """Settings of one run: the testbed's reference settings and the strategy named by `arm`."""
    reference = dict(testbed.reference_settings())
    if arguments.learning_rate is not None:
        reference["learning_rate"] = arguments.learning_rate
    reference["per_device_train_batch_size"] = arguments.prompts_per_step
    opd = OPDConfig(
        **reference,
        output_dir=str(output_dir),
        teacher_model_name_or_path=str(testbed.teacher_path()),
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        cost_clock=arguments.cost_clock,
        per_device_eval_batch_size=arguments.eval_size,
        eval_strategy="steps",
        eval_steps=arguments.eval_steps,
        eval_on_start=True,
        eval_greedy=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return RunSettings(
        ModelConfig(model_name_or_path=str(testbed.student_path())),
        TaskConfig(
            task=f"testbed:{arguments.family}",
            train_size=TRAIN_SIZE,
            eval_size=arguments.eval_size,
            task_seed=arguments.seed,
        ),
        opd,
        EffOPDConfig(arm if arm in AHEAD else "none", seed=arguments.seed),
    )


class _Bar:
    """Progress of a run on a terminal."""

    def __init__(self, progress: Progress, task: Any):
        self._progress, self._task = progress, task

    def stepped(self) -> None:
        """Advance the bar by one step."""
        self._progress.advance(self._task)

    def evaluated(self, evaluation: EvaluationRecord) -> None:
        """Ignore evaluations."""


class _Lines:
    """Progress of a run without a terminal: one line per evaluation, with the time left for all.

    Args:
        before: number of runs finished before this one, all of the same length.
        start: start of the first run, in seconds on the monotonic clock.
    """

    def __init__(self, label: str, before: int, steps: int, start: float, console: Console):
        self._label, self._before, self._steps = label, before, steps
        self._start, self._console = start, console

    def stepped(self) -> None:
        """Ignore steps."""

    def evaluated(self, evaluation: EvaluationRecord) -> None:
        """Print one line about the evaluation."""
        step = evaluation.step
        seconds, done = time.monotonic() - self._start, self._before * self._steps + step
        left = time_left(seconds, done, len(ARMS) * self._steps - done)
        rest = f", about {spoken_time(left)} left" if left else ""
        self._console.print(
            f"{self._label:<{_WIDTH}} step {step:>{len(str(self._steps))}}/{self._steps}  "
            f"{'  '.join(held_out(evaluation))}  "
            f"({spoken_time(seconds)}{rest})",
            highlight=False,
            markup=False,
        )


class _Watch(TrainerCallback):
    """Pass steps and evaluations of a run to its display."""

    def __init__(self, display: _Bar | _Lines):
        self._display = display

    def on_step_end(self, args, state, control, **kwargs):
        self._display.stepped()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._display.evaluated(EvaluationRecord.from_row({"step": state.global_step, **(metrics or {})}))


def _run_arm(arm: str, arguments: QuickstartArguments, output_dir: Path, display: _Bar | _Lines) -> None:
    trainer = build_trainer(settings(arm, arguments, output_dir))
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if not isinstance(callback, PrinterCallback)
    ]
    trainer.add_callback(_Watch(display))
    trainer.train()


def summarize(root: Path, arguments: QuickstartArguments) -> dict[str, Any]:
    """Costs, final values and net speed-ups, from the records of all runs.

    Speed-up = cost of plain OPD / cost of the run, each until the smoothed held-out KL first
    reaches plain OPD's final KL. Plain OPD itself has a speed-up of 1.00×. Net costs include
    searches and exclude evaluations. The top-level `speedup` and `speedup_by_gap_closed` are those
    of the paper's EffOPD.
    """
    runs = {arm: read_evaluations(root / arm) for arm in ARMS}
    target = final_target(runs["plain"])
    summary: dict[str, Any] = {
        "family": arguments.family,
        "seed": arguments.seed,
        "max_steps": arguments.max_steps,
        "prompts_per_step": arguments.prompts_per_step,
        "cost_clock": arguments.cost_clock,
        "versions": versions(),
        "target_kl": target,
    }
    for arm, evaluations in runs.items():
        last, cost = evaluations[-1], Cost.of(evaluations[-1])
        summary[arm] = {
            "steps": cost.steps,
            "seconds": cost.seconds,
            "generated_tokens": cost.generated_tokens,
            "start_kl": evaluations[0].kl,
            "final_kl": final_target(evaluations),
            "final_accuracy": last.accuracy,
            "final_accuracy_ci95": [last.accuracy_low, last.accuracy_high],
        }
    baseline = first_reach(runs["plain"], target)
    for arm in AHEAD:
        searches, reached = read_searches(root / arm), first_reach(runs[arm], target)
        speedup: dict[str, Any] = (
            baseline.ratio(reached)
            if baseline and reached
            else dict.fromkeys(("steps", "seconds", "generated_tokens", "forward_tokens"), None)
        )
        if reached is None:
            speedup["reason"] = (
                f"{ARMS[arm]}'s smoothed held-out KL did not reach plain OPD's final {target:.5f} within "
                f"{arguments.max_steps} steps; its last was {summary[arm]['final_kl']:.5f}."
            )
        summary[arm] |= {
            "accepted_scales": {str(search.step): search.accepted_scale for search in searches},
            "search_seconds": sum(search.seconds for search in searches),
            "search_generated_tokens": sum(search.generated_tokens for search in searches),
            "cost_to_target": vars(reached) if reached else None,
            "speedup": speedup,
            "speedup_by_gap_closed": speedup_by_gap(runs["plain"], runs[arm]),
        }
    return summary | {name: summary["effopd"][name] for name in ("speedup", "speedup_by_gap_closed")}


def _table(summary: dict[str, Any]) -> Table:
    title = f"testbed:{summary['family']}, seed {summary['seed']}: {summary['max_steps']} steps each"
    caption = "held-out KL: at the start → median of the last three evaluations"
    table = Table(title=title, caption=caption, box=box.SIMPLE, pad_edge=False)
    for name in ("", "steps", "net s", "tokens", "held-out KL", "accuracy [95 %]"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm, label in ARMS.items():
        values = summary[arm]
        low, high = values["final_accuracy_ci95"]
        table.add_row(
            label,
            str(values["steps"]),
            f"{values['seconds']:.1f}",
            f"{values['generated_tokens']:,}",
            f"{values['start_kl']:.4f} → {values['final_kl']:.4f}",
            f"{values['final_accuracy']:.3f} [{low:.3f}, {high:.3f}]",
        )
        if reached := values.get("cost_to_target"):
            table.add_row(
                "… to target",
                str(reached["steps"]),
                f"{reached['seconds']:.1f}",
                f"{reached['generated_tokens']:,}",
                f"≤ {summary['target_kl']:.4f}",
                "",
            )
    return table


def _verdict(summary: dict[str, Any]) -> str:
    lines = ["net speed-up to plain OPD's final KL (one seed; includes searches, excludes evaluations):"]
    for arm in AHEAD:
        values = summary[arm]
        speedup, label = values["speedup"], f"{ARMS[arm]:<{_WIDTH}}"
        if speedup["steps"] is None:
            lines.append(f"{label} none. {speedup['reason']}")
        else:
            lines.append(
                f"{label} [bold]{speedup['steps']:.2f}× in steps, {speedup['seconds']:.2f}× in seconds, "
                f"{speedup['generated_tokens']:.2f}× in sampled tokens[/bold]"
            )
        jumps = [f"{scale:.3g}Δ at {step}" for step, scale in values["accepted_scales"].items() if scale]
        more = f", … {len(jumps) - 8} more" if len(jumps) > 8 else ""
        lines.append(f"{'':<{_WIDTH}} jumps: {', '.join(jumps[:8]) or 'none'}{more}")
        on_the_way = [
            f"{row['gap_closed']:.0%}: {row['speedup']['steps']:.1f}× / {row['speedup']['seconds']:.1f}×"
            for row in values["speedup_by_gap_closed"]
            if row["speedup"]
        ]
        lines.append(
            f"{'':<{_WIDTH}} at shares of the gap (steps / seconds): {', '.join(on_the_way) or 'not reached'}"
        )
    return "\n".join(lines)


def _figure(root: Path, summary: dict[str, Any]) -> Path:
    with quiet_style():
        figure = quality_figure(
            {label: read_evaluations(root / arm) for arm, label in ARMS.items()},
            {ARMS[arm]: read_searches(root / arm) for arm in AHEAD},
            target=summary["target_kl"],
            teacher_accuracy=testbed.card()["teacher_accuracy"][summary["family"]],
        )
        return save(
            figure,
            root / "figure.png",
            f"testbed:{summary['family']}, seed {summary['seed']}",
            "Points: evaluations with 95 % intervals. Dotted: plain OPD's final KL (median of its "
            "last three) and the teacher's accuracy.",
        )
