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
    return (
        f"{runs} runs{f' of {planned} planned' if planned not in (None, runs) else ''}: {len(strategies)} strategies on "
        f"{', '.join(lookup.tasks)}; seeds {', '.join(map(str, seeds))}; reference learning rate {lookup.reference:.3g}."
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
        if _SHARE not in part["shares"]:
            return
        index = part["shares"].index(_SHARE)
        axes = compare_envelope.axes_with_data(lookup, part)
        axis = "seconds" if "seconds" in axes else next(iter(axes), "")
        for strategy in compare_envelope.shown(lookup, part):
            texts = []
            for task in lookup.tasks:
                rows = [row for _, row in compare_envelope.curves(part, task, axis, strategy) if row["n"][index]]
                if rows:
                    values = sorted(_number(row["median"][index]) for row in rows)
                    ends = dict.fromkeys(one(None if value == float("inf") else value) for value in (values[0], values[-1]))
                    texts.append(f"{' to '.join(ends)} on {task}")
            if texts:
                yield (
                    f"`{strategy}` over the best-tuned run without look-ahead, to {100 * _SHARE:.0f} % of the starting "
                    f"KL, in {axis_name(axis)}: {'; '.join(texts)} (medians at its learning rates; below 1× is slower)."
                )


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
