"""HTML page of one or several run directories: settings, results, searches, costs, logged values.

The page is self-contained. Its text is in `templates/run.html.jinja`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from effopd.common.files import write_atomically
from effopd.common.optional import require
from effopd.compare.time_to_target import final_target
from effopd.errors import ConfigError
from effopd.report.run_figures import quality_figure, search_figure, training_figure
from effopd.report.style import quiet_style
from effopd.runs.best_model import full_name, read_kept
from effopd.runs.records import (
    CONFIG,
    EVALS,
    METRICS,
    EvaluationRecord,
    SearchRecord,
    StepRecord,
    TrialRecord,
    read_evaluations,
    read_searches,
    read_steps,
)

TEMPLATE = Path(__file__).with_name("templates") / "run.html.jinja"
PHASES = ("rollout", "teacher", "update", "search", "eval", "other")
#: Settings shown at the top of the page if a run has them.
_SETTINGS = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "teachers",
    "task",
    "strategy",
    "algorithm",
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "loss_type",
    "lambda_extrapolation",
    "rollout_horizon",
    "task_args",
    "verifier",
    "prompt_suffix",
    "system_prompt",
    "chat_template_kwargs",
    "cost_clock",
    "seed",
)


@dataclass(frozen=True)
class RunRecords:
    """Settings and records of a run directory."""

    label: str
    root: Path
    config: dict[str, Any]
    versions: tuple[str, ...]
    steps: list[StepRecord]
    searches: list[SearchRecord]
    evaluations: list[EvaluationRecord]

    @property
    def last(self) -> StepRecord | EvaluationRecord:
        """Record of the latest step; its costs are cumulative."""
        latest: list[StepRecord | EvaluationRecord] = [*self.steps[-1:], *self.evaluations[-1:]]
        return max(latest, key=lambda record: record.step)


def read_runs(roots: Sequence[Path]) -> list[RunRecords]:
    """The runs, labeled by their paths relative to the common parent folder.

    Raises:
        ConfigError: a folder holds no rows of a run, or is given twice.
    """
    paths = [root.absolute() for root in roots]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"a run directory is given twice: expected each run once, got {', '.join(map(str, roots))}.")
    above = paths[0].parent if len(paths) == 1 else Path(os.path.commonpath(paths))
    runs = []
    for root, path in zip(roots, paths, strict=True):
        steps, evaluations = read_steps(root), read_evaluations(root)
        if not steps and not evaluations:
            raise ConfigError(
                f"{root} is not a run directory: expected rows in {METRICS} or {EVALS}. Pass the output directory of "
                "`effopd train` or `effopd rl`."
            )
        text = (root / CONFIG).read_text() if (root / CONFIG).is_file() else ""
        versions = tuple(line[2:] for line in text.splitlines() if line.startswith("# "))
        label = str(path.relative_to(above)) if path != above else path.name
        settings = yaml.safe_load(text) or {}
        runs.append(RunRecords(label, root, settings, versions, steps, read_searches(root), evaluations))
    return runs


def write_run_page(roots: Sequence[Path], out: Path) -> Path:
    """Write the page of one run, or of several runs compared, to `out`.

    Raises:
        ConfigError: as `read_runs`.
        MissingDependencyError: matplotlib is not installed.
    """
    runs = read_runs(roots)
    require("matplotlib")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text()).render(
        title=", ".join(run.label for run in runs),
        runs=runs,
        settings=list(_settings(runs)),
        quality=_svg(
            quality_figure,
            {run.label: run.evaluations for run in runs if run.evaluations},
            {run.label: run.searches for run in runs},
            seconds=_seconds(runs),
        ),
        last=[_last(run) for run in runs],
        costs=[_costs(run) for run in runs],
        phases=PHASES,
        clock=_clock(runs[0]) if len({_clock(run) for run in runs}) == 1 else "cost",
        searched=[
            {
                "label": run.label,
                "figure": _svg(search_figure, run.searches),
                "rows": [_search(search) for search in run.searches],
            }
            for run in runs
            if run.searches
        ],
        training=_svg(training_figure, {run.label: run.steps for run in runs}),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: path.write_text(html))
    return out


def _clock(run: RunRecords) -> str:
    """Name of the unit of a run's cost ledger."""
    return "CPU seconds" if run.config.get("cost_clock") == "cpu" else "seconds"


