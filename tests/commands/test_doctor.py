"""`effopd doctor`: every section is filled, and a check that fails is a finding."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from effopd.commands import doctor
from effopd.commands.main import main
from effopd.common import machine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_sandbox(monkeypatch):
    """The sandbox has tests of its own, and starting it takes time."""
    monkeypatch.setattr(doctor, "_sandbox", lambda: "works")


def test_tables_and_json_have_the_same_findings(no_sandbox, capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    findings = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "extras", "works", "problems"} <= findings.keys()
    assert findings["works"]["bfloat16"].startswith("works on")
    assert findings["works"]["Hugging Face Hub"] == "offline: HF_HUB_OFFLINE is set"
    assert "writable" in findings["works"]["cache of models"]
    text = "\n".join(doctor.as_markdown(findings))
    for section in ("versions", "devices", "works"):
        for name, value in findings[section].items():
            assert any(name in line and str(value) in line for line in text.splitlines()), name
    for name in doctor.EXTRAS:
        assert f"`effopd[{name}]`" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_every_extra_has_a_row():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"all", "dev", "docs"}
    assert set(extras["all"][0].partition("[")[2].rstrip("]").split(",")) == set(doctor.EXTRAS) - {"vllm"}


def test_failing_checks_are_findings(no_sandbox, monkeypatch, capsys):
    def broken(*_):
        raise OSError(f"no such thing{' and more' * 40} to the end\nsecond line")

    for name in ("cores", "memory", "accelerators", "bfloat16", "compiler", "cache_folder", "driver", "system"):
        monkeypatch.setattr(machine, name, broken)
    for name in ("code", "_hub", "_sandbox", "is_available"):
        monkeypatch.setattr(doctor, name, broken)
    assert main(["doctor"]) in (0, 1)
    printed = capsys.readouterr().out
    assert printed.count("failed: OSError: no such thing") >= 9 and "second line" not in printed
    assert printed.count(" and more to the end") >= 9 and "No problem" not in printed


def test_the_last_sentence_speaks_of_required_packages_only():
    findings = {"versions": {}, "devices": {}, "works": {"sandbox": "failed: SandboxError"}, "extras": {}}
    lines = list(doctor.as_markdown(findings | {"trackers": [], "plugins": [], "problems": []}))
    assert lines[-1] == "All required packages are installed, in versions that were tested."


def test_a_check_that_hangs_is_left_behind(monkeypatch):
    import threading

    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    assert "no result within" in doctor._started(threading.Event().wait)()


def test_versions_out_of_range_and_missing_packages_are_problems(monkeypatch):
    lines = ["torch>=2.10", "numpy>=99", "no-such-package>=1", "peft>=99; extra == 'peft'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    found, problems = doctor._required()
    assert set(found) == {"torch", "numpy", "no-such-package"} and len(problems) == 2
    assert "expected >=99" in problems[0] and "pip install 'no-such-package>=1'" in problems[1]


def test_memory_is_that_of_the_container(tmp_path):
    (tmp_path / "max").write_text("1000000000\n")
    (tmp_path / "none").write_text("max\n")
    assert machine.memory((str(tmp_path / "max"),)).startswith("1.0 GB (limit of the container")
    assert "limit" not in machine.memory((str(tmp_path / "none"), str(tmp_path / "missing")))
