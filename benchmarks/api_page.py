"""Table of the public Python names, with the first line of each docstring.

python benchmarks/api_page.py            # print it
python benchmarks/api_page.py --write    # rewrite the block of docs/api.md
"""

from __future__ import annotations

import inspect
import sys

from pages import DOCS, rewrite

import effopd

PAGE = DOCS / "api.md"


def row(name: str) -> str:
    """Name, kind and first docstring line of a public name."""
    thing = getattr(effopd, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"| `effopd.{name}` | {type(thing).__name__} | version of this package |"
    text = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return f"| `effopd.{name}` | {'class' if inspect.isclass(thing) else 'function'} | {text} |"


def blocks() -> dict[str, str]:
    """The generated block of docs/api.md."""
    return {"names": "\n".join(["| name | kind | what it is |", "|---|---|---|", *map(row, effopd.__all__)])}


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        rewrite(PAGE, blocks())
    else:
        print(blocks()["names"])
