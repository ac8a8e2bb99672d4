"""What a checkpoint must have to be resumed, and what is said where the run cannot equal one that
was not interrupted.
"""

from __future__ import annotations

import shutil

import pytest
from distill.test_resume import RESUME, everything, flags, interrupted
from helpers.tiny_models import make_model
from helpers.tiny_run import EFFOPD, make_trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from effopd.commands.main import main
from effopd.distill.config import OPDConfig
from effopd.distill.resuming import settings_that_matter
from effopd.errors import CheckpointError

pytestmark = pytest.mark.slow

# -- what a checkpoint must have -------------------------------------------------------------------

PAIR = {"eval_strategy": "no", "max_steps": 4, "save_steps": 2}
LAST = "step-000002"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of four steps that was killed after its second."""
    root = tmp_path_factory.mktemp("killed")
    interrupted(root, 3, **PAIR)
    return root


@pytest.fixture
def root(tmp_path, killed):
    """A copy of it."""
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run"


def resume(root, **settings):
    trainer = make_trainer(root, **PAIR | settings)
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", r"lacks the weights\."),
        ("optimizer.pt", r"lacks the optimizer's state \(optimizer.pt\)\. --save_only_model.*--model_name_or_path"),
        ("scheduler.pt", r"lacks the schedule's \(scheduler.pt\)"),
        ("rng_state.pth", r"lacks the random states \(rng_state.pth\)"),
        ("trainer_state.json", "is no checkpoint"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(root, missing, message):
    (root / "checkpoints" / LAST / missing).unlink()
    before = everything(root)
    with pytest.raises(CheckpointError, match=message):
        resume(root)
    assert everything(root) == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("trainer_state.json", "trainer_state.json in"),
        ("model.safetensors", "the weights in"),
        ("optimizer.pt", "the optimizer's or the schedule's state in"),
        ("scheduler.pt", "the optimizer's or the schedule's state in"),
        ("rng_state.pth", "the random state in"),
        ("effopd_ledger.json", "effopd_ledger.json in"),
        ("effopd_settings.json", "effopd_settings.json in"),
    ],
)
def test_a_damaged_file_is_named(root, file, message):
    path = root / "checkpoints" / LAST / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{message} .*cannot be read.*earlier checkpoint"):
        resume(root)


def test_checkpoints_of_the_weights_alone_are_not_resumed(tmp_path, caplog):
    settings = {"save_only_model": True, "save_steps": 1}
    interrupted(tmp_path, 3, **PAIR | settings)
    with pytest.raises(
        CheckpointError, match=r"lacks the optimizer's state.*the schedule's.*the random states.*--save_only_model"
    ):
        resume(tmp_path, **settings)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / LAST)  # the documented way on
    make_trainer(tmp_path / "on", student=start, **PAIR | {"max_steps": 1}).train()


def test_a_finished_run_needs_its_weights_alone(tmp_path, caplog):
    settings = PAIR | {"save_only_model": True}
    make_trainer(tmp_path, **settings).train()
    before = everything(tmp_path)
    make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert "is finished" in caplog.text and everything(tmp_path) == before
    with pytest.raises(CheckpointError, match="lacks the optimizer's state"):  # but not to go on
        make_trainer(tmp_path, **settings | {"max_steps": 6}).train(resume_from_checkpoint=True)
    assert everything(tmp_path) == before


def test_the_command_and_its_dry_run_refuse_it(tmp_path, capsys):
    assert main(flags(tmp_path, "--save_only_model", "true", "--max_steps", "4")) == 0
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    before = everything(tmp_path)
    for extra in ([], ["--dry_run"]):
        assert main(flags(tmp_path, "--max_steps", "4", *RESUME, *extra)) == 2
        assert "lacks the optimizer's state" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_weights_of_another_model_are_refused(root):
    with pytest.raises(CheckpointError, match=r"the weights in .*size mismatch"):
        resume(root, student=make_model(0, hidden=32))
    deeper = make_model(0)
    deeper.model.layers.append(type(deeper.model.layers[0])(deeper.config, 1))
    with pytest.raises(CheckpointError, match=r"belongs to another model: .* missing"):
        resume(root, student=deeper)


def test_adapters_and_whole_models_do_not_mix(root, tmp_path):
    def adapted():
        return get_peft_model(make_model(0), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))

    with pytest.raises(CheckpointError, match="holds all weights, but this run trains an adapter"):
        resume(root, student=adapted())
    interrupted(tmp_path / "adapter", 3, student=adapted(), **PAIR)
    with pytest.raises(CheckpointError, match="holds an adapter"):
        resume(tmp_path / "adapter")
    assert resume(tmp_path / "adapter", student=adapted()).state.global_step == 4


# -- what makes it unequal is said -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 1e-4}, ["learning_rate 0.002 → 0.0001", "Without effect: learning_rate;"]),
        ({"weight_decay": 0.1}, ["weight_decay 0.0 → 0.1", "Without effect"]),
        ({"lr_scheduler_type": "linear"}, ["lr_scheduler_type constant → linear"]),
        ({"max_grad_norm": 0.5}, ["max_grad_norm"]),
        ({"beta": 0.5}, ["beta 1.0 → 0.5"]),
        ({"seed": 7}, ["seed 42 → 7"]),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, ["per_device_train_batch_size 8 → 4"]),
        ({"ignore_data_skip": True}, ["ignore_data_skip restarts the epoch's prompts"]),
    ],
)
def test_a_setting_that_changes_the_run_is_said(root, caplog, settings, said):
    resume(root, **settings)
    assert all(text in caplog.text for text in said)
    assert "will differ from an uninterrupted one" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": 3},
        {"save_steps": 1, "save_total_limit": 1, "logging_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_temperature": 0.5, "per_device_eval_batch_size": 4},
    ],
)
def test_a_setting_that_changes_nothing_is_not(root, caplog, settings):
    resume(root, **settings)
    assert "will differ" not in caplog.text


def test_another_limit_counts_where_the_schedule_depends_on_it(tmp_path, caplog):
    linear = {"lr_scheduler_type": "linear"}
    interrupted(tmp_path, 3, **PAIR | linear)
    resume(tmp_path, max_steps=5, **linear)
    assert "max_steps 4 → 5" in caplog.text


def test_another_limit_counts_where_the_warm_up_is_a_share_of_it(tmp_path):
    settings = {"lr_scheduler_type": "constant_with_warmup", "output_dir": str(tmp_path), "report_to": "none"}
    seen = {
        (warmup, steps): settings_that_matter(OPDConfig(max_steps=steps, warmup_steps=warmup, **settings))
        for warmup in (0.1, 10)
        for steps in (100, 200)
    }
    assert seen[0.1, 100] != seen[0.1, 200] and seen[10, 100] == seen[10, 200]


def test_another_clock_is_refused(root):
    with pytest.raises(CheckpointError, match=r"seconds of the clock 'wall', got --cost_clock cpu.*--cost_clock wall"):
        resume(root, cost_clock="cpu")


def test_another_optimizer_is_refused(root):
    with pytest.raises(CheckpointError, match=r"has the state of the optimizer 'adamw_torch.*got --optim sgd"):
        resume(root, optim="sgd")


def test_costs_that_are_not_there_are_said(root, caplog):
    (root / "checkpoints" / LAST / "effopd_ledger.json").unlink()
    resume(root)
    assert "has no costs" in caplog.text


def test_another_number_of_processes_is_said(root, caplog):
    folder = root / "checkpoints" / LAST
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    resume(root)
    assert "was written by 2 process(es), and there are 1 now" in caplog.text


def test_a_look_ahead_that_is_left_out_is_said(tmp_path, caplog):
    interrupted(tmp_path, 3, effopd=EFFOPD, **PAIR)
    resume(tmp_path)
    assert "was written with a look-ahead, and this run has none" in caplog.text
