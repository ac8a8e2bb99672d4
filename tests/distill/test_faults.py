"""What goes wrong on long runs: each fault ends in an error that says so, and the last whole
checkpoint goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import time

import pytest
import torch
from helpers.tiny_models import make_model
from helpers.tiny_run import EFFOPD, make_trainer
from safetensors.torch import load_file

from effopd import EffOPD, EffOPDConfig
from effopd.errors import CheckpointError, NonFiniteLossError, ScorerError
from effopd.extrapolate import anchor_files
from effopd.extrapolate.anchor_files import ANCHOR_FILE
from effopd.extrapolate.saved_state import STATE_FILE

RUN = {"eval_strategy": "no", "max_steps": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    make_trainer(root, effopd=EFFOPD, **RUN).train()
    return root


def last_step(root):
    return max((int(path.name[5:]) for path in (root / "checkpoints").glob("step-*")), default=0)


def last(root):
    return load_file(root / "checkpoints" / "step-000006" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("what", [ANCHOR_FILE, STATE_FILE])
@pytest.mark.parametrize("how", ["cut short", "overwritten"])
def test_a_damaged_anchor_is_refused_and_the_checkpoint_before_goes_on(tmp_path, whole, what, how):
    make_trainer(tmp_path, effopd=EFFOPD, **RUN | {"max_steps": 4}).train()
    file = tmp_path / "checkpoints" / "step-000004" / what
    file.write_bytes(file.read_bytes()[:-7] if how == "cut short" else b"\0" * 64)
    with pytest.raises(CheckpointError, match=r"damaged.*earlier checkpoint"):
        make_trainer(tmp_path, effopd=EFFOPD, **RUN).train(resume_from_checkpoint=True)
    earlier = str(tmp_path / "checkpoints" / "step-000002")
    make_trainer(tmp_path, effopd=EFFOPD, **RUN).train(resume_from_checkpoint=earlier)
    assert all(torch.equal(tensor, last(whole)[name]) for name, tensor in last(tmp_path).items())


@pytest.mark.slow
def test_a_full_disk_while_the_anchor_is_written(tmp_path, whole, monkeypatch):
    real, written = anchor_files.write_atomically, []

    def full(path, write):
        written.append(path.name)
        if written.count(ANCHOR_FILE) == 2:  # step 4
            path.with_name(".half").write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(anchor_files, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            make_trainer(tmp_path, effopd=EFFOPD, **RUN).train()
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-000002"]
    make_trainer(tmp_path, effopd=EFFOPD, **RUN).train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, last(whole)[name]) for name, tensor in last(tmp_path).items())


@pytest.mark.slow
def test_resuming_with_another_setting_names_it(tmp_path):
    make_trainer(tmp_path, effopd=EFFOPD, **RUN | {"max_steps": 4}).train()
    other = dataclasses.replace(EFFOPD, args={"scales": [1.0, 2.0]})
    with pytest.raises(CheckpointError, match=r"args.scales differ"):
        make_trainer(tmp_path, effopd=other, **RUN).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("loss_type", ["full", "sampled"])
def test_a_teacher_that_returns_nan_stops_the_run_before_an_update(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, teacher=make_model(1), loss_type=loss_type, **RUN)
    with torch.no_grad():
        trainer.teacher_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"step 1 .*not finite: teacher\."):
        trainer.train()
    start = dict(make_model(0).named_parameters())
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


def test_a_model_that_is_not_finite_is_refused_when_the_trainer_is_built(tmp_path):
    models = {"student": make_model(0), "teacher": make_model(1)}
    for role, model in models.items():
        damaged = copy.deepcopy(model)
        with torch.no_grad():
            damaged.model.norm.weight[0] = float("nan")
        with pytest.raises(NonFiniteLossError, match=f"the {role} cannot be used.*not finite"):
            make_trainer(tmp_path, **models | {role: damaged}, **RUN)


def test_weights_that_diverge_are_named_before_anything_is_sampled_from_them(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"predictions are not finite.*lower the learning rate"):
        make_trainer(tmp_path, learning_rate=1e30, **RUN).train()
    assert last_step(tmp_path) < 6


@pytest.mark.slow
def test_a_candidate_that_predicts_nothing_finite_is_rejected_and_training_goes_on(tmp_path):
    far = dataclasses.replace(EFFOPD, args={"scales": [1e25]})
    make_trainer(tmp_path, effopd=far, **RUN).train()
    rows = [json.loads(line) for line in (tmp_path / "searches.jsonl").read_text().splitlines()]
    assert [row["trials"][1]["verdict"] for row in rows] == ["non-finite"] * len(rows)
    assert all(row["accepted_scale"] == 0 and row["trials"][1]["score"] is None for row in rows)
    assert last_step(tmp_path) == 6


def test_a_scorer_that_hangs_is_stopped_and_leaves_no_trace():
    model = torch.nn.Linear(2, 1)
    calls = []

    def hangs(model):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(60)
        return float(len(calls))

    look = EffOPD(model, hangs, EffOPDConfig(parameters="all"), score_timeout=0.2)
    with torch.no_grad():
        model.weight.add_(1)
    before = model.weight.clone()
    start = time.perf_counter()
    with pytest.raises(ScorerError, match=r"TimeoutError at scale 2.0: took longer than 0.2 s"):
        look.search(1)
    assert time.perf_counter() - start < 30 and torch.equal(model.weight, before)
    look.search(2)  # and the next one has its own time
    assert look.history


def test_the_time_limit_may_change_on_a_resume(tmp_path):
    model = torch.nn.Linear(2, 1)
    EffOPD(model, lambda m: 0.0, EffOPDConfig(parameters="all")).save(tmp_path)
    EffOPD(model, lambda m: 0.0, EffOPDConfig(parameters="all"), score_timeout=5.0).load(tmp_path)
    assert json.loads((tmp_path / STATE_FILE).read_text())["anchor_step"] == 0
