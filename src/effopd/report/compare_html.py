"""HTML page of a comparison: the text and tables of results.md, with a summary and charts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from effopd.compare.axes import axis_name
from effopd.report import compare_answers, compare_charts, compare_envelope
from effopd.report.charts import html
from effopd.report.compare_lookup import Lookup, Results, one, times
from effopd.report.compare_page import render
from effopd.report.markdown_html import to_html
from effopd.report.pages import write_html

#: Target of the summary's sentence on the best-tuned baseline: a share of the starting KL.
_SHARE = 0.1


def write_compare_page(results: Results, out: Path, rows: Path) -> Path:
    """Write the page of a results.json to `out`.

    Args:
        rows: path of the results.json, which the page links.
    """
    lookup = Lookup(results)
    charts = compare_charts.charts(lookup)
    text = render(results, {name: name for name in charts})
    body = to_html(text, {name: html(chart) for name, chart in charts.items()}, compare_charts.strategy_looks(lookup))
    return write_html(
        out, "compare.html.jinja", "Comparison of strategies", summary(lookup), [rows], about=_about(lookup), body=body
    )


def _about(lookup: Lookup) -> str:
    runs, planned = len(lookup.results["runs"]), lookup.results["settings"].get("planned_runs")
    seeds = sorted({run["seed"] for run in lookup.results["runs"]})
    strategies = list(dict.fromkeys(strategy for strategy, _ in lookup.arms))
    of_planned = f" of {planned} planned" if planned not in (None, runs) else ""
    return (
        f"{runs} runs{of_planned}: {len(strategies)} strategies on {', '.join(lookup.tasks)}; "
        f"seeds {', '.join(map(str, seeds))}; reference learning rate {lookup.reference:.3g}."
    )


def summary(lookup: Lookup) -> list[str]:
    """Answers in words: against the best-tuned baseline, against the baseline, and the claims."""
    found = [*_tuned(lookup), *_headline(lookup), *_claims(lookup)]
    if not found:
        found = [f"`{lookup.baseline}` is the only strategy with finished runs at the reference learning rate."]
    return [*found, "Brackets: 95 % interval over seeds; parentheses: range of fewer than five seeds."]


def _tuned(lookup: Lookup) -> Iterator[str]:
    """Range of the medians over learning rates, against the best-tuned run without look-ahead."""
    for part in compare_envelope.parts(lookup)[:1]:
        axes = compare_envelope.axes_with_data(lookup, part)
        if _SHARE not in part["shares"] or not axes:
            return
        axis = "seconds" if "seconds" in axes else axes[0]
        for strategy in compare_envelope.shown(lookup, part):
            ranges = {task: _range(part, task, axis, strategy) for task in lookup.tasks}
            texts = [f"{text} on {task}" for task, text in ranges.items() if text]
            if texts:
                yield (
                    f"`{strategy}` over the best-tuned run without look-ahead, to {_SHARE:.0%} of the starting KL, in "
                    f"{axis_name(axis)}: {'; '.join(texts)} (medians at its learning rates; below 1× is slower)."
                )


def _range(part: compare_envelope.Part, task: str, axis: str, strategy: str) -> str:
    """Lowest and highest median over the learning rates of a strategy; "" without data."""
    index = part["shares"].index(_SHARE)
    rows = [row for _, row in compare_envelope.curves(part, task, axis, strategy) if row["n"][index]]
    values = sorted((row["median"][index] for row in rows), key=_number)
    return " to ".join(dict.fromkeys(map(one, values[:1] + values[-1:])))


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


def _headline(lookup: Lookup) -> Iterator[str]:
    """Speed-ups of the headline strategies over the baseline at the reference learning rate."""
    for strategy in lookup.roles.opening(lookup.at_reference()):
        texts = []
        for task in lookup.tasks:
            arm = (strategy, lookup.reference)
            steps, seconds = (lookup.speedup(task, arm, axis) for axis in ("steps", "seconds"))
            if steps and steps["n"]:
                texts.append(f"{times(steps)} in steps and {times(seconds)} in net seconds on {task}")
        if texts:
            yield (
                f"`{strategy}` over `{lookup.baseline}`, both at {lookup.reference:.3g}, to the final KL of "
                f"`{lookup.baseline}`: {'; '.join(texts)}."
            )


def _claims(lookup: Lookup) -> Iterator[str]:
    """Verdict on every published claim."""
    verdicts: dict[tuple[str, str], list[str]] = {}
    for claim, strategy, task, verdict, *_ in compare_answers.claims(lookup).rows:
        verdicts.setdefault((claim, strategy), []).append(f"{verdict} on {task}")
    for (claim, strategy), texts in verdicts.items():
        yield f"Published claim for {strategy}, “{claim}”: {', '.join(texts)}."
