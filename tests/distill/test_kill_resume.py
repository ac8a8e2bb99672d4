"""A run killed with SIGKILL at any point resumes and ends bit-identical to one that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from helpers.processes import run_script
from helpers.tiny_models import make_model
from helpers.tiny_run import EFFOPD, STEPS, make_trainer
from safetensors.torch import load_file
from transformers import TrainerState
from trl.trainer.utils import RepeatSampler

from effopd.common.files import read_rows
from effopd.distill.exact_resume import EpochCallback, EpochSampler, TerminationCallback
from effopd.errors import CheckpointError

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "helpers" / "tiny_run.py"


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")


def comparable(root: Path, name: str) -> list[dict]:
    """Rows without what depends on the clock."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if "second" not in k and "time" not in k}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return [strip(row) for row in read_rows(root / name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    make_trainer(root, effopd=EFFOPD, eval_on_start=True).train()
    assert any(row["accepted_scale"] for row in read_rows(root / "searches.jsonl"))
    return root


@pytest.mark.parametrize("where", ["search", "save", "publish", "anchor"])
def test_sigkill_then_resume_is_bit_identical(tmp_path, whole, where):
    root = tmp_path / "run"
    killed = run_script(SCRIPT, root, "--kill", where)
    assert killed.status == -signal.SIGKILL, killed.output[-2000:]
    done = [path.name for path in sorted((root / "checkpoints").glob("step-*"))]
    assert done[-1] == ("step-000006" if where == "search" else "step-000004")
    for name in ("metrics.jsonl", "searches.jsonl", "evals.jsonl"):
        assert list(read_rows(root / name))  # readable as it lies there

    make_trainer(root, effopd=EFFOPD, eval_on_start=True).train(resume_from_checkpoint=True)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(root).items())
    for name in ("metrics.jsonl", "searches.jsonl", "evals.jsonl"):
        assert comparable(root, name) == comparable(whole, name)


def test_resume_in_a_later_epoch_keeps_the_data_order(tmp_path):
    """TRL's sampler restarts its permutations on a resume; ours does not."""
    from helpers.tiny_models import make_task

    settings = {"task": make_task(24), "eval_strategy": "no", "save_steps": 4}  # 3 steps an epoch
    make_trainer(tmp_path / "whole", **settings).train()
    make_trainer(tmp_path / "part", **settings).train()
    import shutil

    for step in (8, 10):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
    make_trainer(tmp_path / "part", **settings).train(resume_from_checkpoint=True)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "part").items())


def test_data_order_after_a_resume_on_several_processes():
    """accelerate tells the sampler the epoch, but not through what a resume wraps around the
    batches of one of several ranks.
    """

    def batches(resumed: bool) -> list[list[int]]:
        sampler = EpochSampler(RepeatSampler(range(16), mini_repeat_count=1, batch_size=2, shuffle=True, seed=0))
        loader = torch.utils.data.DataLoader(range(16), batch_size=2, sampler=sampler)
        loader = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
        callback = EpochCallback()
        callback.sampler, seen = sampler, []
        for epoch in (2,) if resumed else (0, 1, 2):
            state = TrainerState(epoch=epoch + 0.5 * resumed)
            callback.on_epoch_begin(None, state, None)
            here = skip_first_batches(loader, 2) if resumed else loader
            here.set_epoch(epoch)
            seen = [batch.tolist() for batch in here]
        return seen

    assert batches(resumed=True) == batches(resumed=False)[2:] and len(batches(resumed=True)) == 2


def test_going_back_to_an_earlier_checkpoint_keeps_the_later_ones_apart(tmp_path, caplog):
    settings = {"eval_strategy": "no", "save_steps": 2, "save_total_limit": 2, "trajectory": "2"}
    make_trainer(tmp_path, max_steps=6, **settings).train()
    later = load_file(tmp_path / "checkpoints" / "step-000006" / "model.safetensors")
    (tmp_path / "checkpoints" / "step-000004" / "teachers.json").unlink()  # so that another teacher is accepted
    again = make_trainer(tmp_path, max_steps=6, teacher=make_model(3), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000004"))
    aside = tmp_path / "superseded" / "1"
    assert "superseded/1" in caplog.text
    assert all(
        torch.equal(t, later[name])
        for name, t in load_file(aside / "checkpoints/step-000006/model.safetensors").items()
    )
    assert [path.name for path in (aside / "trajectory").iterdir()] == ["step-000006"]
    assert [row["step"] for row in read_rows(aside / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in again.run_dir.checkpoints()] == ["step-000004", "step-000006"]
    for kind in ("checkpoints", "trajectory"):
        new, old = (load_file(root / kind / "step-000006" / "model.safetensors") for root in (tmp_path, aside))
        assert any(not torch.equal(t, old[name]) for name, t in new.items())
    assert again.run_dir.set_aside(6) is None and again.run_dir.set_aside(4) == tmp_path / "superseded" / "2"


def test_resume_of_a_run_without_lookahead_state_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(CheckpointError, match="no look-ahead state"):
        make_trainer(tmp_path, effopd=EFFOPD).train(resume_from_checkpoint=True)


def test_a_second_run_into_the_same_directory_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_trainer(tmp_path, max_steps=2).train()
    assert (tmp_path / "metrics.jsonl").read_text() == rows
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "nothing"))


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + '{"step": 2, "lo')
    make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_start_at_step_0_is_said_once_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_trainer("run", max_steps=2).train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    line = f"no checkpoint in {tmp_path / 'run'}: starting at step 0\n"
    assert said.count(line) == 1 and said.index(line) < said.index("step 1/2")
    make_trainer("run", max_steps=2).train(resume_from_checkpoint=True)  # the same command again
    make_trainer("new", max_steps=1).train()
    other_rank = make_trainer("other", max_steps=1)
    monkeypatch.setattr(other_rank, "is_world_process_zero", lambda: False)
    other_rank.train(resume_from_checkpoint=True)
    assert "no checkpoint" not in capsys.readouterr().out


def test_a_termination_signal_ends_with_a_checkpoint_that_resumes_bit_for_bit(tmp_path, whole):
    """`enable_jit_checkpoint`, with a signal during step 5."""
    trainer = make_trainer(tmp_path, effopd=EFFOPD, eval_on_start=True, enable_jit_checkpoint=True)
    handler, real = signal.getsignal(signal.SIGTERM), trainer.training_step

    def step(*args, **kwargs):
        if trainer.state.global_step == 4:
            next(
                c for c in trainer.callback_handler.callbacks if isinstance(c, TerminationCallback)
            )._manager._enable_checkpoint()
        return real(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    assert trainer.terminated
    assert trainer.state.global_step == 5 and trainer.run_dir.last_checkpoint() == trainer.run_dir.checkpoint(5)
    assert signal.getsignal(signal.SIGTERM) is not handler  # the one before ours
    assert not list(tmp_path.glob("checkpoint-*"))
    make_trainer(tmp_path, effopd=EFFOPD, eval_on_start=True).train(resume_from_checkpoint=True)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    for name in ("metrics.jsonl", "searches.jsonl", "evals.jsonl"):
        assert comparable(tmp_path, name) == comparable(whole, name)
