"""Check the relative links of all Markdown pages: target files and headings must exist.

    python benchmarks/check_links.py

Prints one line per broken link and exits with status 1 if there is any. `make lint` runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def markdown_pages() -> list[Path]:
    """All pages of the repository; in an unpacked sdist, those of the root and docs/."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    found = [ROOT / name for name in listed] or [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [path for path in found if path.exists() and path.name != "model_card.md"]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def nameless_figures(page: Path) -> list[str]:
    """Figures of a page without an alternative text of at least two words."""
    found = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text())
    return [source for text, source in found if len(text.split()) < 2]


def main() -> int:
    """Check all pages and return the exit status."""
    faults = []
    for page in markdown_pages():
        name = page.relative_to(ROOT)
        faults += [f"{name}: broken link {link}" for link in broken_links(page)]
        faults += [f"{name}: describe {source} in at least two words" for source in nameless_figures(page)]
    print("\n".join(faults) or "all links resolve")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
