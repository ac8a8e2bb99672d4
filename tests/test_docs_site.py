"""The documentation site: generated pages, links, navigation, and the index of the log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import docs_site
import pytest

import effopd
from effopd.commands.main import COMMANDS

DOCS = Path(__file__).parents[1] / "docs"


def test_links_out_of_the_site_become_text():
    page = "[a](search.md) [b](../benchmarks/README.md) [c](#x) [d](https://example.org) ![e](../x.png) [`f`](x.json)"
    assert docs_site.inside(page, "log/entry.md", {"log/search.md"}) == (
        "[a](search.md) b [c](#x) [d](https://example.org) ![e](../x.png) `f`"
    )


def test_the_front_page_links_within_the_site():
    assert docs_site.from_root('[g](docs/guide.md#x) <img src="docs/a.png">') == '[g](guide.md#x) <img src="a.png">'


def test_settings_are_the_fields_that_the_package_adds():
    page = docs_site.settings_page()
    assert "| `rollout_horizon` |" in page and "| `score_rollouts` | `None` |" in page
    assert "| `warmup_steps` |" not in page  # of transformers


def test_every_public_name_has_an_entry():
    page = docs_site.api_page()
    assert re.findall(r"^## (\w+)$", page, flags=re.M) == [name for name in effopd.__all__ if name != "__version__"]


def test_the_log_lists_its_pages_by_title_newest_first():
    rows = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\(log/(.+)\) \|$", (DOCS / "log.md").read_text(), flags=re.M)
    assert [name for _, _, name in rows] == list(dict.fromkeys(name for _, _, name in rows))
    assert {name for _, _, name in rows} == {path.name for path in (DOCS / "log").glob("*.md")}
    assert [date for date, _, _ in rows] == sorted((date for date, _, _ in rows), reverse=True)
    for date, title, name in rows:
        assert (DOCS / "log" / name).read_text().startswith(f"# {title}\n\n*{date}*\n") and name.startswith(date)


def test_the_navigation_has_every_command():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert set(re.findall(r"reference/commands/(\w+)\.md", navigation)) == set(COMMANDS)


@pytest.mark.slow
def test_the_page_of_a_command_is_its_help():
    environment = {**os.environ, "COLUMNS": str(docs_site.WIDTH)}
    helped = subprocess.run(
        [sys.executable, "-m", "effopd", "analyze", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert f"```text\n{helped.stdout.rstrip()}\n```" in docs_site.command_page("analyze")
