"""The GPU script without a GPU: every part with tiny sizes, time limits, pieces, packages, page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import gpu_pack
import pages
import pytest
from gpu_parts import __main__ as driver
from gpu_parts import comparison, model_pieces, results, tables
from gpu_parts.plan import PARTS, Deadline, Part, allowed
from helpers.processes import run_script
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SECONDS = {"rollout", "teacher", "update", "search", "other", "net"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Results of all parts."""
    state = tmp_path_factory.mktemp("state")
    status, said = run_script(Path(__file__).with_name("rehearse.py"), state, timeout=900)
    assert status == 0, said[-5000:]
    return state / "results", said


@pytest.mark.slow
def test_every_part_ends_with_its_results(rehearsed):
    folder, said = rehearsed
    contents = {part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS}
    for content in contents.values():
        assert content["rehearsal"] and content["machine"]["device"] == "CPU"
        entries = content["units"]
        assert all(entry.get("complete") for entry in entries.values()), said[-3000:]
    units = {part: {name: entry["result"] for name, entry in c["units"].items()} for part, c in contents.items()}
    assert units["tests"]["pytest"]["passed"] >= 12 and not units["tests"]["pytest"]["failed"]
    assert not units["tests"]["pytest"]["skipped"]
    moves = units["steps_random"].pop("moves")
    assert moves["share"] > 0
    assert set(moves["anchor in host memory"]) == {"begin", "candidate", "restore", "commit", "norm"}
    for runs in (units["steps_random"], units["steps_smollm2"]):
        for name, result in runs.items():
            assert set(result["seconds"]) == SECONDS and result["seconds"]["net"] > 0
            assert bool(result["searches"]) == name.startswith("line_search")
    assert set(units["steps_smollm2"]) == {"plain fp32", "line_search bf16"}
    assert units["comparison"].pop("teacher")["accuracy"]["after"]["n"] == 4
    for result in units["comparison"].values():
        assert [row["step"] for row in result["curve"]] == [0, 2]
    assert {"seconds", "angle", "metric_error"} <= set(units["spectra"]["2048 × 6144"])
    assert "accuracy" not in units["spectra"]["4096 × 12288"]


@pytest.mark.slow
def test_the_page_is_filled_from_the_results(rehearsed):
    blocks = tables.blocks(rehearsed[0])
    assert tables.NOTHING not in blocks.values() and blocks["errors"] == "None."
    page = pages.with_blocks(tables.PAGE.read_text(), blocks)
    assert "Rehearsal with tiny sizes" in blocks["machine"] and blocks["steps"] in page
    for line in blocks["steps"].splitlines():
        assert line.count("|") == 12


def test_the_published_page_has_a_block_per_table(tmp_path):
    blocks = tables.blocks(tmp_path)
    assert set(blocks.values()) == {tables.NOTHING}
    assert pages.with_blocks(tables.PAGE.read_text(), blocks)


