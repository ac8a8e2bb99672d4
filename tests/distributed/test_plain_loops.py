"""Two and three processes on the CPU (gloo): the same decisions and weights as one, shards instead
of copies, and faults.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.processes import run_script

from effopd.extrapolate.anchor_files import rows_of

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).with_name("plain_loop.py")


def finished(out, *flags, processes=0):
    status, said = run_script(SCRIPT, out, *flags, processes=processes)
    assert status == 0, said[-3000:]
    return rows(out, 0), torch.load(out / "weights.pt")


def rows(out, rank):
    return json.loads((out / f"rows-{rank}.json").read_text())


def decisions(found):
    return [(row["step"], row["accepted_scale"]) for row in found]


def close(one, other):
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


@pytest.fixture(scope="module", params=["effopd", "line_search"])
def alone(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    found, weights = finished(out, "--strategy", request.param)
    assert sum(scale != 0 for _, scale in decisions(found)) >= 3
    return request.param, out, found, weights


@pytest.mark.parametrize(("mode", "processes"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_as_one_process(alone, mode, processes, tmp_path):
    """Up to fp32 rounding: a mean over two halves is not rounded like a mean over all."""
    strategy, _, found, weights = alone
    mine, other = finished(tmp_path, "--mode", mode, "--strategy", strategy, processes=processes)
    if strategy == "effopd":
        assert decisions(mine) == decisions(found)
    else:  # the vertex of the parabola moves with the rounding
        assert [step for step, _ in decisions(mine)] == [step for step, _ in decisions(found)]
        scales = zip(decisions(mine), decisions(found), strict=True)
        assert all(a == pytest.approx(b, abs=2e-3) for (_, a), (_, b) in scales)
    assert (
        close(weights, other)
        if strategy == "effopd"
        else all(torch.allclose(weights[name], other[name], rtol=1e-3, atol=1e-4) for name in weights)
    )
    everybody = [rows(tmp_path, rank) for rank in range(processes)]
    assert all(decisions(theirs) == decisions(mine) for theirs in everybody)
    memory = [theirs[0]["memory_bytes"] for theirs in everybody]
    whole = found[0]["memory_bytes"]
    if mode == "ddp":
        assert memory == [whole] * processes
    else:  # (anchor + working copy) / ranks: exactly the rows that a rank holds, twice, in fp32
        parts = [[rows_of(len(w), rank, processes) for w in weights.values()] for rank in range(processes)]
        assert sum(memory) == whole and memory == [
            2 * 4 * sum((high - low) * w[0].numel() for (low, high), w in zip(part, weights.values(), strict=True))
            for part in parts
        ]


def test_replicated_shards_as_one_process(tmp_path):
    """HSDP: two replicas of two shards. One replica writes the anchor, and one that drifts is
    noticed.
    """
    found, weights = finished(tmp_path / "alone")
    mine, other = finished(tmp_path / "hsdp", "--mode", "hsdp", processes=4)
    assert decisions(mine) == decisions(found) and close(weights, other)
    for ours, theirs in zip(mine, found, strict=True):
        assert ours["delta_norm"] == pytest.approx(theirs["delta_norm"], rel=1e-5)
    files = sorted(path.name for path in (tmp_path / "hsdp" / "at-4").glob("*anchor*"))
    assert files == [f"effopd_anchor-0000{i}-of-00002.safetensors" for i in (0, 1)]
    resume = ("--resume", tmp_path / "hsdp" / "at-4")
    _, again = finished(tmp_path / "again", "--mode", "hsdp", *resume, processes=4)
    assert all(torch.equal(other[name], again[name]) for name in other)
    _, resumed = finished(tmp_path / "resumed", *resume)
    assert close(other, resumed)
    status, said = run_script(SCRIPT, tmp_path / "apart", "--mode", "hsdp", "--fault", "diverge", processes=4)
    assert status != 0 and "DivergenceError: the processes have diverged" in said


def test_lora_adapters_as_one_process(tmp_path):
    """Shards of the factors move like the whole ones: up to rounding, for whatever number of
    processes.
    """
    found, weights = finished(tmp_path / "alone", "--lora")
    assert sum(scale != 0 for _, scale in decisions(found)) >= 2 and max(row["lora_lost_share"] for row in found) > 0
    for mode, processes in (("ddp", 2), ("fsdp2", 3)):
        out = tmp_path / f"{mode}-{processes}"
        mine, other = finished(out, "--lora", "--mode", mode, processes=processes)
        assert decisions(mine) == decisions(found)
        for ours, theirs in zip(mine, found, strict=True):
            assert ours["lora_lost_share"] == pytest.approx(theirs["lora_lost_share"], abs=1e-5)
        assert all(torch.allclose(weights[name], other[name], rtol=1e-4, atol=1e-5) for name in weights)
    state = tmp_path / "fsdp2-3" / "at-4"
    _, resumed = finished(tmp_path / "resumed", "--lora", "--mode", "fsdp2", "--resume", state, processes=2)
    assert close(other, resumed)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run on two processes, its state at step 4 in two shards."""
    out = tmp_path_factory.mktemp("sharded")
    _, weights = finished(out, "--mode", "fsdp2", processes=2)
    files = sorted(path.name for path in (out / "at-4").glob("*anchor*"))
    assert files == [f"effopd_anchor-0000{i}-of-00002.safetensors" for i in (0, 1)]
    return out / "at-4", weights


