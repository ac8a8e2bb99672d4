"""Renders results.json as results.md with `templates/compare.md.jinja`."""

from __future__ import annotations

from collections.abc import Mapping

from effopd.compare.axes import axis_name
from effopd.report import compare_answers, compare_envelope, compare_gate, compare_precision, compare_tables
from effopd.report.compare_lookup import ALL, Lookup, Results
from effopd.report.compare_method import method
from effopd.report.pages import markdown_template

#: Figure → its alternative text.
_DESCRIPTIONS = {
    "speedups": "Net speed-up to the final KL of the baseline, by strategy and task",
    "curves": "Held-out KL against optimizer steps and net seconds, by strategy",
    "learning_rates": "Time to the target by learning rate and strategy",
}


def described(name: str) -> str:
    """Alternative text of a figure of `compare_figures.draw`."""
    axis = name.removeprefix("envelope_").replace("_", " ")
    return _DESCRIPTIONS.get(name, f"Speed-up over the best-tuned run by target, in {axis}")


def render(results: Results, figures: Mapping[str, str]) -> str:
    """The page as Markdown.

    Args:
        figures: path of each figure, relative to the page, by name.
    """
    lookup = Lookup(results)
    return markdown_template("compare.md.jinja").render(
        lookup=lookup,
        results=results,
        settings=results["settings"],
        baseline=lookup.baseline,
        all_tasks=ALL,
        figures=figures,
        answers=compare_answers,
        tables=compare_tables,
        gate=compare_gate,
        envelope=compare_envelope,
        precision=compare_precision.precision_table(lookup),
        axis_name=axis_name,
        described=described,
        method=method(lookup),
    )
