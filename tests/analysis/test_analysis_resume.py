"""An analysis can be killed and continued, and refuses what it cannot compare before anything is
read or written.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.tiny_checkpoints import (
    STEPS,
    K,
    save_tensors,
    save_trajectory,
    tensors_of,
    trained,
)

from effopd.analysis import analyze as analysis
from effopd.analysis import tables
from effopd.analysis.analyze import analyze, pictured_parts
from effopd.analysis.plan import resolve_device
from effopd.analysis.tables import TABLES, TableWriter, read_table, write_table
from effopd.errors import CheckpointError, ConfigError, EffOPDError, WeightsError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Killed(Exception):
    pass


def killed_after(units):
    def progress(done, total, share):
        if done >= units:
            raise Killed

    return progress


def test_killed_and_resumed_gives_the_same_tables(done, folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = (folders / "base", trained(folders), out)
    for units in (30, 100):
        with pytest.raises(Killed):
            analyze(*arguments, k=K, base_spectrum=True, progress=killed_after(units))
    assert not (out / "matrices.parquet").exists()
    with (out / "progress.jsonl").open("a") as file:
        file.write('{"part": "cut sho')  # a write cut short by a kill
    finished = len((out / "progress.jsonl").read_text().splitlines()) - 2
    assert finished >= 8
    calls, real = [], analysis.measure_update
    monkeypatch.setattr(analysis, "measure_update", lambda *a: calls.append(1) or real(*a))
    seen = []
    resumed = analyze(*arguments, k=K, base_spectrum=True, progress=lambda *a: seen.append(a))
    snapshots = 2 * len(STEPS) + 1
    parts = done.summary["parts"]["parts"]
    assert seen[0][:2] == (finished * snapshots, parts * snapshots) and seen[-1][:2] == (parts * snapshots,) * 2
    shares = [share for _, _, share in seen]
    assert shares[0] > 0 and shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert len(calls) == (parts - finished) * snapshots
    for name in TABLES:
        for kind in ("parquet", "csv"):
            assert (out / f"{name}.{kind}").read_bytes() == (done.out / f"{name}.{kind}").read_bytes()
    assert resumed.summary == done.summary

    calls.clear()
    (out / "matrices.csv").unlink()
    analyze(*arguments, k=K, base_spectrum=True)  # finished: tables are made again, nothing is measured
    assert not calls and (out / "matrices.csv").read_bytes() == (done.out / "matrices.csv").read_bytes()


def test_other_settings_are_refused_and_nothing_is_touched(folders, tmp_path):
    base = shutil.copytree(folders / "base", tmp_path / "base")
    run = shutil.copytree(folders / "rl", tmp_path / "rl")
    out = tmp_path / "out"
    analyze(base, {"rl": run}, out, k=2, metrics=["norms"])
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    def refuse(match, trained=None, **options):
        with pytest.raises(ConfigError, match=match):
            analyze(base, trained or {"rl": run}, out, **({"k": 2, "metrics": ["norms"]} | options))
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

    refuse("k was 2, now 3", k=3)
    refuse("seed was 0, now 1.*another output folder", seed=1)
    refuse("metrics was", metrics=["norms", "entries"])
    refuse("runs rl was removed; runs opd was added", {"opd": run})
    save_tensors(tmp_path / "new", {n: w + 1 for n, w in tensors_of(run).items()}, base)
    shutil.copy(tmp_path / "new" / "model.safetensors", run)
    refuse("weights changed on disk")


def test_an_output_folder_with_something_else_is_refused(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.txt\)"):
        analyze(folders / "base", {"rl": folders / "rl"}, tmp_path / "out")
    with pytest.raises(ConfigError, match="is a file"):
        analyze(folders / "base", {"rl": folders / "rl"}, tmp_path / "out" / "thesis.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_gap_in_a_trajectory_is_refused(folders, tmp_path):
    run = save_trajectory(tmp_path / "run", folders / "base", 1, steps=(0, 2, 4, 6, 8))
    shutil.rmtree(run / "trajectory" / "step-000004")
    with pytest.raises(CheckpointError, match="4"):
        analyze(folders / "base", {"opd": run}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trained", "options", "error", "message"),
    [
        ({}, {}, ConfigError, "at least one"),
        ({"a b": "rl"}, {}, ConfigError, "label 'a b' cannot be used"),
        ({"final": "rl"}, {}, ConfigError, "label 'final' cannot be used"),
        ({"a": []}, {}, ConfigError, "no path"),
        ({"a": "rl", "b": "rl/../rl"}, {}, ConfigError, "given twice, as a and as b"),
        ({"a": ["rl", "rl"]}, {}, ConfigError, "given twice, as a#0 and as a#1"),
        ({"a": "nowhere"}, {}, CheckpointError, "is not a folder"),
        ({"a": "rl"}, {"k": 0}, ConfigError, "k must be at least 1"),
        ({"a": "rl"}, {"metrics": ["spectra"]}, ConfigError, "spectra"),
        ({"a": "rl"}, {"metrics": []}, ConfigError, "metrics"),
        ({"a": "rl"}, {"device": "mps"}, ConfigError, "no float64.*--device cpu"),
        ({"a": "rl"}, {"device": "gpu7"}, ConfigError, "gpu7"),
    ],
)
def test_mistakes_are_refused_before_any_work(folders, tmp_path, trained, options, error, message):
    def absolute(value):
        return [absolute(v) for v in value] if isinstance(value, list) else str(folders) + "/" + value

    with pytest.raises(error, match=message):
        analyze(folders / "base", {k: absolute(v) for k, v in trained.items()}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_other_architectures_vocabularies_and_nan_are_refused(folders, tmp_path):
    from helpers.tiny_models import make_model

    make_model(1, hidden=32).save_pretrained(tmp_path / "wide")
    make_model(1, vocab_size=80).save_pretrained(tmp_path / "words")
    for name in ("wide", "words"):
        with pytest.raises(EffOPDError):
            analyze(folders / "base", {"a": tmp_path / name}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    broken = tensors_of(folders / "rl")
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_tensors(tmp_path / "nan", broken, folders / "base")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj"):
        analyze(folders / "base", {"a": tmp_path / "nan"}, tmp_path / "out")


def test_the_default_device_can_do_float64(monkeypatch):
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert resolve_device(None) == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert resolve_device(None) == "cuda"


def test_a_batch_keeps_no_more_directions_than_allowed(folders, tmp_path, monkeypatch):
    from effopd.analysis.plan import prepare

    plan = prepare(folders / "base", trained(folders), tmp_path / "out")
    part = plan.parts[0]
    same = [part] * 5
    assert [len(batch) for batch in analysis.batches(same, plan)] == [5]
    monkeypatch.setattr(analysis, "_KEPT", 2 * 4 * plan.options.k * sum(part.shape) * plan.snapshots)
    assert [len(batch) for batch in analysis.batches(same, plan)] == [2, 2, 1]
    assert all(len(batch) == 1 for batch in analysis.batches(plan.parts, plan))
    assert pictured_parts(plan.parts) == {f"layers.{i}.{m}" for i in (0, 1) for m in ("attention.o", "mlp.down")}


def test_a_table_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", 2)
    rows = [("a", i, None, "mlp", "up", "x", math.nan if i == 1 else i / 3) for i in range(5)]
    with TableWriter(tmp_path / "t", tables.MATRICES) as writer:
        for row in rows:
            writer.add([row])
    frame = read_table(tmp_path / "t")
    assert frame.value.isna().tolist() == [False, True, False, False, False] and frame.step.tolist() == list(range(5))
    assert read_table(tmp_path / "t", [("step", ">", 3)]).value.tolist() == [4 / 3]
    with pytest.raises(Killed), TableWriter(tmp_path / "t", tables.MATRICES) as writer:
        writer.add(rows[:1])
        raise Killed
    assert len(read_table(tmp_path / "t")) == 5 and len(list(tmp_path.iterdir())) == 2
    write_table(pd.read_parquet(tmp_path / "t.parquet"), tmp_path / "copy")
    assert (tmp_path / "copy.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_table(Path(tmp_path / "nothing"))
