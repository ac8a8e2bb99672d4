"""Run directories → one HTML page that needs nothing else: what was run, how good it got, every search, what it cost."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from effopd.common.files import read_rows, write_atomically
from effopd.common.optional import require
from effopd.compare.time_to_target import final_target
from effopd.errors import ConfigError
from effopd.report.run_figures import quality_figure, search_figure, training_figure
from effopd.report.style import quiet_style
from effopd.runs.best_model import full_name
from effopd.runs.records import CONFIG, EVALS, METRICS, SEARCHES, EvaluationRecord
from effopd.runs.run_dir import read_kept

PHASES = ("rollout", "teacher", "update", "search", "eval", "other")
#: Settings shown at the top, if a run has them.
_SETTINGS = (
    "model_name_or_path", "teacher_model_name_or_path", "task", "strategy", "algorithm", "learning_rate", "lr_scheduler_type",
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length",
    "loss_type", "lambda_extrapolation", "rollout_horizon", "task_args", "verifier", "prompt_suffix", "system_prompt",
    "chat_template_kwargs", "cost_clock", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class RunRows:
    """What a run directory holds: its settings and rows."""

    label: str
    root: Path
    config: dict[str, Any]
    versions: tuple[str, ...]
    metrics: list[dict[str, Any]]
    searches: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_run_rows(roots: Sequence[Path]) -> list[RunRows]:
    """The runs, labelled by the shortest part of their paths that tells them apart.

    Raises:
        ConfigError: a folder holds no rows of a run, or is given twice.
    """
    paths = [root.absolute() for root in roots]
    if len(set(paths)) < len(paths):
        raise ConfigError("each run once: " + ", ".join(map(str, roots)))
    above = paths[0].parent if len(paths) == 1 else Path(os.path.commonpath(paths))
    runs = []
    for root, path in zip(roots, paths, strict=True):
        rows = [list(read_rows(root / name)) for name in (METRICS, SEARCHES, EVALS)]
        if not rows[0] and not rows[2]:
            raise ConfigError(
                f"{root} is not a run directory: expected rows in {METRICS} or {EVALS}, which `effopd train` and "
                "`effopd rl` write."
            )
        text = (root / CONFIG).read_text() if (root / CONFIG).is_file() else ""
        versions = tuple(line[2:] for line in text.splitlines() if line.startswith("# "))
        label = str(path.relative_to(above)) if path != above else path.name
        runs.append(RunRows(label, root, yaml.safe_load(text) or {}, versions, *rows))
    return runs


def write_run_page(roots: Sequence[Path], out: Path) -> Path:
    """Write the page of one run, or of several over each other, to `out`.

    Raises:
        ConfigError: as `read_run_rows`.
        MissingDependencyError: matplotlib is not installed.
    """
    runs = read_run_rows(roots)
    require("matplotlib")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_PAGE).render(
        title=", ".join(run.label for run in runs),
        runs=runs,
        settings=list(_settings(runs)),
        quality=_svg(
            quality_figure,
            {run.label: run.evals for run in runs if run.evals},
            {run.label: run.searches for run in runs},
            seconds=_seconds(runs),
        )
        if any(run.evals for run in runs)
        else None,
        last=[_last(run) for run in runs],
        costs=[_costs(run) for run in runs],
        phases=PHASES,
        clock=_clock(runs[0]) if len({_clock(run) for run in runs}) == 1 else "cost",
        searched=[
            {
                "label": run.label,
                "figure": _svg(search_figure, run.searches),
                "rows": [_search(r) for r in run.searches],
            }
            for run in runs
            if run.searches
        ],
        training=_svg(training_figure, {run.label: run.metrics for run in runs}),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: path.write_text(html))
    return out


def _clock(run: RunRows) -> str:
    """What the seconds of a run's ledger are."""
    return "CPU seconds" if run.config.get("cost_clock") == "cpu" else "seconds"


def _seconds(runs: Sequence[RunRows]) -> str:
    """The same for an axis that several runs share."""
    clocks = {run.label: _clock(run) for run in runs}
    if len(set(clocks.values())) == 1:
        return f"net {next(iter(clocks.values()))}"
    cpu = ", ".join(label for label, clock in clocks.items() if clock != "seconds")
    return f"net seconds; of CPU time in {cpu}"


def _svg(draw, *arguments, **options) -> Markup | None:
    """A figure as an `<svg>` element, with text as text."""
    with quiet_style(), require("matplotlib").rc_context({"svg.fonttype": "none"}):
        figure = draw(*arguments, **options)
        if figure is None:
            return None
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        require("matplotlib.pyplot").close(figure)
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])


