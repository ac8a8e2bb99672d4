"""Rooms and file tree of the package, with the first docstring sentence of every module.

python benchmarks/architecture_tree.py            # print both
python benchmarks/architecture_tree.py --write    # rewrite the blocks of docs/architecture.md
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from pages import DOCS, rewrite

PACKAGE = DOCS.parent / "src" / "effopd"
PAGE = DOCS / "architecture.md"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    paragraph = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z`])", paragraph)[0]


def entries(folder: Path) -> list[Path]:
    """Packages, then modules of a folder, without `__init__.py`."""
    packages = sorted(path for path in folder.iterdir() if (path / "__init__.py").exists())
    return packages + sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def tree(folder: Path = PACKAGE) -> list[tuple[str, str]]:
    """(branch with the name, sentence) of every package and module below a folder."""
    lines = []
    children = entries(folder)
    for path in children:
        last = path == children[-1]
        module = path / "__init__.py" if path.is_dir() else path
        lines.append((("└── " if last else "├── ") + path.name + "/" * path.is_dir(), first_sentence(module)))
        if path.is_dir():
            lines += [(("    " if last else "│   ") + branch, text) for branch, text in tree(path)]
    return lines


def imports() -> dict[str, set[str]]:
    """Room → rooms that its modules import, at module level or inside functions."""
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    arrows: dict[str, set[str]] = {}
    for room in rooms:
        nodes = [node for path in (PACKAGE / room).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
        names = [f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) and node.module
                 for alias in node.names]  # fmt: skip
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        targets = {name.split(".")[1] for name in names if name.startswith("effopd.")}
        arrows[room] = (targets & rooms) - {room}
    return arrows


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Room → floor: one above the highest room that it imports; the ground floor is 0."""
    levels = dict.fromkeys(arrows, 0)
    for _ in arrows:  # bounds the loop: a cycle of rooms never converges
        levels = {room: 1 + max((levels[target] for target in arrows[room]), default=-1) for room in arrows}
    return levels


def rooms_table() -> str:
    """One row per room, the highest floor first."""
    arrows = imports()
    levels = floors(arrows)
    lines = ["| floor | room | contents | imports from |", "|--:|---|---|---|"]
    for room in sorted(arrows, key=lambda room: (-levels[room], room)):
        below = ", ".join(sorted(arrows[room], key=lambda target: (-levels[target], target)))
        lines.append(f"| {levels[room]} | `{room}` | {first_sentence(PACKAGE / room / '__init__.py')} | {below} |")
    return "\n".join(lines)


def blocks() -> dict[str, str]:
    """The generated blocks of docs/architecture.md."""
    lines = tree()
    width = max(len(branch) for branch, _ in lines)
    body = "\n".join(f"{branch:<{width}}  {text}".rstrip() for branch, text in lines)
    return {"rooms": rooms_table(), "tree": f"```\nsrc/effopd/\n{body}\n```"}


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        rewrite(PAGE, blocks())
    else:
        print("\n\n".join(blocks().values()))
