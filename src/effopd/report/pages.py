"""Page templates in `report/templates/`: Markdown pages, and self-contained HTML pages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from effopd.common.files import write_atomically
from effopd.report import charts
from effopd.report.compare_lookup import table
from effopd.report.html_parts import html_table, inline

TEMPLATES = Path(__file__).with_name("templates")


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("effopd", "report/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


@cache
def markdown_template(name: str) -> Template:
    """A Markdown template. Its filter `table` renders a `compare_lookup.Table`."""
    environment = _environment(keep_trailing_newline=True, autoescape=False)
    environment.filters["table"] = lambda cells: table(*cells)
    return environment.get_template(name)


@cache
def _html_template(name: str) -> Template:
    environment = _environment(autoescape=True)
    environment.globals["asset"] = lambda file: Markup((TEMPLATES / file).read_text(encoding="utf-8"))
    environment.filters["chart"] = charts.html
    environment.filters["table"] = html_table
    return environment.get_template(name)


def write_html(
    out: Path, template: str, title: str, summary: Iterable[str], rows: Sequence[Path], about: str = "", **values: Any
) -> Path:
    """Write a page: summary in words, links to the raw rows, the template's body.

    Args:
        template: file in `report/templates/` that extends `page.html.jinja`.
        summary: sentences at the top of the page.
        rows: files or folders with the page's data; links are relative to the page.
        about: line below the title.
        values: variables of the template.
    """
    folder = out.absolute().parent
    links = [(path.name, quote(os.path.relpath(path.absolute(), folder))) for path in rows if path.exists()]
    if len({name for name, _ in links}) < len(links):  # several runs: the same file names
        links = [(address, address) for _, address in links]
    text = _html_template(template).render(
        title=title, about=about, summary=[inline(text) for text in summary], rows=links, **values
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    return out
