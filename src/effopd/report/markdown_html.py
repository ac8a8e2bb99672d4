"""HTML of the Markdown that this package writes: headings, paragraphs, lists, tables, figures."""

from __future__ import annotations

import re
from collections.abc import Mapping

from markupsafe import Markup

from effopd.report.compare_lookup import Table
from effopd.report.html_parts import html_table, inline
from effopd.report.style import Look

_FIGURE = re.compile(r"!\[[^\]]*\]\(([^)]*)\)")


def to_html(text: str, figures: Mapping[str, Markup], styles: Mapping[str, Look]) -> Markup:
    """HTML of a page without its first heading.

    Args:
        figures: element of a figure by the address in the Markdown; others are left out.
        styles: as `inline`.
    """
    blocks = [block for block in text.split("\n\n") if block.strip()]
    return Markup("\n").join(_block(block.strip("\n"), figures, styles) for block in blocks)


def _block(block: str, figures: Mapping[str, Markup], styles: Mapping[str, Look]) -> Markup:
    lines = block.split("\n")
    if heading := re.match(r"(#{1,3}) (.*)", lines[0]):
        rest = "\n".join(lines[1:]).strip()
        return _heading(len(heading[1]), heading[2], styles) + (_block(rest, figures, styles) if rest else "")
    if all(line.startswith("|") for line in lines):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
        return html_table(Table([inline(c, styles) for c in header], [[inline(c, styles) for c in r] for r in rows]))
    if lines[0].startswith("- "):
        items = [line.removeprefix("- ") for line in lines if line.strip()]
        return Markup("<ul>{}</ul>").format(
            Markup("").join(Markup("<li>{}</li>").format(inline(i, styles)) for i in items)
        )
    if figure := _FIGURE.fullmatch(block.strip()):
        return figures.get(figure[1], Markup(""))
    return Markup("<p>{}</p>").format(inline(" ".join(lines), styles))


def _heading(level: int, text: str, styles: Mapping[str, Look]) -> Markup:
    if level == 1:
        return Markup("")
    name = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return Markup('<h{0} id="{1}">{2}</h{0}>').format(level, name, inline(text, styles))