def _seconds(runs: Sequence[RunRecords]) -> str:
    """Label of a seconds axis shared by several runs."""
    clocks = {run.label: _clock(run) for run in runs}
    if len(set(clocks.values())) == 1:
        return f"net {next(iter(clocks.values()))}"
    cpu = ", ".join(label for label, clock in clocks.items() if clock != "seconds")
    return f"net seconds; of CPU time in {cpu}"


def _svg(draw, *arguments, **options) -> Markup | None:
    """A figure as an `<svg>` element that keeps text as text."""
    with quiet_style(), require("matplotlib").rc_context({"svg.fonttype": "none"}):
        figure = draw(*arguments, **options)
        if figure is None:
            return None
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        require("matplotlib.pyplot").close(figure)
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])


def _settings(runs: Sequence[RunRecords]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the settings table: name, and value in every run."""
    for name in _SETTINGS:
        values = [run.config.get(name, (run.config.get("effopd") or {}).get(name)) for run in runs]
        if any(value is not None for value in values):
            yield name, ["default" if value is None else str(value) for value in values]
    yield "versions", [", ".join(run.versions) for run in runs]


def _last(run: RunRecords) -> dict[str, str]:
    """Final step, held-out KL and accuracy of a run; of its best model if that one was kept."""
    best = read_kept(run.root)
    evaluations = [record for record in run.evaluations if best is None or record.step <= best.step]
    shown = {"label": run.label, "steps": f"{run.last.step}"}
    if best is not None:
        shown["steps"] += f" (saved model: step {best.step}, the best by {full_name(best.metric)})"
    if measured := [record for record in evaluations if record.kl is not None]:
        error = math.nan if measured[-1].kl_se is None else measured[-1].kl_se
        shown["KL"] = f"{measured[-1].kl:.5f} ± {error:.5f}"
        shown["late KL"] = f"{final_target(measured):.5f}"
    if evaluations and evaluations[-1].accuracy is not None:
        last = evaluations[-1]
        interval = "" if last.accuracy_low is None else f" [{last.accuracy_low:.3f}, {last.accuracy_high:.3f}]"
        shown["accuracy"] = f"{last.accuracy:.3f}{interval}"
    return shown


def _costs(run: RunRecords) -> dict[str, Any]:
    """Net costs of the whole run; seconds of every phase and its share of their sum."""
    costs = run.last.costs
    seconds = [float(getattr(costs, f"{phase}_seconds") or 0.0) for phase in PHASES]
    total = sum(seconds) or 1.0
    return {
        "label": run.label,
        "net": f"{costs.net_seconds or 0.0:,.1f}",
        "clock": _clock(run),
        "tokens": f"{int(costs.net_generated_tokens or 0):,}",
        "forward": f"{int(costs.net_forward_tokens or 0):,}",
        "phases": [f"{value:,.1f} s ({value / total:.0%})" for value in seconds],
    }


def _search(search: SearchRecord) -> dict[str, Any]:
    """A row of the table of searches; the accepted candidate is marked."""
    return {
        "step": search.step,
        "delta": "–" if search.delta_norm is None else f"{search.delta_norm:.3g}",
        "trials": [
            {"text": f"{trial.scale:.3g}: {_outcome(trial)}", "taken": trial.scale == search.accepted_scale}
            for trial in search.trials
        ],
        "factor": "1" if search.learning_rate_factor is None else f"{search.learning_rate_factor:.2g}",
        "seconds": f"{search.seconds:.2f}",
    }


def _outcome(trial: TrialRecord) -> str:
    """A candidate's score, or the reason for having none."""
    if trial.score is not None:
        return f"{trial.score:.4g}"
    return "not finite" if trial.verdict == "non-finite" else "not scored"
