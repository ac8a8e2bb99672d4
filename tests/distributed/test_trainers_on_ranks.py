"""`OPDTrainer` with the look-ahead on two processes (DDP, and FSDP2 on the CPU; gloo)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.processes import run_script, torchrun
from helpers.tiny_run import make_trainer
from safetensors.torch import load_file

from effopd.common.files import read_rows

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).with_name("train.py")


def run(out, *flags, processes=2):
    status, said = run_script(SCRIPT, out, *flags, processes=processes)
    assert status == 0, said[-3000:]
    return torch.load(out / "weights.pt")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder and weights of a finished run on two processes, by its flags; the folder is only
    read.
    """
    runs = {}

    def of(*flags):
        if flags not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[flags] = folder, run(folder, *flags)
        return runs[flags]

    return of


@pytest.mark.parametrize("strategy", ["effopd", "line_search", "newton_search"])
def test_two_processes_search_together_pay_together_and_resume(strategy, shared, tmp_path):
    flags = ("--strategy", strategy, "--rows", 4)
    folder, whole = shared(*flags)
    searches, metrics = (list(read_rows(folder / f"{name}.jsonl")) for name in ("searches", "metrics"))
    assert [row["step"] for row in searches] == ([1, 2, 4] if strategy == "effopd" else [2, 3, 4])
    assert any(row["accepted_scale"] for row in searches)
    for row in searches:
        for trial in row["trials"]:
            if "score" not in trial:  # half of the way, which is not scored
                assert strategy == "newton_search" and trial["scale"] == row["accepted_scale"]
                continue
            assert len(trial["per_example"]) == (10 if strategy == "effopd" else 8)  # everybody's
            assert trial["score"] == pytest.approx(sum(trial["per_example"]) / len(trial["per_example"]))
    tokens = [row["num_tokens"] for row in metrics]  # the host's count, over all processes
    assert [row["cost/update_forward_tokens"] for row in metrics] == tokens
    for kind in ("generated_tokens", "forward_tokens"):
        assert metrics[-1][f"cost/search_{kind}"] == sum(row[kind] for row in searches)

    shutil.copytree(folder, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-000004")
    resumed = run(tmp_path / "part", *flags, "--resume")
    assert (tmp_path / "part" / "superseded" / "1").is_dir()  # what was after step 2 is not gone on with
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again = list(read_rows(tmp_path / "part" / "metrics.jsonl"))
    assert [row["cost/update_forward_tokens"] for row in again] == tokens


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_an_evaluation_is_divided_over_the_ranks(mode, tmp_path):
    run(tmp_path / mode, "--steps", 1, "--mode", mode)
    row = next(iter(read_rows(tmp_path / mode / "evals.jsonl")))
    alone = make_trainer(tmp_path / "alone", eval_temperature=0.0)
    for name, value in alone.evaluate().items():  # greedy, so there is no noise to differ in
        if name != "eval_runtime":
            assert row[name] == pytest.approx(value, rel=1e-5), name
    assert row["cost/eval_generated_tokens"] == alone.ledger.snapshot()["cost/eval_generated_tokens"]


def test_the_command_under_torchrun(tmp_path):
    """Both processes train one run: one row a search, on one device state from start to end."""
    recipe = Path(__file__).parents[2] / "recipes" / "testbed.yaml"
    flags = ["--max_steps", 2, "--per_device_train_batch_size", 8, "--eval_strategy", "no", "--eval_on_start", "false"]
    flags += ["--save_strategy", "no", "--effopd.validation_size", 8, "--use_cpu"]
    command = ("train", "--config", recipe, "--output_dir", tmp_path / "run", *flags)
    status, said = torchrun("-m", "effopd", *command, processes=2)
    assert status == 0, said[-3000:]
    assert [row["step"] for row in read_rows(tmp_path / "run" / "searches.jsonl")] == [1, 2]
    assert "use_cpu: true" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_processes(mode, tmp_path):
    flags = ("--strategy", "effopd", "--mode", mode, "--files", "SHARDED_STATE_DICT")
    run(tmp_path, *flags, "--rows", 4, "--steps", 2)
    before = [list(read_rows(tmp_path / f"{name}.jsonl")) for name in ("searches", "metrics")]
    run(tmp_path, *flags, "--rows", 8, "--resume", processes=1)
    searches, metrics = (list(read_rows(tmp_path / f"{name}.jsonl")) for name in ("searches", "metrics"))
    assert [row["step"] for row in searches] == [1, 2, 4] and searches[2]["anchor_step"] == 2
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert [searches[:2], metrics[:2]] == before
    tokens = [row["cost/update_forward_tokens"] for row in metrics]
    assert tokens == [row["num_tokens"] for row in metrics] == sorted(tokens)


def test_parts_of_a_batch_on_two_processes(shared, tmp_path):
    flags = ("--strategy", "newton_search", "--rows", 8, "--parts", 2)
    folder, whole = shared(*flags)
    searches, metrics = (list(read_rows(folder / f"{name}.jsonl")) for name in ("searches", "metrics"))
    assert [row["step"] for row in searches] == [2, 3, 4]
    assert [len(row["trials"][0]["per_example"]) for row in searches] == [8, 8, 8]  # 4 of each process
    updated = [row["cost/update_forward_tokens"] for row in metrics]
    assert updated[0] < updated[1] == metrics[0]["num_tokens"] and updated[3] == metrics[2]["num_tokens"]
    shutil.copytree(folder, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-000004")
    resumed = run(tmp_path / "part", *flags, "--resume")  # from step 2: the next batch
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rollouts_that_two_steps_share_survive_on_every_rank(tmp_path):
    weights = []
    for flags in ((), ("--resume", tmp_path / "checkpoints" / "step-000003")):
        status, said = run_script(SCRIPT.with_name("rl.py"), tmp_path, *flags, processes=2)
        assert status == 0, said[-3000:]
        assert "this run will differ" not in said
        weights.append(torch.load(tmp_path / "weights.pt"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    status, said = run_script(SCRIPT.with_name("rl.py"), tmp_path, *flags, processes=1)
    assert status == 0 and "this run will differ" in said, said[-3000:]  # another number: told, and in phase


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("effopd", ()),
        ("line_search", ("--accumulate", 2)),
        ("line_search", ("--lora",)),
        ("line_search", ("--whole-share", 0.5)),
    ],
)
def test_fsdp2_is_ddp_with_half_the_memory(strategy, more, shared):
    """Up to fp32 rounding: the gradient's norm, which it is clipped by, is summed shard by
    shard.
    """
    flags, adapter = ("--strategy", strategy, "--rows", 4, *more), "--lora" in more
    folders, (ddp, fsdp2) = zip(shared(*flags), shared(*flags, "--mode", "fsdp2"), strict=True)
    assert all(torch.allclose(ddp[name], fsdp2[name], rtol=1e-3, atol=1e-4) for name in ddp)
    one, other = (list(read_rows(folder / "searches.jsonl")) for folder in folders)
    assert any(row["accepted_scale"] for row in one)
    for a, b in zip(one, other, strict=True):
        assert a["accepted_scale"] == pytest.approx(b["accepted_scale"], rel=1e-3)
        if adapter:  # the anchor of the adapters is whole on every rank, the working copy is not
            assert a["memory_bytes"] * 3 == 4 * b["memory_bytes"]
        else:
            assert a["memory_bytes"] == 2 * b["memory_bytes"]  # every row count is even
        for ours, theirs in zip(a["trials"], b["trials"], strict=True):
            assert ours["per_example"] == pytest.approx(theirs["per_example"], abs=1e-3)
    one, other = (list(read_rows(folder / "evals.jsonl")) for folder in folders)
    assert [row["eval_kl"] for row in one] == pytest.approx([row["eval_kl"] for row in other], abs=1e-3)
    if adapter:
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one)


def test_newton_search_on_shards_doubles_the_scale_and_steers_alike_on_all_ranks(shared):
    """The slope needs the whole output layer; the cosine is summed over shards."""
    flags = ("--rows", 4, "--mode", "fsdp2")
    line_search, newton_search = (
        shared("--strategy", strategy, *flags)[0] for strategy in ("line_search", "newton_search")
    )
    doubling, newton = (list(read_rows(folder / "searches.jsonl")) for folder in (line_search, newton_search))
    scored = [[trial["scale"] for trial in rows[0]["trials"] if "score" in trial] for rows in (newton, doubling)]
    assert scored[0] == scored[1]
    rates = [row["learning_rate"] for row in read_rows(newton_search / "metrics.jsonl")]
    assert len(set(rates)) > 1


def test_a_sharded_teacher_changes_no_number(shared, tmp_path):
    flags = ("--strategy", "line_search", "--rows", 4, "--mode", "fsdp2")
    folder, weights = shared(*flags)
    sharded = run(tmp_path, *flags, "--shard-teacher")
    assert all(torch.equal(weights[name], sharded[name]) for name in weights)
    for name, column in (("searches", "accepted_scale"), ("evals", "eval_kl"), ("metrics", "health/reverse_kl")):
        one, other = (list(read_rows(each / f"{name}.jsonl")) for each in (folder, tmp_path))
        assert [row[column] for row in one] == [row[column] for row in other]
    assert (folder / "teachers.json").read_text() == (tmp_path / "teachers.json").read_text()


@pytest.mark.parametrize("files", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_goes_on_after_a_rank_was_killed_in_a_search(files, shared, tmp_path):
    flags = ("--strategy", "effopd", "--rows", 4, "--mode", "fsdp2")
    _, weights = shared(*flags)
    flags += ("--files", files)
    status, said = run_script(SCRIPT, tmp_path / "part", *flags, "--kill-at", 3, processes=2)
    assert status != 0 and "SIGKILL" in said and not (tmp_path / "part" / "weights.pt").exists()
    assert [path.name for path in sorted((tmp_path / "part" / "checkpoints").glob("step-*"))] == ["step-000002"]
    resumed = run(tmp_path / "part", *flags, "--resume")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    for folder in (
        tmp_path / "part",
        tmp_path / "part" / "trajectory" / "step-000004",
    ):  # whole, for whoever reads them
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], saved[name]) for name in weights)


