"""What a resume leaves alone: a finished run, the folder of a refused one, and the disk that the
run has taken already.
"""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_task
from helpers.tiny_run import EFFOPD, make_trainer
from helpers.traces import Interrupt
from safetensors.torch import load_file
from transformers import TrainerCallback

from effopd import EffOPDConfig
from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.errors import CheckpointError
from effopd.extrapolate.anchor_files import ANCHOR_FILE
from effopd.launch.meta_model import meta_model
from effopd.tasks import builtin_models as testbed

pytestmark = pytest.mark.slow


Usage = namedtuple("Usage", "total used free")


def everything(root: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def interrupted(root, step, **settings):
    trainer = make_trainer(root, **settings)
    trainer.add_callback(Interrupt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def flags(output_dir, *extra):
    return [
        "train", "--model_name_or_path", "testbed:student", "--teacher_model_name_or_path", "testbed:teacher",
        "--task", "testbed:chain_sum", "--train_size", "256", "--max_completion_length", "8", "--max_steps", "2",
        "--per_device_train_batch_size", "8", "--activation_checkpointing", "false", "--report_to", "none",
        "--disable_tqdm", "true", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2",
        "--use_cpu", "true", "--effopd.strategy", "line_search", "--output_dir", str(output_dir), *extra,
    ]  # fmt: skip


RESUME = ("--resume_from_checkpoint", "true")

# -- a finished run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": 3, "effopd": EffOPDConfig("line_search")}, 3),
        ({"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 3),
        ({"max_steps": -1, "num_train_epochs": 1.5, "task": make_task(24)}, 5),  # 3 steps an epoch
        ({"max_steps": -1, "num_train_epochs": 1, "task": make_task(24)}, 3),
    ],
)
def test_a_finished_run_is_left_as_it_is(tmp_path, caplog, settings, last):
    settings = {"save_steps": 2, "eval_on_start": True, "trajectory": "powers_of_two"} | settings
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == last
    before, expected = everything(tmp_path), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for _ in range(2):
        caplog.clear()
        again = make_trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=True)
        assert f"{tmp_path} is finished (step {last} of {last}); nothing was trained" in caplog.text
        assert again.state.global_step == last and everything(tmp_path) == before
        assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())