@pytest.mark.slow
def test_the_script_itself_runs_a_part_and_the_next_call_finds_it(tmp_path):
    environment = os.environ | {
        "GPU_REHEARSAL": "1", "OUT": str(tmp_path / "out"), "GPU_STATE": str(tmp_path / "state"),
        "PYTHON": sys.executable,
    }  # fmt: skip
    for expected in ("spectra: finished", "every part is finished"):
        done = subprocess.run(
            ["bash", "benchmarks/gpu.sh", "spectra"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert (tmp_path / "out" / "spectra.json").exists()


# -- time limits -----------------------------------------------------------------------------------

_PART = """
import json, sys, time
from pathlib import Path
folder, part, sleep = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
units = {"one": {"result": {"value": 1}, "complete": True, "seconds": 0.0}}
(folder / f"{part}.json").write_text(json.dumps({"part": part, "rehearsal": True, "units": units}))
time.sleep(sleep)
"""


def test_a_hanging_part_is_stopped_and_keeps_its_results(tmp_path, monkeypatch):
    """The other part still runs; the next call runs the part that was stopped, and only that."""
    parts = {"tests": Part(("one", "two"), 0.1, 3.0), "spectra": Part(("one",), 0.1, 60.0)}
    for module in (driver, results, sys.modules[allowed.__module__]):
        monkeypatch.setattr(module, "PARTS", parts)
    monkeypatch.setattr(driver, "receive", lambda *_: True)
    started = []

    def command(part, state, seconds):
        started.append(part)
        return [sys.executable, "-c", _PART, str(state / "results"), part, "100" if part == "tests" else "0"]

    monkeypatch.setattr(driver, "command", command)
    lines = driver.run([], tmp_path / "out", tmp_path / "state", 120)
    assert "stopped" in lines[0] and "two" in lines[0] and lines[1] == "spectra: finished"
    assert json.loads((tmp_path / "out" / "tests.json").read_text())["units"]["one"]["result"] == {"value": 1}
    driver.run([], tmp_path / "out", tmp_path / "state", 120)
    assert started == ["tests", "spectra", "tests"]


def test_earlier_parts_leave_time_for_later_ones():
    later = ["comparison", "spectra"]
    least = sum(PARTS[part].least for part in later)
    assert allowed("tests", later, 1000.0) == PARTS["tests"].most
    assert allowed("tests", later, least + 70.0) == 70.0
    assert allowed("tests", later, least + PARTS["tests"].least - 1) == 0.0
    assert sum(part.least for part in PARTS.values()) <= 540


def test_an_error_is_stored_and_the_unit_is_tried_again(tmp_path):
    said = []
    found = results.Results(tmp_path, "spectra", Deadline(60), said.append)
    first, second = PARTS["spectra"].units
    found.run(first, lambda: 1 / 0)
    found.run(second, lambda: {"value": 2}, least=1000.0)  # no time: not an error
    assert "ZeroDivisionError" in results.read(tmp_path, "spectra")["units"][first]["error"]
    assert results.failed(tmp_path, ["spectra"]) == [f"spectra: {first}"]
    assert results.unfinished(tmp_path, "spectra") == [first, second]
    assert "ZeroDivisionError" in tables.blocks(tmp_path)["errors"]
    again = results.Results(tmp_path, "spectra", Deadline(60), said.append)
    again.run(first, lambda: {"value": 1})
    assert results.unfinished(tmp_path, "spectra") == [second]


def test_runs_side_by_side_end_at_the_deadline(tmp_path, monkeypatch):
    """One run ends, one fails, one is stopped with the curve so far, one does not start."""
    fake = tmp_path / "effopd.py"
    fake.write_text(
        "import sys, time\nfrom pathlib import Path\nfolder, last = Path(sys.argv[1]), int(sys.argv[2])\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'evals.jsonl').write_text('{\"step\": 0, \"eval_kl\": 1.0}\\n')\n"
        "time.sleep(max(last, 0))\nsys.exit(last < 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(comparison, "_LEAST", 0.0)
    monkeypatch.setattr(comparison, "_KEPT", 1.0)
    said = []
    found = results.Results(tmp_path / "results", "comparison", Deadline(5), said.append)
    folders = {name: comparison.fresh(tmp_path, name) for name in ("ends", "fails", "hangs", "waits")}
    lasts = {"ends": "0", "fails": "-1", "hangs": "100", "waits": "100"}
    commands = {name: [str(folders[name]), lasts[name]] for name in folders}
    start = time.monotonic()
    comparison.pool(found, commands, folders, workers=1)
    assert time.monotonic() - start < 20
    units = found.content["units"]
    assert units["ends"]["complete"] and units["ends"]["result"]["curve"][0]["kl"] == 1.0
    assert "ended with 1" in units["fails"]["error"]
    assert not units["hangs"]["complete"] and units["hangs"]["result"]["curve"]
    assert "waits" not in units and any("waits" in line for line in said)


# -- what travels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "calls"), [(64, 3), (80, 2), (150, 1)])
def test_pieces_fit_the_calls(limit, calls):
    tree, site, model = (int(size * gpu_pack.MIB) for size in (17, 26, 94))
    pieces = gpu_pack.plan(tree, site, model, limit * gpu_pack.MIB)
    assert sum(pieces) == model and len(pieces) == calls
    assert all(tree + (site if i == 0 else 0) + piece <= limit * gpu_pack.MIB for i, piece in enumerate(pieces))
    sizes = {f"model.{i}": piece for i, piece in enumerate(pieces)}
    assert gpu_pack.report(tree, site, sizes, limit * gpu_pack.MIB).count("carries") == calls


def test_pieces_of_several_calls_are_joined(tmp_path, monkeypatch):
    gguf, brought, state = tmp_path / "model.gguf", tmp_path / "brought", tmp_path / "state"
    gguf.write_bytes(bytes(range(256)) * 4)
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path / "cache"))
    whole, joined = tmp_path / "whole", []
    whole.mkdir()
    sizes = gpu_pack.split(gguf, [400, 600, 24], whole)
    monkeypatch.setattr(
        model_pieces, "convert", lambda pieces, *_: joined.append(b"".join(p.read_bytes() for p in pieces))
    )
    for i, name in enumerate(sizes):
        brought.mkdir(exist_ok=True)
        for old in brought.glob("*"):
            old.unlink()
        for each in (name, model_pieces.SIZES):
            (brought / each).write_bytes((whole / each).read_bytes())
        assert model_pieces.receive(brought, state, lambda _: None) == (i == len(sizes) - 1)
    assert joined == [gguf.read_bytes()]


def test_a_damaged_model_does_not_stop_the_other_parts(tmp_path, monkeypatch):
    gguf, said = tmp_path / "model.gguf", []
    gguf.write_bytes(b"no model")
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path / "cache"))
    gpu_pack.split(gguf, [8], tmp_path)
    assert model_pieces.receive(tmp_path, tmp_path / "state", said.append) is False
    assert "SHA-256" in said[-1]


def test_every_requirement_is_brought_or_present():
    """The requirements of the package, its tests and theirs, without extras."""
    known = {gpu_pack._plain(name) for name in (*gpu_pack.BROUGHT, *gpu_pack.PRESENT, *gpu_pack.STAND_INS)}
    needed = {name for each in ("effopd", "peft", "pytest", *gpu_pack.BROUGHT) for name in _requirements(each)}
    assert not needed - known


def _requirements(name: str) -> set[str]:
    """Requirements on Linux, without extras; of the present packages they are present."""
    if name == "effopd":
        lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    else:
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            return set()
    found = [Requirement(line) for line in lines]
    machine = {"python_version": gpu_pack.PYTHON, "python_full_version": gpu_pack.PYTHON, "extra": ""}
    return {gpu_pack._plain(each.name) for each in found if each.marker is None or each.marker.evaluate(machine)}


def test_wheels_for_another_python_are_refused():
    for wheel in ("a-1-py3-none-any.whl", "a-1-cp312-cp312-manylinux_2_28_x86_64.whl", "a-1-py2.py3-none-any.whl"):
        assert gpu_pack._fits(wheel)
    assert gpu_pack._fits("a-1-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl")
    assert not gpu_pack._fits("a-1-cp311-cp311-linux_x86_64.whl")
    assert not gpu_pack._fits("a-1-cp311-cp311-manylinux_2_28_x86_64.whl")
    assert all("==" in line for line in gpu_pack.requirements())
