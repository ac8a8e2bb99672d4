"""`teachers.json`: what it holds, and that a resumed run must have the same teachers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import make_model
from helpers.tiny_run import make_trainer

from effopd.distill.teachers.manifest import (
    TeacherEntry,
    check_same_teachers,
    entry_of,
    live_sha256,
    read_manifest,
    write_manifest,
)
from effopd.errors import CheckpointError
from effopd.models.fingerprint import weights_sha256

FAST = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no"}
MATH = TeacherEntry("math", "models/math", "abc", "bfloat16", None, "1" * 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with a teacher given by path."""
    root = tmp_path_factory.mktemp("run")
    make_model(1).save_pretrained(root / "teacher")
    make_trainer(root / "out", teacher=str(root / "teacher"), **FAST).train()
    return root


def test_every_checkpoint_and_the_run_directory_name_the_teacher(run):
    (entry,) = read_manifest(run / "out")
    assert entry == TeacherEntry(
        "teacher", str(run / "teacher"), None, "float32", None, weights_sha256(run / "teacher")
    )
    for step in (1, 2):
        assert read_manifest(run / "out" / "checkpoints" / f"step-{step:06d}") == [entry]


def test_another_teacher_is_refused_before_anything_changes(run):
    rows = (run / "out" / "metrics.jsonl").read_text()
    trainer = make_trainer(run / "out", teacher=make_model(2), **FAST)
    with pytest.raises(CheckpointError, match=r"teacher 'teacher': weights .* → "):
        trainer.train(resume_from_checkpoint=str(run / "out" / "checkpoints" / "step-000001"))
    assert (run / "out" / "metrics.jsonl").read_text() == rows


def test_the_same_weights_as_an_object_are_the_same_teacher(run):
    model = make_model(1)
    check_same_teachers(run / "out", [entry_of("teacher", model, model)])


def test_a_model_object_is_hashed_in_memory():
    model = make_model(1)
    entry = entry_of("teacher", model, model)
    assert entry.sha256 == live_sha256(model) and entry.dtype == "float32" and entry.name == ""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert live_sha256(model) != entry.sha256
    assert live_sha256(model.to(torch.bfloat16)) != live_sha256(model.float())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(MATH, sha256="2" * 64), "teacher 'math': weights 111111111111 (models/math) → 222222222222"),
        (replace(MATH, dtype="float32"), "teacher 'math': dtype bfloat16 → float32"),
        (replace(MATH, quantization="8bit"), "teacher 'math': quantization None → 8bit"),
        (replace(MATH, label="code"), "teacher 'code' is new; teacher 'math' is missing"),
    ],
)
def test_each_difference_is_named(other, named, tmp_path):
    write_manifest(tmp_path, [MATH])
    with pytest.raises(CheckpointError) as error:
        check_same_teachers(tmp_path, [other])
    assert named in str(error.value)


def test_more_or_fewer_teachers_are_refused(tmp_path):
    code = replace(MATH, label="code", sha256="3" * 64)
    for before, now in (([MATH, code], [MATH]), ([MATH], [MATH, code])):
        write_manifest(tmp_path, before)
        with pytest.raises(CheckpointError, match="teacher 'code' is"):
            check_same_teachers(tmp_path, now)
        check_same_teachers(tmp_path, before[::-1])  # another order is the same set


def test_a_teacher_that_moved_is_the_same(tmp_path):
    write_manifest(tmp_path, [MATH])
    check_same_teachers(tmp_path, [replace(MATH, name="elsewhere", revision=None)])


def test_a_checkpoint_without_a_manifest_is_resumed_with_a_warning(tmp_path, caplog):
    check_same_teachers(tmp_path, [MATH])
    assert "no teachers.json" in caplog.text


def test_a_damaged_manifest_is_an_error(tmp_path):
    (tmp_path / "teachers.json").write_text(json.dumps({"teachers": [{"label": "math"}]}))
    with pytest.raises(CheckpointError, match=r"teachers\.json"):
        read_manifest(tmp_path)
