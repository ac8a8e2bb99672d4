"""Strategies and tasks of another package work in every command, also in the runs of `compare`."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers.tiny_models import make_model, make_tokenizer

from effopd.commands import main as command_line
from effopd.commands.main import COMMANDS, main
from effopd.common.files import read_rows
from effopd.common.plugins import GROUP, load_plugins, plugins
from effopd.common.versions import versions
from effopd.errors import PluginError
from effopd.extrapolate.strategy import STRATEGIES
from effopd.tasks.kinds import TASK_KINDS

ROOT = Path(__file__).parents[2]
#: The package of the pages: its files and its entry points.
STRATEGY, TASK = (
    next(block for block in re.findall(r"^ *```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
         if f"{registry}[" in block)
    for page, registry in (("docs/add-a-strategy.md", "STRATEGIES"), ("docs/add-a-task.md", "TASK_KINDS"))
)  # fmt: skip
(PROJECT,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/add-a-strategy.md").read_text(), re.DOTALL)


def install(folder: Path, entries: dict[str, str], **files: str) -> Path:
    """A package `my_package` with its metadata, as pip leaves them on `sys.path`."""
    project = tomllib.loads(PROJECT)["project"]
    package, metadata = folder / "my_package", folder / f"my_package-{project['version']}.dist-info"
    for each in (package, metadata):
        each.mkdir()
    for name, text in {"__init__": "", **files}.items():
        (package / f"{name}.py").write_text(text)
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install for this process and its children; what is registered here is removed afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    registries = [(registry, dict(registry)) for registry in (STRATEGIES, TASK_KINDS)]
    yield lambda entries, **files: install(tmp_path, entries, **files)
    for registry, before in registries:
        for name in set(registry) - set(before):
            del registry[name]
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.slow
def test_compare_runs_a_strategy_and_a_task_of_another_package(installed, tmp_path, monkeypatch):
    """The files of the pages, as a package; the run is a process of its own."""
    monkeypatch.chdir(tmp_path)
    entries = tomllib.loads(PROJECT)["project"]["entry-points"][GROUP] | {"sums": "my_package.sums"}
    task = "\n".join(line.removeprefix("   ") for line in TASK.splitlines())
    installed(entries, step_back=STRATEGY, sums=task)
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    plan = {
        "output_dir": "grid", "reference_learning_rate": 1.0e-3, "tasks": ["sums:doubles"], "seeds": [0], "threads": 1,
        "base": {
            "model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "as_chat": False,
            "train_size": 16, "eval_size": 4, "max_steps": 2, "per_device_train_batch_size": 4,
            "max_completion_length": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True,
            "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        },
        "strategies": {"mine": {"effopd": {"strategy": "step_back", "args": {"share": 0.25}, "validation_size": 4}}},
        "baseline": "mine",
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert main(["compare", "plan.yaml", "--dry_run"]) == 0

    assert main(["compare", "plan.yaml"]) == 0

    run = tmp_path / "grid" / "sums-doubles" / "mine" / "lr-0.001" / "seed-0"
    searches = list(read_rows(run / "searches.jsonl"))
    assert [[trial["scale"] for trial in search["trials"]] for search in searches] == [[0.0, -0.25]] * 2
    assert "# my-package 0.1\n" in (run / "config.yaml").read_text()
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize(
    ("value", "text", "said"),
    [
        ("my_package.missing", "", "ModuleNotFoundError: No module named 'my_package.missing'"),
        ("my_package.faulty", "1 / 0", "ZeroDivisionError: division by zero"),
        ("my_package.faulty:register", "", "expected the name of a module, got 'my_package.faulty:register'"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(value, text, said, installed, capsys):
    installed({"mine": value}, faulty=text)
    for command in sorted(COMMANDS.keys() - {"doctor"}):
        assert main([command]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"effopd {command}: PluginError: plugin 'mine' of my-package 0.1: ")
        assert said in printed


def test_plugins_are_imported_and_their_packages_recorded(installed):
    installed({"b": "my_package.one", "a": "my_package.two"}, one="", two="")
    assert [plugin.name for plugin in plugins()] == ["a", "b"]
    load_plugins()
    assert {"my_package.one", "my_package.two"} <= set(sys.modules)
    assert versions()["my-package"] == "0.1" and "my-package" not in versions(("torch",))


def test_the_help_of_plugins_is_not_cached(installed, monkeypatch):
    def cached(*_):
        raise AssertionError("the cached text lacks the plugin")

    installed({"mine": "my_package.one"}, one="")
    monkeypatch.setattr(command_line, "help_text", cached)
    monkeypatch.setitem(COMMANDS, "train", (lambda argv: 0, ""))
    assert main(["train", "--help"]) == 0


def test_doctor_lists_plugins_and_their_faults(installed, capsys):
    installed({"good": "my_package.one", "bad": "my_package.two"}, one="", two="import no_such_module")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["plugins"] == ["bad (my-package 0.1)", "good (my-package 0.1)"]
    (problem,) = [text for text in found["problems"] if "plugin" in text]
    assert "No module named 'no_such_module'" in problem and "my-package 0.1" in problem


def test_every_plugin_fault_is_also_an_import_error():
    assert issubclass(PluginError, ImportError)
