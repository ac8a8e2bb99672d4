"""Parts of an HTML page: tables that sort, and lines with code, bold text and links."""

from __future__ import annotations

import re
from collections.abc import Mapping

from markupsafe import Markup, escape

from effopd.report.compare_lookup import Table
from effopd.report.style import Look

_INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\[([^\]]+)\]\(([^)\s]+)\)")
#: Cells longer than this are wrapped.
_LONG = 48
#: Tables with more rows scroll in a box.
_TALL = 20


def inline(text: str, styles: Mapping[str, Look] | None = None) -> Markup:
    """Code, bold text and links of one line; everything else is escaped.

    Args:
        styles: look by name; code that is such a name gets a dot in its color.
    """
    parts, end = [], 0
    for found in _INLINE.finditer(text):
        parts += [escape(text[end : found.start()]), _span(found, styles or {})]
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


def _span(found: re.Match[str], styles: Mapping[str, Look]) -> Markup:
    code, bold, name, address = found.groups()
    if code is not None:
        look = styles.get(code)
        dot = Markup('<span class="dot s" style="--l:{};--d:{}"></span>').format(look.light, look.dark) if look else ""
        return Markup("{}<code>{}</code>").format(dot, code)
    if bold is not None:
        return Markup("<b>{}</b>").format(bold)
    return Markup('<a href="{}">{}</a>').format(address, name)


def html_table(cells: Table) -> Markup:
    """A table that sorts by a click on a heading. Cells are escaped unless they are `Markup`."""
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in cells.header)
    body = Markup("\n").join(Markup("<tr>{}</tr>").format(Markup("").join(map(_cell, row))) for row in cells.rows)
    tall = " tall" if len(cells.rows) > _TALL else ""
    return Markup(
        '<div class="wide{}" tabindex="0"><table class="sorts"><thead><tr>{}</tr></thead>'
        "<tbody>\n{}\n</tbody></table></div>"
    ).format(tall, head, body)


def _cell(text: str) -> Markup:
    if isinstance(text, Markup) and text.startswith("<td"):
        return text
    plain = text.striptags() if isinstance(text, Markup) else text
    return Markup('<td class="long">{}</td>' if len(plain) > _LONG else "<td>{}</td>").format(text)
