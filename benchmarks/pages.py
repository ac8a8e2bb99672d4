"""Rewriting of the generated blocks of a Markdown page; the rest is written by hand.

A block is the text between `<!-- NAME -->` and `<!-- end of NAME -->`, each on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from effopd.common.files import write_atomically

DOCS = Path(__file__).parents[1] / "docs"


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """The page with the content of the named blocks replaced.

    Raises:
        ValueError: the page does not have exactly one block of a name.
    """
    for name, text in blocks.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)"
        page, count = re.subn(pattern, lambda m, text=text: f"{m[1]}\n{text.strip()}\n\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"block {name!r}: expected once in the page, found {count} times.")
    return page


def rewrite(path: Path, blocks: Mapping[str, str]) -> None:
    """Replace the named blocks of a page on disk."""
    text = with_blocks(path.read_text(), blocks)
    write_atomically(path, lambda target: target.write_text(text))
