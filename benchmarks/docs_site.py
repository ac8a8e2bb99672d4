"""mkdocs hook: pages of the documentation site that are generated from the code.

    index.md, changelog.md        README.md and CHANGELOG.md
    reference/commands/NAME.md    the text of `effopd NAME --help`
    reference/settings.md         own fields of the configuration dataclasses, plan of `compare`
    reference/api.md              docstrings of the names in `effopd.__all__`

Links to files outside docs/ become plain text. Long tables of measurements are folded. Pages that
load something from another host fail the build. `make docs` builds the site.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import effopd
from effopd.commands.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
#: Configuration classes, in the order of the page.
SETTINGS = {
    "On-policy distillation (`effopd train`)": "effopd.distill.config:OPDConfig",
    "The look-ahead (`--effopd.FIELD`)": "effopd.extrapolate.config:EffOPDConfig",
    "Tasks": "effopd.tasks.config:TaskConfig",
    "Reinforcement learning (`effopd rl`)": "effopd.distill.rl_config:RLArguments",
    "dGRPO (`effopd rl --algorithm dgrpo`)": "effopd.distill.rl_config:TaskDGRPOConfig",
    "Stored answers (`effopd cache`)": "effopd.commands.cache:CacheArguments",
    "Evaluation (`effopd eval`)": "effopd.commands.evaluate:EvalArguments",
    "Sampling (`effopd eval`, `effopd intervene`)": "effopd.tasks.sampling:Sampling",
    "Interventions (`effopd intervene`)": "effopd.commands.intervene_parser:InterveneArguments",
    "Points of an intervention (`effopd intervene`)": "effopd.interventions.options:InterventionOptions",
    "The demo (`effopd quickstart`)": "effopd.commands.quickstart_settings:QuickstartArguments",
}
#: Module whose docstring has the YAML keys of a plan.
PLAN = "effopd.compare.grid"
#: Columns of the help texts on the site.
WIDTH = 100
#: Tables with more rows are folded, except on the pages that are looked up row by row.
LONGEST_OPEN_TABLE = 12
NEVER_FOLDED = (
    "index.md", "guide.md", "paper_index.md", "run_files.md", "code_tasks.md", "cluster.md", "hosts.md", "teachers.md",
    "howto/", "tutorials/", "concepts/", "reference/", "log",
)  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (mkdocs event)."""
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links to files outside docs/ by their text, and fold tables (mkdocs event)."""
    name = page.file.src_uri
    text = inside(markdown, name, {file.src_uri for file in files})
    return text if name.startswith(NEVER_FOLDED) else folded(text)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that loads something from another host (mkdocs event)."""
    from mkdocs.exceptions import PluginError

    if found := foreign(output):
        raise PluginError(f"{page.file.src_uri} loads {', '.join(found)}: expected files of the site only.")
    return output


#: A tag whose addresses the browser does not load by itself, and an attribute with an address.
_LINK = re.compile(r'<(a|area|base)\b|<link\b[^>]*rel="?(canonical|alternate|next|prev)\b', re.IGNORECASE)
_LOADED = re.compile(r"""\b(?:src|srcset|href|data|poster)=["']?\s*((?:https?:)?//[^"'\s>]+)""", re.IGNORECASE)
_STYLED = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s;]+)""", re.IGNORECASE)


def foreign(html: str) -> list[str]:
    """Addresses on other hosts from which a page loads scripts, styles, fonts, images or data.

    Links are allowed. Also found: diagrams for which the theme loads mermaid, and `repo_url`, for
    which it asks GitHub.
    """
    text = re.sub(r"<(pre|code)\b.*?</\1>|<!--.*?-->", "", html, flags=re.DOTALL)
    tags = [tag for tag in re.findall(r"<[a-z][^>]*>", text, flags=re.IGNORECASE) if not _LINK.match(tag)]
    found = [address for tag in tags for address in _LOADED.findall(tag)]
    for style in re.findall(r'<style\b.*?</style>|style="[^"]*"', text, flags=re.DOTALL):
        found += _STYLED.findall(style)
    found += ["mermaid"] * bool(re.search(r'class="[^"]*\bmermaid\b', html))
    return found + ["facts of repo_url"] * ('data-md-component="source"' in html)


def generated() -> dict[str, str]:
    """Path within the site → text of all generated pages."""
    pages = {
        "index.md": from_root((ROOT / "README.md").read_text()),
        "changelog.md": from_root((ROOT / "CHANGELOG.md").read_text()),
        "reference/settings.md": settings_page(),
        "reference/api.md": api_page(),
    }
    return pages | {f"reference/commands/{name}.md": command_page(name) for name in COMMANDS}


def from_root(text: str) -> str:
    """A page of the repository's root, with links relative to docs/."""
    text = re.sub(r"(\]\()docs/", r"\1", text)
    return re.sub(r'(src|srcset)="docs/', r'\1="', text)


