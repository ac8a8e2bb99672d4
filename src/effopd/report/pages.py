"""Loader of the page templates in `report/templates/`."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from effopd.report.compare_lookup import table


@cache
def markdown_template(name: str) -> Template:
    """A Markdown template. Its filter `table` renders a `compare_lookup.Table`."""
    environment = Environment(
        loader=PackageLoader("effopd", "report/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["table"] = lambda cells: table(*cells)
    return environment.get_template(name)
