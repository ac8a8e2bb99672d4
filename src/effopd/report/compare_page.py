"""Renders results.json as results.md with `templates/compare.md.jinja`."""

from __future__ import annotations

from collections.abc import Mapping

from effopd.compare.axes import axis_name
from effopd.report import compare_answers, compare_envelope, compare_gate, compare_tables
from effopd.report.compare_lookup import ALL, Lookup, Results
from effopd.report.compare_method import method
from effopd.report.pages import markdown_template


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
        axis_name=axis_name,
        method=method(lookup),
    )
