"""`OPDTrainer` with the look-ahead under DeepSpeed's ZeRO on two processes (CPU accelerator, gloo).

`tests/extrapolate/test_zero.py` checks the same code on doubles of DeepSpeed, without the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.processes import run_script
from safetensors.torch import load_file

from effopd.common.files import read_rows

pytest.importorskip("deepspeed", reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train.py")


def run(out, *flags):
    status, said = run_script(SCRIPT, out, "--rows", 4, *flags, processes=2)
    assert status == 0, said[-3000:]
    return torch.load(out / "weights.pt")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder and weights of a finished run, by its flags; the folder is only read."""
    runs = {}

    def of(*flags):
        if flags not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[flags] = folder, run(folder, *flags)
        return runs[flags]

    return of


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("zero2", ("--strategy", "effopd")),
        ("zero3", ("--strategy", "effopd")),
        ("zero1", ("--strategy", "line_search", "--accumulate", 2)),
        ("zero2", ("--strategy", "newton_search")),  # steers by slopes, and predicts from the output layer
    ],
)
def test_zero_takes_the_decisions_of_ddp(mode, flags, shared):
    folders, (ddp, zero) = zip(shared("--mode", "ddp", *flags), shared("--mode", mode, *flags), strict=True)
    assert all(torch.allclose(ddp[name], zero[name], rtol=1e-3, atol=1e-4) for name in ddp)
    one, other = (list(read_rows(folder / "searches.jsonl")) for folder in folders)
    assert any(row["accepted_scale"] for row in one)
    for a, b in zip(one, other, strict=True):
        assert b["accepted_scale"] == pytest.approx(a["accepted_scale"], rel=1e-3)
        for ours, theirs in zip(a["trials"], b["trials"], strict=True):
            assert ours.get("per_example") == pytest.approx(theirs.get("per_example"), abs=1e-3)
    assert sum(row["memory_bytes"] for row in other) < 0.6 * sum(row["memory_bytes"] for row in one)
    one, other = (list(read_rows(folder / "metrics.jsonl")) for folder in folders)
    for name in ("loss", "learning_rate", "health/reverse_kl", "health/teacher_entropy"):
        assert [row[name] for row in other] == pytest.approx([row[name] for row in one], rel=1e-3), name
    one, other = (list(read_rows(folder / "evals.jsonl")) for folder in folders)
    assert [row["eval_kl"] for row in other] == pytest.approx([row["eval_kl"] for row in one], abs=1e-3)


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_zero_goes_on_after_a_rank_was_killed_in_a_search(mode, shared, tmp_path):
    flags = ("--strategy", "effopd", "--mode", mode)
    _, weights = shared("--mode", mode, "--strategy", "effopd")
    status, said = run_script(SCRIPT, tmp_path, "--rows", 4, *flags, "--kill-at", 3, processes=2)
    assert status != 0 and "SIGKILL" in said and not (tmp_path / "weights.pt").exists()
    resumed = run(tmp_path, *flags, "--resume")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    for folder in (tmp_path, tmp_path / "trajectory" / "step-000004"):
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], saved[name]) for name in saved)
    status, said = run_script(SCRIPT, tmp_path, "--rows", 4, *flags, "--steps", 5, "--resume", processes=1)
    assert status != 0 and "on 2 process(es), and this run has DeepSpeed" in said, said[-3000:]


@pytest.mark.parametrize(("mode", "flags"), [("zero1", ()), ("zero2", ()), ("zero3", ("--by-path",))])
def test_zero_in_bf16_moves_fp32_masters(mode, flags, shared):
    """bf16 copies follow: `train.py` checks the moved and the restored weights of every run."""
    folder, weights = shared("--mode", mode, "--strategy", "effopd", "--bf16", *flags)
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    searches = list(read_rows(folder / "searches.jsonl"))
    assert any(row["accepted_scale"] for row in searches)
    anchor = json.loads((folder / "checkpoints" / "step-000004" / "effopd_state.json").read_text())
    assert anchor["anchor_parts"] == 2
