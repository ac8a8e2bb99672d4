"""The built wheel holds what the package needs and works outside of this repository."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import effopd

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what an earlier build left behind is not in it, and two builds do not
    meet.
    """
    out, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src" / "effopd", tree / "src" / "effopd", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_code_assets_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "effopd/py.typed",
        "effopd/runs/model_card.md",
        "effopd/testbed/assets/card.json",
        "effopd/testbed/assets/student/model.safetensors",
        "effopd/testbed/assets/teacher/chat_template.jinja",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "runs", "benchmarks")) for name in names)
    source = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "effopd").rglob("*.py")}
    assert source == {name for name in names if name.endswith(".py")}


def test_help_works_from_an_environment_with_nothing_else(wheel, tmp_path):
    """No torch, no transformers: `effopd --help`, `--version` and the light imports need the
    standard library only.
    """
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    for arguments, expected in (
        (["-m", "effopd.commands.main", "--help"], "quickstart"),
        (["-m", "effopd.commands.main", "--version"], "effopd 0."),
        (["-c", "import effopd; from effopd import Task, Example; print(Task('t', (), lambda c, e: 0.0).name)"], "t"),
    ):
        result = subprocess.run(
            [environment / "bin" / "python", *arguments], capture_output=True, text=True, cwd=tmp_path, env=clean
        )
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout


@pytest.mark.slow
def test_examples_in_docstrings_are_true():
    ran = 0
    for module in pkgutil.walk_packages(effopd.__path__, "effopd."):
        if not module.name.endswith("__main__"):
            result = doctest.testmod(importlib.import_module(module.name))
            assert not result.failed, module.name
            ran += result.attempted
    assert ran > 20


def test_public_names_are_what_they_say_whatever_was_imported_before():
    for module in pkgutil.walk_packages(effopd.__path__, "effopd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in effopd.__all__:
        assert not inspect.ismodule(getattr(effopd, name)), name  # a module of that name would hide it
