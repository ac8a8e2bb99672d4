"""The built wheel holds what the package needs and works outside of this repository."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import api_page
import pages
import pytest
import yaml

import effopd

ROOT = Path(__file__).parents[1]


def tracked() -> list[str]:
    """Files of the repository, relative to its root; in an unpacked sdist, all files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()] or [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder with the sdist and the wheel made from it, as a release has them. Built from a copy:
    what an earlier build left behind is not in them, and two builds do not meet.
    """
    out, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tree")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return next(dist.glob("*.whl"))


@pytest.mark.slow
def test_sdist_holds_what_the_repository_holds(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if name != ".gitignore"} <= names
    assert {name for name in names if name.startswith("runs")} == set()


@pytest.mark.slow
def test_metadata_asks_for_no_compiler_and_names_the_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
    needs = re.findall(r"^Requires-Dist: (.*)$", archive.read(name).decode(), flags=re.MULTILINE)
    core = [line for line in needs if "extra ==" not in line]
    assert core and not any(line.startswith("reasoning-gym") for line in core)
    assert any(re.match(r"reasoning-gym.*extra == .gym.", line) for line in needs)
    assert any(re.match(r"effopd\[gguf,gym,.*extra == .all.", line) for line in needs)


@pytest.mark.slow
def test_wheel_holds_code_assets_and_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "effopd/py.typed",
        "effopd/runs/model_card.md",
        "effopd/tasks/spell_backward_words.txt",
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
    doctor = [environment / "bin" / "python", "-m", "effopd", "doctor", "--json"]
    result = subprocess.run(doctor, capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert result.returncode == 1 and not result.stderr  # everything is missing, and nothing is raised
    findings = json.loads(result.stdout)
    assert any(line.startswith("torch is missing") for line in findings["problems"])
    assert findings["works"]["bfloat16"].startswith("failed")


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


@pytest.mark.slow
def test_the_page_of_public_names_is_that_of_the_package():
    text = api_page.PAGE.read_text()
    assert pages.with_blocks(text, api_page.blocks()) == text, "run benchmarks/api_page.py --write"
    assert all(inspect.getdoc(getattr(effopd, name)) for name in effopd.__all__ if name != "__version__")
    imported = set(re.findall(r"^    from effopd\S+ import (\w+) as \1$", inspect.getsource(effopd), re.MULTILINE))
    assert imported == set(effopd.__all__) - {"__version__"}  # what a type checker sees


GROUPS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_version_and_changelog_have_their_forms():
    number = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((a|b|rc|\.dev)\d+)?"
    assert re.fullmatch(number, effopd.__version__)
    assert f"version: {effopd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(rf"\[{number}\] - \d{{4}}-\d\d-\d\d", version) for version in versions[1:])
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        groups = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert set(groups) <= GROUPS and len(set(groups)) == len(groups)


def test_files_of_github_are_valid():
    for path in (ROOT / ".github").rglob("*.yml"):
        content = yaml.safe_load(path.read_text())
        if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config":
            assert content["name"] and content["description"]
            assert any(item.get("id") for item in content["body"])
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for step in jobs["check"]["steps"]]
    assert any(".ci/run" in step for step in steps)