def _settings(runs: Sequence[RunRows]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the settings table: a setting and its value in every run."""
    for name in _SETTINGS:
        values = [run.config.get(name, (run.config.get("effopd") or {}).get(name)) for run in runs]
        if any(value is not None for value in values):
            yield name, ["default" if value is None else str(value) for value in values]
    yield "versions", [", ".join(run.versions) for run in runs]


def _last(run: RunRows) -> dict[str, str]:
    """How far a run got and how good it was then."""
    kept = read_kept(run.root)
    evals = run.evals if kept is None else [row for row in run.evals if row["step"] <= kept.step]
    row = (evals or run.metrics)[-1]
    kl = [row for row in evals if "eval_kl" in row]
    steps = max(rows[-1]["step"] for rows in (run.metrics, run.evals) if rows)
    found = {"label": run.label, "steps": f"{steps}"}
    if kept is not None:
        found["steps"] += f" (the model is that of step {kept.step}, the best by {full_name(kept.metric)})"
    if kl:
        found["KL"] = f"{kl[-1]['eval_kl']:.5f} ± {kl[-1].get('eval_kl_se', float('nan')):.5f}"
        found["late KL"] = f"{final_target([EvaluationRecord.from_row(row) for row in kl]):.5f}"
    if "eval_accuracy" in row:
        low, high = row.get("eval_accuracy_low"), row.get("eval_accuracy_high")
        found["accuracy"] = f"{row['eval_accuracy']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
    return found


def _costs(run: RunRows) -> dict[str, Any]:
    """Net cost of the whole run, and the share of every phase in all of its seconds."""
    row = max((rows[-1] for rows in (run.metrics, run.evals) if rows), key=lambda row: row["step"])
    seconds = [float(row.get(f"cost/{phase}_seconds", 0.0)) for phase in PHASES]
    whole = sum(seconds) or 1.0
    return {
        "label": run.label,
        "net": f"{row.get('cost/net_seconds', 0.0):,.1f}",
        "clock": _clock(run),
        "tokens": f"{int(row.get('cost/net_generated_tokens', 0)):,}",
        "forward": f"{int(row.get('cost/net_forward_tokens', 0)):,}",
        "phases": [f"{value:,.1f} s ({value / whole:.0%})" for value in seconds],
    }


def _search(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of searches; the candidate that the model went to is marked."""
    taken = row["accepted_scale"]
    return {
        "step": row["step"],
        "delta": f"{row['delta_norm']:.3g}" if row.get("delta_norm") is not None else "–",
        "trials": [
            {
                "text": f"{trial['scale']:.3g}: {_outcome(trial)}",
                "taken": trial["scale"] == taken,
            }
            for trial in row["trials"]
        ],
        "factor": f"{row['learning_rate_factor']:.2g}" if row.get("learning_rate_factor") is not None else "1",
        "seconds": f"{row['seconds']:.2f}",
    }


def _outcome(trial: Mapping[str, Any]) -> str:
    """A candidate's score, or why it has none."""
    if trial.get("score") is not None:
        return f"{trial['score']:.4g}"
    return "not finite" if trial["verdict"] == "non-finite" else "not scored"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #22262e; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
th { font-weight: 600; } p.note, td.note { color: #6b7280; font-size: 13px; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
b.taken { color: #b02a3e; } span.trial { white-space: nowrap; margin-right: .8rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>

<div class="wide"><table>
<tr><th></th>{% for run in runs %}<th>{{ run.label }}</th>{% endfor %}</tr>
{% for name, values in settings %}
<tr><td>{{ name }}</td>{% for value in values %}<td{% if name == "versions" %} class="note"{% endif %}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>

<h2>How good it got</h2>
<div class="wide"><table>
<tr><th>run</th><th>steps</th><th>held-out KL ± SE</th><th>… median of the last 3</th><th>accuracy [95 %]</th></tr>
{% for run in last %}
<tr><td>{{ run.label }}</td><td>{{ run.steps }}</td><td>{{ run["KL"] or "–" }}</td><td>{{ run["late KL"] or "–" }}</td><td>{{ run.accuracy or "–" }}</td></tr>
{% endfor %}
</table></div>
{% if quality %}
{{ quality }}
<p class="note">KL in nats per token, exact, on held-out prompts. A point is an evaluation as it was measured, nothing is smoothed; bands: 95 % intervals over prompts. Triangles: the first evaluation after a jump forwards.</p>
{% else %}
<p class="note">No evaluations: train with --eval_strategy steps --eval_steps N.</p>
{% endif %}

{% for one in searched %}
<h2>Searches{% if runs | length > 1 %}: {{ one.label }}{% endif %}</h2>
{% if one.figure %}
{{ one.figure }}
<p class="note">Gain over staying at s = 0 against the scale s (linear up to 1, logarithmic beyond), with two standard errors, example by example. Dashed: where the model went.</p>
{% endif %}
<details{% if one.rows | length <= 12 %} open{% endif %}><summary>Every candidate</summary><div class="wide"><table>
<tr><th>step</th><th>‖Δ‖</th><th>scale: score</th><th>learning rate ×</th><th>seconds on the wall</th></tr>
{% for row in one.rows %}
<tr><td>{{ row.step }}</td><td>{{ row.delta }}</td><td>{% for trial in row.trials %}<span class="trial">{% if trial.taken %}<b class="taken">{{ trial.text }}</b>{% else %}{{ trial.text }}{% endif %}</span> {% endfor %}</td><td>{{ row.factor }}</td><td>{{ row.seconds }}</td></tr>
{% endfor %}
</table></div></details>
{% endfor %}

<h2>What it cost</h2>
<div class="wide"><table>
<tr><th>run</th><th>net {{ clock }}</th><th>sampled tokens</th><th>forward tokens</th>{% for phase in phases %}<th>{{ phase }}</th>{% endfor %}</tr>
{% for run in costs %}
<tr><td>{{ run.label }}</td><td>{{ run.net }}{% if clock != run.clock %} {{ run.clock }}{% endif %}</td><td>{{ run.tokens }}</td><td>{{ run.forward }}</td>{% for phase in run.phases %}<td>{{ phase }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">Net: the search is charged, evaluation is not.{% if clock != "seconds" %} CPU seconds: of all threads of the process, instead of time on the wall.{% endif %} Forward tokens: run through a model besides sampling.</p>

{% if training %}
<h2>What training logged</h2>
{{ training }}
{% endif %}
</body>
</html>
"""
