"""The best model is the best: by the direction of its metric, among the steps that were saved,
through a resume, and said so.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from safetensors.torch import load_file

from effopd import OPDConfig, OPDTrainer
from effopd.commands.main import main
from effopd.distill.rl import TaskRLOOTrainer
from effopd.distill.rl_config import TaskGRPOConfig, TaskRLOOConfig
from effopd.errors import ConfigError
from effopd.report.run_page import write_run_page
from effopd.runs.best_model import HOST_DIRECTIONS, Kept, best_row, direction, read_kept
from effopd.runs.lines import closing_lines
from effopd.runs.model_card import model_card
from effopd.runs.records import DIRECTIONS

USABLE = {name: greater for name, greater in DIRECTIONS.items() if greater is not None}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
CONFIGS = (OPDConfig, TaskGRPOConfig, TaskRLOOConfig)


def config(kind=OPDConfig, **settings):
    return kind(**({"output_dir": "nowhere", "use_cpu": True, "report_to": "none"} | EVERY_STEP | settings))


def scripted(trainer, values: dict[int, float], metric: str):
    """Evaluations that find `values` by step."""
    trainer._measure_task = lambda task: ({metric: values[trainer.state.global_step]}, 0)
    return trainer


def final(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def is_step(trainer, step: int) -> bool:
    saved = load_file(trainer.run_dir.checkpoint(step) / "model.safetensors")
    return all(torch.equal(saved[name], tensor) for name, tensor in final(trainer).items() if name in saved)


# -- directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_every_metric_of_a_distillation_has_an_entry(tmp_path, greedy):
    trainer = make_trainer(tmp_path, eval_greedy=greedy)
    assert {f"eval_{name}" for name in trainer.eval_metrics()} == set(trainer.evaluate())
    assert set(trainer.eval_metrics()) <= set(DIRECTIONS)


@pytest.mark.parametrize("several", [True, False])
def test_every_metric_of_the_hosts_evaluation_has_an_entry(tmp_path, several):
    data = make_task(8).to_dataset()
    trainer = OPDTrainer(
        make_model(0),
        make_model(1),
        config(output_dir=str(tmp_path), max_completion_length=4, disable_tqdm=True, per_device_train_batch_size=8),
        train_dataset=data,
        eval_dataset={"one": data, "two": data} if several else data,
        processing_class=make_tokenizer(),
    )
    found = {name.removeprefix("eval_") for name in trainer.evaluate()}
    if several:
        assert {name.removeprefix("one_").removeprefix("two_") for name in found - {"epoch"}} <= set(HOST_DIRECTIONS)
        assert direction("eval_two_loss") is False and "two_loss" in trainer.eval_metrics()
    else:
        assert found <= set(HOST_DIRECTIONS) == set(trainer.eval_metrics())


def test_every_metric_of_reinforcement_learning_has_an_entry(tmp_path):
    task = make_task(16)
    args = config(
        TaskRLOOConfig,
        output_dir=str(tmp_path),
        max_completion_length=4,
        num_generations=4,
        per_device_train_batch_size=8,
        disable_tqdm=True,
        load_best_model_at_end=True,
        beta=0.0,
    )
    trainer = TaskRLOOTrainer(make_model(0), args, task, task.sample(4, 0), processing_class=make_tokenizer())
    assert {f"eval_{name}" for name in trainer.eval_metrics()} == set(trainer.evaluate())
    assert (args.metric_for_best_model, args.greater_is_better) == ("accuracy", True)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("name", "greater"), USABLE.items())
def test_the_direction_is_the_metrics(kind, name, greater):
    for metric in (name, f"eval_{name}"):
        args = config(kind, load_best_model_at_end=True, metric_for_best_model=metric)
        assert args.greater_is_better is greater
        with pytest.raises(ConfigError, match="contradicts metric_for_best_model"):
            config(kind, metric_for_best_model=metric, greater_is_better=not greater)
        plateau = config(kind, metric_for_best_model=metric, lr_scheduler_type="reduce_lr_on_plateau")
        assert (plateau.lr_scheduler_kwargs or {}).get("mode", "min") == ("max" if greater else "min")
        with pytest.raises(ConfigError, match="Leave the mode out"):
            config(
                kind, metric_for_best_model=metric, lr_scheduler_type="greedy",
                lr_scheduler_kwargs={"mode": "min" if greater else "max"},
            )  # fmt: skip


def test_no_evaluation_no_best_model():
    with pytest.raises(ConfigError, match="expected evaluations"):
        config(save_strategy="best", eval_strategy="no")
    for save in ("no", "steps", "best"):
        with pytest.raises(ConfigError, match=r"^--load_best_model_at_end needs evaluations\. Add"):
            config(load_best_model_at_end=True, save_strategy=save, eval_strategy="no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_steps": 10, "save_steps": 15}, "--save_steps 15: expected a multiple of --eval_steps 10, because"),
        (
            {"eval_steps": None, "logging_steps": 4, "save_steps": 6},
            "--save_steps 6: expected a multiple of --eval_steps 4, because",
        ),
        ({"eval_steps": 0.2, "save_steps": 0.5}, "--save_steps 0.5: expected a multiple of --eval_steps 0.2, because"),
        ({"eval_steps": 0.2, "save_steps": 2}, "--save_steps 2: expected a share of training, as --eval_steps 0.2,"),
        ({"eval_steps": 2, "save_steps": 0.5}, "--save_steps 0.5: expected a number of steps, as --eval_steps 2,"),
        ({"save_strategy": "epoch"}, "--save_strategy epoch: expected steps, as --eval_strategy,"),
        ({"save_strategy": "no"}, "--save_strategy no: expected steps, as --eval_strategy,"),
        ({"eval_steps": 5, "save_steps": 15}, None),
        ({"eval_steps": 0.1, "save_steps": 0.3}, None),
        ({"eval_steps": 10, "save_steps": 15, "save_strategy": "best"}, None),
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_best_model_needs_an_evaluation_of_every_saved_step(kind, settings, message):
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps"} | settings
    with nullcontext() if message is None else pytest.raises(ConfigError, match=f"^{message}"):
        config(kind, **settings)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("eval_acc", "no such metric. Expected one of eval_kl"),
        ("response_length", "neither more nor less of it is better"),
        ("eval_runtime", "neither more nor less of it is better"),
        ("accuracy_greedy", "no such metric"),
    ],
)
def test_other_metrics_are_refused_before_training(tmp_path, metric, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, metric_for_best_model=metric, eval_greedy=False)
    assert not list(tmp_path.iterdir())


def flags(command, output_dir, *extra):
    return [
        command,
        "--model_name_or_path",
        "testbed:student",
        "--task",
        "testbed:chain_sum",
        "--train_size",
        "64",
        "--eval_size",
        "8",
        "--max_completion_length",
        "4",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "16",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--load_best_model_at_end",
        "true",
        "--output_dir",
        str(output_dir),
        *extra,
    ]


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_refuses_them_too(tmp_path, capsys, dry):
    teacher = ("--teacher_model_name_or_path", "testbed:teacher", *(["--dry_run"] if dry else []))
    assert main(flags("train", tmp_path, *teacher, "--metric_for_best_model", "eval_acc")) == 2
    assert "metric_for_best_model='eval_acc'" in capsys.readouterr().err
    if not dry:  # a distillation's metric, which reinforcement learning has not
        assert (
            main(
                flags(
                    "rl",
                    tmp_path,
                    "--algorithm",
                    "rloo",
                    "--num_generations",
                    "4",
                    "--metric_for_best_model",
                    "eval_kl",
                )
            )
            == 2
        )
        assert "Expected one of eval_accuracy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- the kept model --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("kl", {1: 0.5, 2: 0.2, 3: 0.3}, 2),
        ("accuracy", {1: 0.5, 2: 0.2, 3: 0.3}, 1),
        ("kl", {1: 0.5, 2: 0.4, 3: 0.3}, 3),
    ],
)
def test_the_kept_step_is_the_best_and_everything_names_it(tmp_path, metric, values, kept):
    trainer = scripted(
        make_trainer(tmp_path, max_steps=3, load_best_model_at_end=True, metric_for_best_model=metric, **EVERY_STEP),
        values,
        metric,
    )
    trainer.train()
    trainer.save_final()
    assert is_step(trainer, kept) and not is_step(trainer, 3 if kept < 3 else 2)
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (kept, values[kept])
    assert trainer.kept == read_kept(tmp_path) == Kept(kept, metric, values[kept])
    value = f"{values[kept]:.4f}" if metric == "kl" else f"{values[kept]:.3f}"
    said = closing_lines(tmp_path, 3, trainer.costs)
    assert f"The model is that of step {kept}, the best by eval_{metric} ({values[kept]:.4f})" in said
    for text in (said, str(model_card(trainer, "name"))):
        held_out = next(line for line in text.splitlines() if "held out" in line.lower())
        assert f"step {kept}" in text and value in held_out
        assert kept == 3 or f"{values[3]:.4f}" not in held_out
    page = write_run_page([tmp_path], tmp_path / "report.html").read_text()
    assert f"saved model: step {kept}, the best by eval_{metric}" in page


@pytest.mark.slow
def test_without_it_the_model_is_the_last(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, **EVERY_STEP)
    trainer.train()
    assert trainer.kept is None and read_kept(tmp_path) is None and is_step(trainer, 2)
    assert "The model is that of" not in closing_lines(tmp_path, 2, trainer.costs)


@pytest.mark.slow
def test_save_strategy_best_saves_each_new_best(tmp_path):
    settings = {"max_steps": 4, "metric_for_best_model": "eval_kl"} | EVERY_STEP | {"save_strategy": "best"}
    values = {1: 0.5, 2: 0.4, 3: 0.6, 4: 0.3}
    trainer = scripted(make_trainer(tmp_path, **settings), values, "kl")
    trainer.train()
    assert [path.name for path in trainer.run_dir.checkpoints()] == ["step-000001", "step-000002", "step-000004"]


@pytest.mark.slow
def test_a_metric_that_is_never_finite_is_said(tmp_path, caplog):
    trainer = scripted(
        make_trainer(tmp_path, max_steps=1, load_best_model_at_end=True, metric_for_best_model="kl", **EVERY_STEP),
        {1: float("nan")},
        "kl",
    )
    trainer.train()
    assert "No step was both evaluated and saved with a finite kl" in caplog.text and trainer.kept is None


# -- through a resume ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_step_is_found_again_where_the_run_was_moved(tmp_path):
    values = {1: 0.5, 2: 0.1, 3: 0.2, 4: 0.3}
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "kl", "save_total_limit": 1} | EVERY_STEP
    scripted(make_trainer(tmp_path / "here", max_steps=3, **settings), values, "kl").train()
    shutil.move(tmp_path / "here", tmp_path / "there")
    for limit in (3, 4):  # finished, and going on
        again = scripted(make_trainer(tmp_path / "there", max_steps=limit, **settings), values, "kl")
        again.train(resume_from_checkpoint=True)
        assert again.kept == (2, "kl", 0.1) and is_step(again, 2)


@pytest.mark.slow
def test_another_metric_after_a_resume_is_looked_up_anew(tmp_path):
    values = {1: 0.5, 2: 0.9, 3: 0.7}
    trainer = make_trainer(
        tmp_path, max_steps=2, load_best_model_at_end=True, metric_for_best_model="kl", **EVERY_STEP
    )
    trainer._measure_task = lambda task: ({"kl": 0.1, "accuracy": values[trainer.state.global_step]}, 0)
    trainer.train()
    assert trainer.kept.step == 1
    again = make_trainer(
        tmp_path, max_steps=3, load_best_model_at_end=True, metric_for_best_model="accuracy", **EVERY_STEP
    )
    scripted(again, values, "accuracy").train(resume_from_checkpoint=True)
    assert again.kept == (2, "accuracy", 0.9) and is_step(again, 2)


@pytest.mark.slow
def test_a_best_step_that_is_gone_does_not_hide_the_others(tmp_path):
    values = {1: 0.1, 2: 0.6, 3: 0.5}
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "kl"} | EVERY_STEP
    scripted(make_trainer(tmp_path, max_steps=2, **settings), values, "kl").train()
    shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
    again = scripted(make_trainer(tmp_path, max_steps=3, **settings), values, "kl")
    again.train(resume_from_checkpoint=True)
    assert again.kept == (3, "kl", 0.5)


def test_the_best_row_is_the_first_best_that_counts():
    rows = [{"step": 0, "eval_kl": 0.0}, {"step": 1, "loss": 9.0}] + [
        {"step": step, "eval_kl": value} for step, value in ((1, float("nan")), (2, 0.4), (3, 0.2), (4, 0.2), (5, 0.1))
    ]
    assert best_row(rows, "kl", False, lambda step: step < 5) == (3, "kl", 0.2)
    assert best_row(rows, "eval_kl", True, lambda step: True) == (2, "eval_kl", 0.4)
    assert best_row(rows, "accuracy", True, lambda step: True) is None