@pytest.mark.parametrize(("mode", "processes"), [("fsdp2", 3), ("ddp", 2), ("alone", 0)])
def test_resuming_with_other_ranks(sharded, mode, processes, tmp_path):
    state, weights = sharded
    _, resumed = finished(tmp_path, "--mode", mode, "--resume", state, processes=processes)
    assert close(weights, resumed)


def test_a_killed_rank_ends_the_job_and_the_last_state_goes_on(sharded, tmp_path):
    state, weights = sharded
    status, said = run_script(SCRIPT, tmp_path, "--mode", "fsdp2", "--fault", "kill", processes=2)
    assert status != 0 and "SIGKILL" in said and not (tmp_path / "rows-0.json").exists()
    _, resumed = finished(tmp_path, "--mode", "fsdp2", "--resume", state, processes=2)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_ranks_that_drift_apart_are_named(tmp_path):
    status, said = run_script(SCRIPT, tmp_path, "--mode", "ddp", "--fault", "diverge", processes=2)
    assert status != 0 and "DivergenceError" in said and "ranks that differ: 1" in said


def test_a_scorer_that_fails_on_one_rank_fails_on_all(tmp_path):
    status, said = run_script(SCRIPT, tmp_path, "--mode", "ddp", "--fault", "scorer", processes=2)
    assert status != 0 and "ScorerError" in said and "rank 1 failed" in said


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_point_that_is_not_finite_on_one_rank_is_rejected_on_all(mode, tmp_path):
    found, weights = finished(tmp_path, "--mode", mode, "--fault", "nan", "--steps", 5, processes=2)
    assert decisions(found)[-1] == (4, 0.0) and decisions(rows(tmp_path, 1)) == decisions(found)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


@pytest.mark.parametrize("strategy", ["random_direction", "relex"])
def test_strategies_that_need_whole_matrices_refuse_shards(strategy, tmp_path):
    status, said = run_script(SCRIPT, tmp_path, "--mode", "fsdp2", "--strategy", strategy, processes=2)
    assert status != 0 and "needs full matrices" in said


def test_a_verifier_that_fails_on_one_rank_fails_on_all():
    """The others wait for its part of D_v and get its words."""
    status, said = run_script(SCRIPT.with_name("sharded_answers.py"), "", "--fault", processes=2)
    assert status != 0 and "DivergenceError: rank 1 failed: ValueError: planted" in said
