"""Runs of a grid with the same settings must have read the same content."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from helpers.tiny_models import make_model

from effopd.compare.grid import PlannedRun
from effopd.compare.same_inputs import check_same_content, check_unchanged_teachers
from effopd.distill.teachers.manifest import TeacherEntry, write_manifest
from effopd.errors import ConfigError
from effopd.models.fingerprint import weights_sha256
from effopd.runs.inputs import Inputs, PromptSet, write_inputs

TEACHER = TeacherEntry("teacher", "m/t", None, "float32", None, "1" * 64)
INPUTS = Inputs(PromptSet(100, "a" * 64), PromptSet(8, "b" * 64), "c" * 64)


def a_run(root, name, teacher=TEACHER, inputs=INPUTS, seed=0, **settings):
    path = root / name
    path.mkdir()
    if teacher is not None:
        write_manifest(path, [teacher])
    if inputs is not None:
        write_inputs(path, inputs)
    base = {"task": "math:p.jsonl", "task_seed": seed, "model_name_or_path": "m/s"}
    return PlannedRun("math:p.jsonl", name, 3e-5, seed, path, base | settings)


def changed(record, **values):
    return type(record)(**{**{name: getattr(record, name) for name in asdict(record)}, **values})


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("the teacher 'm/t'", {"teacher": changed(TEACHER, sha256="2" * 64)}),
        ("the training prompts", {"inputs": changed(INPUTS, train=PromptSet(60, "d" * 64))}),
        ("the held-out prompts", {"inputs": changed(INPUTS, held_out=PromptSet(8, "d" * 64))}),
        ("the student's initial weights", {"inputs": changed(INPUTS, weights="d" * 64)}),
    ],
)
def test_other_content_behind_the_same_settings_is_refused(tmp_path, what, other):
    same = [a_run(tmp_path, "plain"), a_run(tmp_path, "fast", per_device_train_batch_size=4)]
    check_same_content(same)
    with pytest.raises(ConfigError, match=f"late and .*plain cannot be compared: {what} changed"):
        check_same_content([*same, a_run(tmp_path, "late", **other)])


def test_other_settings_may_read_other_content(tmp_path):
    runs = [
        a_run(tmp_path, "plain"),
        a_run(tmp_path, "seed", inputs=Inputs(PromptSet(100, "e"), PromptSet(8, "e"), INPUTS.weights), seed=1),
        a_run(tmp_path, "few", inputs=changed(INPUTS, train=PromptSet(9, "f")), train_size=9),
        a_run(tmp_path, "bf16", inputs=changed(INPUTS, weights="g"), dtype="bfloat16"),
        a_run(tmp_path, "wide", teacher=changed(TEACHER, name="m/wide", sha256="h")),
        a_run(tmp_path, "unmeasured", teacher=changed(TEACHER, sha256=None), inputs=Inputs()),
        a_run(tmp_path, "old", teacher=None, inputs=None),
    ]
    check_same_content(runs)


def test_a_teacher_that_has_changed_on_disk_is_refused_before_more_runs(tmp_path):
    folder = tmp_path / "teacher"
    make_model(1).save_pretrained(folder)
    entry = changed(TEACHER, name=str(folder), sha256=weights_sha256(folder))
    finished = [a_run(tmp_path, "plain", teacher=entry), a_run(tmp_path, "hub")]
    check_unchanged_teachers(finished)
    make_model(2).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"the teacher '.*teacher' has changed since .*plain was run"):
        check_unchanged_teachers(finished)
    (folder / "model.safetensors").unlink()  # not readable: nothing to compare
    check_unchanged_teachers(finished)
    assert json.loads((finished[0].path / "teachers.json").read_text())["teachers"][0]["name"] == str(folder)
