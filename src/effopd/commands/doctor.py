"""`effopd doctor`: versions, devices, optional packages and what works on this machine.

The table is Markdown, to be pasted into an issue. No check raises or takes longer than a few
seconds; a failing check becomes its own result. Neither transformers nor TRL is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from effopd.common import machine
from effopd.common.optional import TRACKERS, is_available
from effopd.common.plugins import load_plugin, package_of, plugins
from effopd.common.versions import code, versions

#: Seconds that a check can take.
PATIENCE = 5.0


class Extra(NamedTuple):
    """An extra of this package.

    Attributes:
        modules: importable modules that it installs.
        brings: what needs it.
        without: what works without it.
    """

    modules: tuple[str, ...]
    brings: str
    without: str


EXTRAS = {
    "gguf": Extra(("gguf",), "SmolLM2 from PyPI", "SmolLM2 from the Hub"),
    "gym": Extra(("reasoning_gym",), "tasks `reasoning-gym:NAME`", "tasks `math:`, `code:`, `testbed:`"),
    "optimizers": Extra(
        ("dadaptation", "dog", "prodigyopt", "schedulefree"), "Prodigy, D-Adaptation, DoG, schedule-free AdamW",
        "optimizers of torch and transformers",
    ),
    "peft": Extra(("peft",), "LoRA", "full fine-tuning; analysis of existing adapters"),
    "plots": Extra(("matplotlib",), "figures as PNG files", "pages with interactive figures, tables, rows"),
    "quantization": Extra(("bitsandbytes",), "QLoRA, 8-bit teachers and optimizers", "weights in 16 or 32 bits"),
    "vllm": Extra(("vllm",), "rollouts by vLLM", "rollouts by transformers"),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of `effopd doctor`."""
    parser = argparse.ArgumentParser(
        prog="effopd doctor",
        description="Show versions, devices, optional packages and what works on this machine, as a table for an "
        "issue. The exit status is 1 if a required package is missing or has an untested version.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    return parser


def run_doctor(argv: Sequence[str]) -> int:
    """Run `effopd doctor`."""
    arguments = build_parser().parse_args(list(argv))
    findings = examine()
    print(json.dumps(findings, indent=2, ensure_ascii=False) if arguments.json else "\n".join(as_markdown(findings)))
    return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """All findings: `versions`, `devices`, `extras`, `trackers`, `plugins`, `works`, `problems`."""
    hub = _started(_hub)  # these wait for the network and a process while torch is imported
    sandbox = _started(_sandbox)
    devices = {
        "CPU cores": tried(machine.cores),
        "memory": tried(machine.memory),
        "accelerators": tried(lambda: "; ".join(machine.accelerators()) or "none: training on the CPU"),
        "NVIDIA driver": tried(lambda: machine.driver() or "none"),
    }
    works = {
        "bfloat16": tried(machine.bfloat16),
        "C compiler": tried(lambda: machine.compiler() or "none: needed only to install `effopd[gym]`"),
        "cache of models": tried(lambda: machine.cache_folder(_hub_cache())),
        "cache of effopd": tried(lambda: machine.cache_folder(_own_cache())),
        "sandbox for code tasks": sandbox(),
        "Hugging Face Hub": hub(),
    }
    found, problems = _required()
    declared = {f"{plugin.name} ({package_of(plugin)})": tried(partial(load_plugin, plugin)) for plugin in plugins()}
    problems += [f"plugin {name} {failure}" for name, failure in declared.items() if failure]
    return {
        "versions": {**_installed(), **found},
        "devices": devices,
        "extras": {name: _extra(extra) for name, extra in EXTRAS.items()},
        "trackers": [name for name in sorted(TRACKERS) if tried(partial(is_available, name)) is True],
        "plugins": list(declared),
        "works": works,
        "problems": problems,
    }


def tried(check: Callable[[], Any]) -> Any:
    """Result of a check, or its error as text."""
    try:
        return check()
    except Exception as error:  # every kind of broken installation is a finding
        return f"failed: {type(error).__name__}: {_first_line(error)}"


def _started(check: Callable[[], Any]) -> Callable[[], Any]:
    """Run a check in a thread; the function returned waits for its result, `PATIENCE` s at most."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(tried(check)), daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(PATIENCE)
        return results[0] if results else f"failed: no result within {PATIENCE:g} s"

    return wait


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _installed() -> dict[str, Any]:
    return {
        "effopd": f"{tried(lambda: versions(('effopd',))['effopd'])}, source {tried(code)}",
        "python": versions(())["python"],
        "system": tried(machine.system),
    }


def _required() -> tuple[dict[str, str], list[str]]:
    """(version of each required package, problems), by the ranges of this package's metadata."""
    found: dict[str, str] = {}
    problems: list[str] = []
    try:
        lines = metadata.requires("effopd") or []
    except metadata.PackageNotFoundError:
        lines, problems = [], ["effopd is not installed. Run in a clone: pip install ."]
    for line in lines:
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", requirement.strip())[0]
        if "extra ==" in marker:
            continue
        found[name] = versions((name,))[name]
        if found[name] == "not installed":
            problems.append(f"{name} is missing. Install it with: pip install '{requirement.strip()}'")
        elif wanted := tried(partial(_unmet, requirement, found[name])):
            problems.append(f"{name} {found[name]}: expected {wanted}. Run: pip install '{requirement.strip()}'")
    broken = tried(lambda: __import__("torch") and "")
    return found, problems + ([f"torch cannot be imported: {broken}"] if broken else [])


def _unmet(requirement: str, version: str) -> str:
    """Range of versions in a requirement; "" if `version` is in it or cannot be compared."""
    if not is_available("packaging"):
        return ""
    from packaging.requirements import Requirement

    specifier = Requirement(requirement).specifier
    return "" if specifier.contains(version, prereleases=True) else str(specifier)


def _extra(extra: Extra) -> dict[str, Any]:
    missing = [name for name in extra.modules if tried(partial(is_available, name)) is not True]
    return {"installed": not missing, "missing": missing, "brings": extra.brings, "without": extra.without}


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _own_cache() -> Path:
    from effopd.tasks.builtin_models import smollm2_path

    return smollm2_path().parent


def _hub() -> str:
    from huggingface_hub import constants

    from effopd.tasks.builtin_models import hub_is_reachable

    if constants.HF_HUB_OFFLINE:
        return "offline: HF_HUB_OFFLINE is set"
    place = f"{constants.ENDPOINT}{'' if os.environ.get('HF_TOKEN') is None else ', with HF_TOKEN'}"
    return f"reachable: {place}" if hub_is_reachable(timeout=3.0) else f"not reachable within 3 s: {place}"


def _sandbox() -> str:
    from effopd.tasks.code.verifier import CodeVerifier

    verifier = CodeVerifier({"workers": 1, "packages": []})
    try:
        verifier.check()
    finally:
        verifier.pool.close()
    return "works (bubblewrap)"


# -- output ----------------------------------------------------------------------------------------


def as_markdown(findings: dict[str, Any]) -> Iterable[str]:
    """Lines of the findings as Markdown tables."""
    yield from _table(("package", "version"), findings["versions"].items())
    yield from _table(("device", "found"), findings["devices"].items())
    yield from _table(("on this machine", "result"), findings["works"].items())
    rows = [
        (f"`effopd[{name}]`", _state(extra), extra["brings"], extra["without"])
        for name, extra in findings["extras"].items()
    ]
    yield from _table(("extra", "installed", "brings", "works without it"), rows)
    if findings["trackers"]:
        yield f"Packages for `--report_to`: {', '.join(findings['trackers'])}"
    if findings["plugins"]:
        yield f"Plugins: {', '.join(findings['plugins'])}"
    for problem in findings["problems"]:
        yield f"**Problem**: {problem}"
    if not findings["problems"]:
        yield "All required packages are installed, in versions that were tested."


def _state(extra: dict[str, Any]) -> str:
    return f"no: {', '.join(extra['missing'])}" if extra["missing"] else "yes"


def _table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heading, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heading))]
    for number, row in enumerate(cells):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    yield ""