def test_a_finished_run_goes_on_to_a_later_limit(tmp_path):
    settings = {"eval_strategy": "no", "save_steps": 2}
    make_trainer(tmp_path / "whole", max_steps=5, **settings).train()
    for limit in (3, 3, 5):
        trainer = make_trainer(tmp_path / "part", max_steps=limit, **settings)
        trainer.train(resume_from_checkpoint=True)
    one, other = (load_file(tmp_path / n / "checkpoints/step-000005/model.safetensors") for n in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_gets_its_final_model(tmp_path, caplog):
    assert main(flags(tmp_path)) == 0
    before = everything(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # as if killed between the last checkpoint and the final save
    assert main(flags(tmp_path, *RESUME)) == 0
    assert "is finished (step 2 of 2)" in caplog.text
    # of the final model: it says that this was a resume; its card: what the last checkpoint had
    # cost
    changed = {"training_args.bin": b"", "README.md": b""}
    assert everything(tmp_path) | changed == before | changed


# -- a refused resume ------------------------------------------------------------------------------


REFUSED = {
    "min_z differ": ("--effopd.min_z", "3"),
    "seed differ": ("--effopd.seed", "1"),
    "a step takes 512 prompts": ("--per_device_train_batch_size", "512"),
    "is no checkpoint": ("--resume_from_checkpoint", "/nowhere"),
}


def test_refused_commands_change_nothing(tmp_path, capsys):
    assert main(flags(tmp_path)) == 0
    before = everything(tmp_path)
    for message, extra in REFUSED.items():
        assert main(flags(tmp_path, "--max_steps", "4", *RESUME, *extra)) == 2
        assert message in capsys.readouterr().err
        assert everything(tmp_path) == before, message
    assert main(flags(tmp_path, "--max_steps", "3", *RESUME)) == 0
    assert "max_steps: 3" in (tmp_path / "config.yaml").read_text()


def test_a_damaged_anchor_changes_nothing(tmp_path):
    """Found only while the anchor is loaded; rows and checkpoints beyond it would have been set
    aside.
    """
    settings = {"effopd": EFFOPD, "max_steps": 4, "eval_strategy": "no"}
    make_trainer(tmp_path, **settings).train()
    anchor = tmp_path / "checkpoints" / "step-000002" / ANCHOR_FILE
    anchor.write_bytes(anchor.read_bytes()[:-7])
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(anchor.parent))
    assert everything(tmp_path) == before


def test_a_refused_start_leaves_the_folder_free(tmp_path):
    settings = {"eval_strategy": "no", "max_steps": 2, "trajectory": "1"}
    trainer = make_trainer(tmp_path, **settings)

    class Refuse(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise CheckpointError("no")

    trainer.add_callback(Refuse())
    with pytest.raises(CheckpointError, match="no"):
        trainer.train()
    assert not everything(tmp_path)
    make_trainer(tmp_path, **settings).train()


def test_going_back_keeps_the_searches_of_the_run_before(tmp_path):
    settings = {"effopd": EFFOPD, "max_steps": 4, "eval_strategy": "no"}
    make_trainer(tmp_path, **settings).train()
    make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000002"))
    assert steps(tmp_path / "superseded" / "1" / "searches.jsonl") == [1, 2, 4]
    assert steps(tmp_path / "searches.jsonl") == [1, 2, 4]


# -- the disk --------------------------------------------------------------------------------------


def test_a_resume_may_use_what_it_has_taken(tmp_path, monkeypatch, capsys):
    """A disk that a run fits on exactly is large enough for its resume, also after a kill while it
    saved.
    """
    each = meta_model("the student", str(testbed.student_path())).num_parameters() * 16
    room = 3 * each + 3 * each // 4  # two checkpoints, one being written; two of the trajectory, the final model
    extra = ("--trajectory", "100", "--max_steps", "4")

    def used() -> int:
        return sum(map(len, everything(tmp_path).values()))

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(room, used(), room - used()))
    assert main(flags(tmp_path, *extra)) == 0
    for name in ("checkpoints/step-000004", "trajectory/step-000004"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "checkpoints" / ".staging" / "half").write_bytes(bytes(each // 2))
    counted = ("checkpoints", "trajectory", "model.safetensors")
    room += sum(len(data) for name, data in everything(tmp_path).items() if not name.startswith(counted))  # rows, …
    assert main(flags(tmp_path, *extra, *RESUME)) == 0

    capsys.readouterr()
    room = used() + each // 2
    assert main(flags(tmp_path, *extra, "--max_steps", "6", *RESUME)) == 2
    assert "are already on disk" in capsys.readouterr().err
    assert main(flags(tmp_path, *extra, *RESUME)) == 0  # finished: nothing more is written


# -- step 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_start", [False, True])
def test_an_evaluation_before_training_is_the_row_of_step_0(tmp_path, on_start):
    settings = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "eval_on_start": on_start}
    trainer = make_trainer(tmp_path, **settings)
    measured = trainer.evaluate()
    trainer.train()
    assert steps(tmp_path / "evals.jsonl") == [0, 2]
    assert next(read_rows(tmp_path / "evals.jsonl"))["eval_kl"] == measured["eval_kl"]

    before = everything(tmp_path)
    other = make_trainer(tmp_path, **settings)
    other.evaluate()  # of a run that is there already: no row of it
    with pytest.raises(CheckpointError, match="already holds a run"):
        other.train()
    other.train(resume_from_checkpoint=True)
    assert everything(tmp_path) == before


def test_a_run_killed_before_its_first_checkpoint_has_one_row_of_step_0(tmp_path, caplog):
    settings = {"max_steps": 4, "save_steps": 4, "eval_steps": 2, "eval_on_start": True}
    interrupted(tmp_path, 3, **settings)
    assert steps(tmp_path / "evals.jsonl") == [0, 2]
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert steps(tmp_path / "evals.jsonl") == [0, 2, 4] and steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert "finished" not in caplog.text
