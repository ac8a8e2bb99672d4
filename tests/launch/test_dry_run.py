"""Dry runs: number of models that they build, and sizes of the models as they are loaded."""

from __future__ import annotations

import json

import pytest
import torch

from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_train
from effopd.launch import meta_model
from effopd.launch.dry_run import plan_tables
from effopd.launch.memory_estimate import estimate_memory
from effopd.launch.plan_rows import start_text
from effopd.launch.rl_dry_run import rl_plan_tables
from effopd.runs.checkpoints import TRAINER_STATE
from effopd.runs.run_dir import RunDir
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


def test_the_plan_names_objective_optimizer_and_use_of_rollouts(tmp_path):
    rows = plan(PAIR, tmp_path)
    assert rows["objective"] == "loss_type full, beta 1 (reverse KL)" and rows["start"] == "at step 0"
    assert rows["optimizer"] == "adamw_torch_fused; schedule constant"
    assert not {"use of rollouts", "adapter", "average of weights", "k-step Lookahead"} & set(rows)
    reuse = ["--updates_per_rollouts", "3", "--replay_batches", "10", "--max_completion_length", "24"]
    reuse += ["--gradient_accumulation_steps", "2"]
    optimizer = ["--optimizer_class", "torch.optim:RMSprop", "--optimizer_args", '{"alpha": 0.5, "centered": true}']
    schedule = ["--lr_scheduler_type", "cosine", "--warmup_steps", "5", "--max_grad_norm", "0.2"]
    average = ["--average_weights", "ema", "--average_decay", "0.9", "--k_step_lookahead", "5"]
    objective = ["--beta", "0.5", "--token_mask", "first_special"]
    rows = plan([*PAIR, *reuse, *optimizer, *schedule, *average, *objective], tmp_path)
    host = 9 * 8 * 2 * 24 * 128 * 4  # batches, rows, tokens, hidden size, bytes
    assert rows["objective"] == "loss_type full, beta 0.5, token_mask first_special"
    assert rows["use of rollouts"] == (
        "3 updates per batch, the last one on one of the last 10 batches (replay); "
        f"up to {host / 1e9:.3g} GB of host memory per process"
    )
    assert rows["optimizer"] == (
        'torch.optim:RMSprop {"alpha": 0.5, "centered": true}; max_grad_norm 0.2; '
        "schedule cosine after a warm-up of 5 step(s)"
    )
    assert rows["average of weights"] == "ema, decay 0.9; evaluated and saved"
    assert rows["k-step Lookahead"] == "every 5 steps, 0.5 of the way"
    parts = ["--updates_per_rollouts", "8", "--num_mini_batches", "4", "--per_device_train_batch_size", "16"]
    rows = plan([*PAIR, *parts, "--effopd.strategy", "newton_search"], tmp_path)
    assert rows["use of rollouts"] == "8 updates per batch, each on one of 4 parts (4 prompts)"
    assert "scores 4 rollouts per candidate (12 in the first search)" in rows["look-ahead"]


def test_the_plan_names_adapter_and_resumed_step(tmp_path, monkeypatch):
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    adapter = plan([*PAIR, *lora], tmp_path)["adapter"]
    assert adapter.startswith("LoRA r 4, alpha 32; on q_proj, v_proj; ") and adapter.endswith(" trained parameters")
    resume = [*PAIR, "--resume_from_checkpoint"]
    assert plan(resume, tmp_path)["start"] == "at step 0 (--resume_from_checkpoint: there is no checkpoint yet)"
    args = parse_train([*resume, "--output_dir", str(tmp_path)]).opd
    checkpoint = RunDir(tmp_path).checkpoint(8)
    checkpoint.mkdir(parents=True)
    (checkpoint / TRAINER_STATE).write_text('{"global_step": 8}')
    monkeypatch.setattr("effopd.runs.run_dir.check_complete", lambda folder: None)
    assert start_text(args) == f"resumes from step 8 ({checkpoint})"


def test_the_plan_of_reinforcement_learning_names_its_optimizer(tmp_path):
    flags = [*FLAGS, "--output_dir", str(tmp_path), "--optim", "sgd", "--weight_decay", "0.1"]
    table = rl_plan_tables(parse_rl(flags))[0]
    rows = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows["optimizer"] == "sgd; weight_decay 0.1; schedule constant" and rows["start"] == "at step 0"


def test_what_the_plan_cannot_know_of_a_teacher_it_calls_unknown(tmp_path):
    names = ["--model_name_or_path", "org/Qwen3-0.6B", "--teacher_model_name_or_path", "org/Qwen3-8B"]
    flags = [*names, "--task", "testbed:chain_sum", "--teacher_dtype", "bfloat16", "--use_cpu"]
    assert plan(flags, tmp_path)["teacher's weights"] == (
        "16 GB in bfloat16. Choices, GB: float32: 32, bfloat16: 16, 8 bits: 8.48, 4 bits: 4.48. bfloat16 offloaded "
        "(between uses) and bfloat16 sharded over 8: unknown until the model's configuration is on disk"
    )
    assert "float32 sharded over 8: 0." in plan(PAIR, tmp_path)["teacher's weights"]
    settings = parse_train([*flags, "--teacher_offload", "true", "--output_dir", str(tmp_path)])
    estimate = estimate_memory(settings, None)
    assert all(column["teacher"] == 16e9 for column in estimate.columns)
    assert estimate.prompts.endswith("the offloaded teacher counts as whole: its configuration is not on disk")
