"""The documentation site: generated pages, links, navigation, and the index of the log."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

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


def test_long_tables_fold_and_short_ones_do_not():
    def table(rows):
        return "| task | `KL` |\n|---|---|\n" + "| a | 1 |\n" * rows

    short, long = table(docs_site.LONGEST_OPEN_TABLE), table(docs_site.LONGEST_OPEN_TABLE + 1)
    assert docs_site.folded(f"# Page\n\n{short}\nText\n") == f"# Page\n\n{short}\nText\n"
    page = docs_site.folded(f"# Page\n\n{long}\nText\n")
    assert "<summary>13 rows: task, KL</summary>" in page and page.count("<details") == page.count("</details>") == 1
    assert long in page


def test_the_front_page_links_within_the_site():
    assert docs_site.from_root('[g](docs/guide.md#x) <img src="docs/a.png">') == '[g](guide.md#x) <img src="a.png">'


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<a href="https://example.org">x</a><img src="a.png"><script src="../b.js"></script>', []),
        ('<link rel="canonical" href="https://example.org"><img src="data:image/png;base64,//x">', []),
        ('<pre><code>&lt;script src="https://example.org/a.js"&gt;</code></pre>', []),
        ("<script async src='https://unpkg.com/a.js'></script>", ["https://unpkg.com/a.js"]),
        ('<link rel="stylesheet" href="//fonts.example/css?a">', ["//fonts.example/css?a"]),
        ('<link rel="preconnect" href="https://fonts.example" crossorigin>', ["https://fonts.example"]),
        ('<img alt="x"\n src="https://img.shields.io/a">', ["https://img.shields.io/a"]),
        ("<style>@import url('https://fonts.example/a.css');</style>", ["https://fonts.example/a.css"]),
        ('<p style="background: url(//x.example/a.png)">', ["//x.example/a.png"]),
        ('<div class="mermaid">flowchart</div>', ["mermaid"]),
        ('<div data-md-component="source">', ["facts of repo_url"]),
    ],
)
def test_what_a_page_loads_from_other_hosts(html, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "mkdocs", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mkdocs.exceptions", SimpleNamespace(PluginError=RuntimeError))
    assert docs_site.foreign(html) == found
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    if found:
        with pytest.raises(RuntimeError, match=r"page\.md loads "):
            docs_site.on_post_page(html, page, None)
    else:
        assert docs_site.on_post_page(html, page, None) == html


def test_no_page_and_no_setting_loads_from_other_hosts():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert "font: false" in navigation and not re.search(r"^\s*-? ?\w*(mermaid|repo_url|://)", navigation, flags=re.M)
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CHANGELOG.md"]
    for page in pages:
        text = page.read_text()
        assert "```mermaid" not in text and not re.search(r"!\[[^\]]*\]\((https?:)?//|^\[!\[", text, flags=re.M), page
    for style in (DOCS / "stylesheets").iterdir():
        assert "//" not in style.read_text(), style


def test_settings_are_the_fields_that_the_package_adds():
    page = docs_site.settings_page()
    assert "| `rollout_horizon` |" in page and "| `score_rollouts` | `None` |" in page
    assert "| `warmup_steps` |" not in page  # of transformers
    assert "reference_learning_rate: 3.0e-5" in page  # a plan of `effopd compare`
    for path in (DOCS.parent / "src").rglob("*.py"):
        for name in fields_with_help(path):
            assert f"| `{name}` |" in page or f"{name} (" in page, f"{name} of {path.name}"


def fields_with_help(path: Path) -> list[str]:
    """Names of the dataclass fields in a file that have a help text."""
    assigned = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.AnnAssign)]
    return [
        node.target.id
        for node in assigned
        if isinstance(node.value, ast.Call)
        and isinstance(node.target, ast.Name)
        and any(word.arg == "metadata" for word in node.value.keywords)
    ]


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


def test_documented_arguments_of_public_functions_are_in_the_signature():
    """The build warns of others, and warnings are errors."""
    for name, module in effopd._NAMES.items():
        path = (DOCS.parent / "src").joinpath(*module.split("."))
        source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        nodes = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", None) == name]
        functions = [each for node in nodes for each in ast.walk(node) if isinstance(each, ast.FunctionDef)]
        for function in functions:
            section = re.search(r"^Args:\n((?: +.*\n?|\n)+)", ast.get_docstring(function) or "", flags=re.M)
            entries = re.findall(r"^    (\S[^:`]*):", section.group(1), flags=re.M) if section else []
            parameters = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
            assert {entry.lstrip("*") for entry in entries} <= parameters, f"{module}.{name}: {function.name}"


def test_every_page_is_in_the_navigation_or_listed_as_left_out():
    """Otherwise the build, which is strict, fails."""
    left_out, navigation = re.split(r"^nav:$", (DOCS.parent / "mkdocs.yml").read_text(), flags=re.M)
    listed = set(re.findall(r": (\S+\.md)$", navigation, flags=re.M))
    patterns = re.findall(r"^  (\S+\.md)$", left_out, flags=re.M)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    unlisted = {page for page in pages - listed if not any(fnmatch(page, pattern) for pattern in patterns)}
    assert not unlisted
    assert all(page.startswith(("index", "changelog", "reference/")) for page in listed - pages)  # generated


#: Prints the help of every command, each as its own call in a terminal does.
HELPED = """
import contextlib, io, json
from effopd.commands.main import COMMANDS, main
texts = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([name, "--help"])
    texts[name] = out.getvalue()
print(json.dumps(texts))
"""


@pytest.mark.slow
def test_the_page_of_every_command_is_its_help():
    environment = {**os.environ, "COLUMNS": str(docs_site.WIDTH)}
    helped = subprocess.run(
        [sys.executable, "-c", HELPED], capture_output=True, text=True, env=environment, check=True
    )
    texts = json.loads(helped.stdout)
    assert set(texts) == set(COMMANDS)
    for name, text in texts.items():
        assert f"effopd {name}" in text and f"```text\n{text.rstrip()}\n```" in docs_site.command_page(name), name
