"""Dry runs: number of models that they build, and sizes of the models as they are loaded."""

from __future__ import annotations

import json

import pytest
import torch

from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_train
from effopd.launch import meta_model
from effopd.launch.dry_run import plan_tables
from effopd.launch.rl_dry_run import rl_plan_tables
from effopd.tasks.builtin_models import student_path, teacher_path

STUDENT, TEACHER = str(student_path()), str(teacher_path())
FLAGS = ["--model_name_or_path", STUDENT, "--task", "testbed:chain_sum", "--train_size", "16", "--use_cpu"]
PAIR = [*FLAGS, "--teacher_model_name_or_path", TEACHER]
LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear"]
REFERENCE = ["--reference_model_name_or_path", STUDENT, "--lambda_extrapolation", "1.25"]


@pytest.fixture
def built(monkeypatch):
    """Device of every model that is built."""
    devices = []
    build = meta_model.build_model

    def counted(*args, **kwargs):
        devices.append(torch.get_default_device().type)
        return build(*args, **kwargs)

    monkeypatch.setattr(meta_model, "build_model", counted)
    return devices


def plan(flags, folder):
    """Text of the plan of `effopd train`."""
    table = plan_tables(parse_train([*flags, "--output_dir", str(folder)]))[0]
    return dict(zip(*(list(column.cells) for column in table.columns), strict=True))


@pytest.mark.parametrize(
    ("flags", "meta", "fake"),
    [
        (PAIR, 2, 1),  # activations are counted once for two models of one shape
        ([*PAIR, *LORA], 3, 2),  # PEFT modifies a student of its own
        ([*PAIR, *REFERENCE], 2, 1),  # the reference is the student
        ([*PAIR, "--teacher_dtype", "bfloat16", "--effopd.strategy", "line_search"], 2, 1),
    ],
)
def test_a_dry_run_builds_each_model_once(flags, meta, fake, built, tmp_path):
    plan(flags, tmp_path)
    assert (built.count("meta"), built.count("cpu")) == (meta, fake)


@pytest.mark.parametrize(
    ("flags", "meta", "fake"),
    [(FLAGS, 1, 1), ([*PAIR, "--algorithm", "dgrpo", *LORA], 3, 2), ([*FLAGS, "--beta", "0.1", *LORA], 2, 1)],
)
def test_a_dry_run_of_reinforcement_learning_builds_each_model_once(flags, meta, fake, built, tmp_path):
    rl_plan_tables(parse_rl([*flags, "--output_dir", str(tmp_path)]))
    assert (built.count("meta"), built.count("cpu")) == (meta, fake)


def test_the_plan_counts_the_models_as_they_are_loaded(built, tmp_path):
    """Loading arguments can change the shape; models with different arguments are not shared."""
    flags = [
        *FLAGS,
        "--teacher_model_name_or_path",
        STUDENT,
        "--model_init_kwargs",
        json.dumps({"num_hidden_layers": 2}),
    ]
    rows = plan(flags, tmp_path)
    assert "(0.436 M parameters" in rows["student"] and "(0.83 M parameters" in rows["teacher"]
    assert built.count("meta") == 2


def test_the_plan_gives_the_length_of_rollouts(tmp_path):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 24}
    batch = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    esr = ["--rollout_horizon", "esr", "--horizon_tokens", "6", "--horizon_whole_share", "0.3"]
    text = plan([*PAIR, *batch, *esr], tmp_path)["rollout horizon"]
    assert text == "esr: the first 6 of 24 tokens; whole answers: 3 of 8 per process"
    popd = ["--rollout_horizon", "popd", "--horizon_start", "0.25"]
    assert plan([*PAIR, *batch, *popd], tmp_path)["rollout horizon"] == "popd: the first 6 tokens, growing to 24"
