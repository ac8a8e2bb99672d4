"""`effopd analyze` as a user runs it: the testbed pair, trajectories with seeds, no matplotlib,
mistakes.
"""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
from helpers.tiny_checkpoints import save_base, save_trained, save_trajectory

from effopd.commands import analyze as analyze_command
from effopd.commands.analyze import run_analyze
from effopd.errors import ConfigError, EffOPDError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(analyze_command, "draw", lambda out: [out / "figures" / "u1_path.png"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    base = save_base(root / "base")
    for name, seed in (("opd-1", 1), ("opd-2", 2), ("rl-1", 3), ("rl-2", 4)):
        save_trajectory(root / name, base, seed)
    save_trained(root / "sft", base, 5)
    return root


@pytest.mark.slow
def test_the_testbed_pair(tmp_path, capsys):
    out = tmp_path / "analysis"
    flags = ["--base", "testbed:student", "--trained", "rl=testbed:teacher", "--out", str(out)]
    assert run_analyze(flags) == 0
    printed = capsys.readouterr().out
    assert "46 tensors" in printed and "28 attention and MLP matrices" in printed
    for words in ("spectral norm s1", "effective rank", "embedding", "over matrices", str(out / "summary.json")):
        assert words in printed
    assert re.search(r"s1 / norm +\d+\.\d% \[\d+\.\d, \d+\.\d\]", printed)
    assert "larger" not in printed and "early" not in printed  # one run, no trajectory
    frame = pd.read_parquet(out / "matrices.parquet")
    assert len(frame[frame.metric == "frobenius_norm"]) == 46
    assert (
        f"page:    {out / 'report.html'}" in printed and "<b>rl</b>: update norm" in (out / "report.html").read_text()
    )
    assert (out / "figures" / "spectrum.png").exists() and not (out / "figures" / "u1_path.png").exists()

    rows = (out / "progress.jsonl").read_bytes()
    assert run_analyze(flags) == 0  # again: nothing is measured twice
    assert (out / "progress.jsonl").read_bytes() == rows


@pytest.mark.slow
def test_two_labels_with_seeds(folders, tmp_path, capsys, undrawn):
    out = tmp_path / "analysis"
    flags = ["--base", str(folders / "base"), "--trained", f"opd={folders / 'opd-1'}", f"opd={folders / 'opd-2'}"]
    flags += ["--trained", f"rl={folders / 'rl-1'}", "--trained", f"rl={folders / 'rl-2'}"]
    flags += ["--out", str(out), "--k", "3", "--steps", "1,2,4", "8", "--base_spectrum"]
    assert run_analyze(flags) == 0
    printed = capsys.readouterr().out
    for words in ("opd (2 seeds)", "rl (2 seeds)", "larger", "over seeds", "early: top-3 left", "step 1 of 8"):
        assert words in printed
    assert "shift of W0's singular values" in printed and "u1_path" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["runs"]) == ["opd#0", "opd#1", "rl#0", "rl#1"]
    assert summary["runs"]["rl#1"]["steps"] == [1, 2, 4, 8]
    assert summary["differences"][0]["metrics"]["stable_rank"]["over_seeds"]["n"] == 4


def test_three_labels_get_sentences(folders, tmp_path, capsys, undrawn):
    flags = ["--base", str(folders / "base"), "--out", str(tmp_path / "out"), "--metrics", "norms,spectrum"]
    flags += ["--trained", f"sft={folders / 'sft'}", f"opd={folders / 'opd-1'}", f"same={folders / 'base'}"]
    assert run_analyze(flags) == 0
    printed = capsys.readouterr().out
    assert "sft significantly above same: update norm per matrix" in printed
    assert "same: every tensor equals the base" in printed.replace("\n", " ")
    assert "entries unchanged" not in printed


def test_a_run_that_stopped_early_is_named(folders, tmp_path, capsys, undrawn):
    runs = {name: shutil.copytree(folders / "opd-1", tmp_path / name) for name in ("stopped", "ended", "saved")}
    for name, steps in (("stopped", 12), ("ended", 8), ("saved", -1)):
        (runs[name] / "config.yaml").write_text(f"max_steps: {steps}\n")
    state = runs["saved"] / "checkpoints" / "step-000008" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"global_step": 8, "max_steps": 20}')
    shutil.copy(folders / "sft" / "model.safetensors", runs["saved"])
    flags = ["--base", str(folders / "base"), "--out", str(tmp_path / "out"), "--metrics", "norms", "--steps", "8"]
    for name, path in runs.items():
        flags += ["--trained", f"{name}={path}"]
    assert run_analyze(flags) == 0
    notes = " ".join(json.loads((tmp_path / "out" / "summary.json").read_text())["notes"])
    page, printed = (tmp_path / "out" / "report.html").read_text(), " ".join(capsys.readouterr().out.split())
    for text in (notes, page, printed):
        assert "stopped: the run stopped early, at step 8 of 12." in text
        assert "saved: the last weights are those of step 8 of 20, although" in text
        assert "ended: the" not in text


def test_without_matplotlib_tables_are_written_and_the_way_out_is_named(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze_command, "is_available", lambda module: False)
    monkeypatch.setattr(analyze_command, "draw", lambda out: pytest.fail("drew without matplotlib"))
    out = tmp_path / "out"
    flags = ["--base", str(folders / "base"), "--trained", f"sft={folders / 'sft'}", "--out", str(out), "--k", "2"]
    assert run_analyze(flags) == 0
    assert "pip install 'effopd[plots]'" in capsys.readouterr().out
    assert (out / "matrices.csv").exists() and not (out / "figures").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--trained": "sft"}, "expected LABEL=DIR, got 'sft'.*--trained opd=sft"),
        ({"--trained": "=sft"}, "expected LABEL=DIR"),
        ({"--trained": "opd="}, "expected LABEL=DIR"),
        ({"--trained": "opd=/nowhere"}, "/nowhere is not a folder"),
        ({"--base": "/nowhere"}, "/nowhere is not a folder"),
        ({"--steps": "1,x"}, "--steps: expected whole numbers"),
        ({"--k": "0"}, "k must be at least 1"),
        ({"--metrics": "norms,spectra"}, "spectra"),
        ({"--device": "mps"}, "--device cpu"),
        ({"--device": "meta"}, "'meta' cannot compute on this machine.*--device cpu"),
        ({"--device": "hpu"}, "'hpu' cannot compute on this machine.*--device cpu"),
        ({"--device": "xla"}, "'xla' cannot compute on this machine.*--device cpu"),
    ],
)
def test_mistakes_are_explained_before_any_work(folders, tmp_path, change, message):
    flags = {"--base": str(folders / "base"), "--trained": f"sft={folders / 'sft'}", "--out": str(tmp_path / "out")}
    with pytest.raises(EffOPDError, match=message):
        run_analyze([word for pair in (flags | change).items() for word in pair])
    assert not (tmp_path / "out").exists()


def test_other_settings_do_not_touch_an_analysis(folders, tmp_path, undrawn):
    flags = ["--base", str(folders / "base"), "--trained", f"sft={folders / 'sft'}", "--out", str(tmp_path / "out")]
    assert run_analyze([*flags, "--metrics", "norms"]) == 0
    with pytest.raises(ConfigError, match="metrics was"):
        run_analyze(flags)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        run_analyze(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--trained rl=testbed:teacher" in printed and "LABEL=DIR" in printed
