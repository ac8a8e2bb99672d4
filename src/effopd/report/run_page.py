"""HTML page of one or several run directories: settings, results, searches, costs, logged values.

The page is self-contained. Its text is in `templates/run.html.jinja`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from effopd.compare.time_to_target import final_target
from effopd.report.compare_lookup import Table
from effopd.report.pages import write_html
from effopd.report.run_charts import jumps_chart, quality_chart, run_looks, search_chart, training_chart
from effopd.report.run_data import RunRecords, read_runs
from effopd.report.run_summary import sentences
from effopd.runs.best_model import full_name, read_kept
from effopd.runs.records import SearchRecord, TrialRecord

PHASES = ("rollout", "teacher", "update", "search", "eval", "other")
#: Settings shown on the page if a run has them.
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
    "curriculum",
    "task_args",
    "verifier",
    "prompt_suffix",
    "system_prompt",
    "chat_template_kwargs",
    "cost_clock",
    "seed",
)


def write_run_page(roots: Sequence[Path], out: Path) -> Path:
    """Write the page of one run, or of several runs compared, to `out`.

    Raises:
        ConfigError: as `read_runs`.
    """
    runs = read_runs(roots)
    styles = run_looks(runs)
    clock = runs[0].clock if len({run.clock for run in runs}) == 1 else "cost"
    return write_html(
        out,
        "run.html.jinja",
        ", ".join(run.label for run in runs),
        sentences(runs),
        [path for run in runs for path in run.files],
        settings=Table(["", *(run.label for run in runs)], list(_settings(runs))),
        quality=quality_chart(runs, styles, _seconds(runs)),
        last=_results(runs),
        costs=_costs(runs, clock),
        clock=clock,
        jumps=jumps_chart(runs, styles) if any(run.searches for run in runs) else None,
        searched=[
            {
                "label": run.label,
                "chart": search_chart(f"searches-{i}", run.label, run.searches, styles[run.label]),
                "table": _searches(run.searches),
            }
            for i, run in enumerate(runs)
            if run.searches
        ],
        training=training_chart(runs, styles),
    )


def _seconds(runs: Sequence[RunRecords]) -> str:
    """Label of a seconds axis shared by several runs."""
    clocks = {run.label: run.clock for run in runs}
    if len(set(clocks.values())) == 1:
        return f"net {next(iter(clocks.values()))}"
    cpu = ", ".join(label for label, clock in clocks.items() if clock != "seconds")
    return f"net seconds; of CPU time in {cpu}"


def _settings(runs: Sequence[RunRecords]) -> Iterator[list[str]]:
    """Rows of the settings table: name, and value in every run."""
    for name in _SETTINGS:
        values = [run.config.get(name, (run.config.get("effopd") or {}).get(name)) for run in runs]
        if any(value is not None for value in values):
            yield [name, *("default" if value is None else str(value) for value in values)]
    yield ["versions", *(", ".join(run.versions) for run in runs)]


def _results(runs: Sequence[RunRecords]) -> Table:
    """Final step, held-out KL and accuracy of every run; of its best model if that one was kept."""
    header = ["run", "steps", "held-out KL ± SE", "KL, median of the last 3", "accuracy [95 %]"]
    return Table(header, [_result(run) for run in runs])


def _result(run: RunRecords) -> list[str]:
    best = read_kept(run.root)
    evaluations = [record for record in run.evaluations if best is None or record.step <= best.step]
    steps, kl, late, accuracy = f"{run.last.step}", "–", "–", "–"
    if best is not None:
        steps += f" (saved model: step {best.step}, the best by {full_name(best.metric)})"
    if measured := [record for record in evaluations if record.kl is not None]:
        error = "" if measured[-1].kl_se is None else f" ± {measured[-1].kl_se:.5f}"
        kl, late = f"{measured[-1].kl:.5f}{error}", f"{final_target(measured):.5f}"
    if evaluations and evaluations[-1].accuracy is not None:
        last = evaluations[-1]
        interval = "" if last.accuracy_low is None else f" [{last.accuracy_low:.3f}, {last.accuracy_high:.3f}]"
        accuracy = f"{last.accuracy:.3f}{interval}"
    return [run.label, steps, kl, late, accuracy]


def _costs(runs: Sequence[RunRecords], clock: str) -> Table:
    """Net costs of the whole runs; seconds of every phase and its share of their sum."""
    rows = []
    for run in runs:
        costs = run.last.costs
        seconds = [float(getattr(costs, f"{phase}_seconds") or 0.0) for phase in PHASES]
        total = sum(seconds) or 1.0
        rows.append([
            run.label,
            f"{costs.net_seconds or 0.0:,.1f}" + (f" {run.clock}" if clock != run.clock else ""),
            f"{int(costs.net_generated_tokens or 0):,}",
            f"{int(costs.net_forward_tokens or 0):,}",
            *(f"{value:,.1f} s ({value / total:.0%})" for value in seconds),
        ])  # fmt: skip
    return Table(["run", f"net {clock}", "sampled tokens", "forward tokens", *PHASES], rows)


_TRIAL = '<span class="trial">{}</span> '
_TAKEN = '<span class="trial"><b class="taken">{}</b></span> '


def _searches(searches: Sequence[SearchRecord]) -> Table:
    """Table of searches; the accepted candidate is marked."""
    rows = []
    for search in searches:
        trials = [
            Markup(_TAKEN if trial.scale == search.accepted_scale else _TRIAL)
            .format(f"{trial.scale:.3g}: {_outcome(trial)}")
            for trial in search.trials
        ]  # fmt: skip
        rows.append([
            str(search.step),
            "–" if search.delta_norm is None else f"{search.delta_norm:.3g}",
            Markup('<td class="long">{}</td>').format(Markup("").join(trials)),
            "1" if search.learning_rate_factor is None else f"{search.learning_rate_factor:.2g}",
            f"{search.seconds:.2f}",
        ])  # fmt: skip
    return Table(["step", "‖Δ‖", "scale: score", "learning-rate factor", "wall-clock seconds"], rows)


def _outcome(trial: TrialRecord) -> str:
    """A candidate's score, or the reason for having none."""
    if trial.score is not None:
        return f"{trial.score:.4g}"
    return "not finite" if trial.verdict == "non-finite" else "not scored"