def command_page(name: str) -> str:
    """Page of a command: its `--help`, unchanged."""
    return f"# effopd {name}\n\n{COMMANDS[name][1].rstrip('.')}.\n\n```text\n{help_of(name)}\n```\n"


def help_of(name: str) -> str:
    """Text of `effopd NAME --help` at a width of 100 columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([name, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return out.getvalue().rstrip()


def settings_page() -> str:
    """Tables of the fields that the configuration classes add to those of transformers and TRL."""
    parts = [
        "# Settings\n\nFields are flags (`--FIELD`) and keys of a YAML file (`--config FILE`). The tables hold the "
        "fields that `effopd` defines. Fields of TRL and transformers are in the help of each command."
    ]
    for title, path in SETTINGS.items():
        module, _, name = path.partition(":")
        kind = getattr(importlib.import_module(module), name)
        rows = [f"| `{field}` | `{default}` | {text} |" for field, default, text in fields_of(kind)]
        parts.append(
            f"## {title}\n\n`{module}.{name}`\n\n| field | default | description |\n|---|---|---|\n" + "\n".join(rows)
        )
    parts.append(f"## Plan of a comparison (`effopd compare FILE`)\n\n{inspect.getdoc(importlib.import_module(PLAN))}")
    return "\n\n".join(parts) + "\n"


def fields_of(kind: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and description of the fields defined in effopd, in order."""
    ours = {
        name
        for each in kind.__mro__
        if each.__module__.startswith("effopd")
        for name in vars(each).get("__annotations__", {})
    }
    for field in dataclasses.fields(kind):
        if field.name in ours:
            yield field.name, _default(field), _cell(field.metadata.get("help", ""))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _cell(str(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return _cell(str(field.default_factory()))
    return "required"


def _cell(text: str) -> str:
    return " ".join(text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").split())


def api_page() -> str:
    """Reference of the public Python names."""
    names: Mapping[str, str] = effopd._NAMES
    entries = [
        f"## {name}\n\n::: {names[name]}.{name}\n    options:\n      show_root_heading: false" for name in names
    ]
    return (
        "# Python API\n\nAll names are imported from the package: `from effopd import OPDTrainer`. "
        "`effopd.__version__` is the version.\n\n" + "\n\n".join(entries) + "\n"
    )


def folded(markdown: str) -> str:
    """The page with every long table in a `<details>` element that names its first columns."""

    def fold(match: re.Match[str]) -> str:
        head, *rows = match.group().splitlines()
        if len(rows) - 1 <= LONGEST_OPEN_TABLE:
            return match.group()
        columns = [cell.strip().strip("`*") for cell in head.strip("|").split("|") if cell.strip()]
        title = f"{len(rows) - 1} rows: {', '.join(columns[:4])}{', …' * (len(columns) > 4)}"
        return f'<details class="table" markdown="1">\n<summary>{title}</summary>\n\n{match.group()}\n</details>\n'

    return re.sub(r"(?:^\|.*\|$\n)+", fold, markdown, flags=re.MULTILINE)


def inside(markdown: str, page: str, known: set[str]) -> str:
    """The page with links to files that are not part of the site replaced by their text."""

    def replace(match: re.Match[str]) -> str:
        text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match.group()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.partition("#")[0]))
        return match.group() if target in known else text

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", replace, markdown)