def test_answers_of_shards_whose_ranks_end_at_different_tokens():
    status, said = run_script(SCRIPT.with_name("sharded_answers.py"), "", processes=2)
    assert status == 0, said[-3000:]


@pytest.mark.parametrize("host", ["trl", "transformers"])
def test_unmodified_hosts(host, tmp_path):
    """DDP in one go and FSDP2 with a stop in between: the same jumps, weights equal up to
    rounding.
    """
    folders = [tmp_path / mode for mode in ("ddp", "fsdp2")]
    for mode, *flags in (["ddp"], ["fsdp2", "--steps", 2], ["fsdp2", "--resume"]):
        flags = ("--host", host, "--mode", mode, *flags)
        status, said = run_script(SCRIPT.with_name("plain_hosts.py"), tmp_path / mode, *flags, processes=2)
        assert status == 0, said[-3000:]
    searches = [list(read_rows(folder / "searches.jsonl")) for folder in folders]
    jumps = [[(row["step"], row["accepted_scale"]) for row in found] for found in searches]
    assert jumps[0] == jumps[1] and [step for step, _ in jumps[0]] == [1, 2, 4] and any(scale for _, scale in jumps[0])
    one, other = (torch.load(folder / "weights.pt") for folder in folders)
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


def test_the_loss_of_the_next_batch_is_that_of_all_ranks(tmp_path):
    """Each rank scores examples of its own; the score is the loss that the host logs."""
    status, said = run_script(SCRIPT.with_name("plain_hosts.py"), tmp_path, "--host", "sft", processes=2)
    assert status == 0, said[-3000:]
    losses = {
        row["step"]: row["loss"]
        for row in json.loads((tmp_path / "state.json").read_text())["log_history"]
        if "loss" in row
    }
    searches = list(read_rows(tmp_path / "searches.jsonl"))
    assert [row["step"] for row in searches] == [2, 4]
    for row in searches:
        accepted = next(trial for trial in row["trials"] if trial["scale"] == row["accepted_scale"])
        assert len(accepted["per_example"]) == 8
        assert -accepted["score"] == pytest.approx(losses[row["step"]], rel=1e-5)
