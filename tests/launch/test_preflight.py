"""Bad combinations are found in seconds, by name, before any weights are loaded."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from helpers.tiny_models import contains, make_model, make_task, make_tokenizer
from trl import DistillationConfig, ModelConfig

from effopd.common.files import check_writable
from effopd.distill.config import OPDConfig
from effopd.distill.dataset import check_dataset, check_eval_dataset, check_eval_task
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.distill.served.trainer import ServedOPDTrainer
from effopd.distill.trainer import OPDTrainer
from effopd.errors import CheckpointError, CompatibilityError, ConfigError, TaskError
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch.adapters import check_adapter
from effopd.launch.meta_model import meta_model
from effopd.launch.opd import RunSettings, check_step, lengths
from effopd.launch.preflight import check_disk, check_models, check_task
from effopd.runs.run_dir import RunDir
from effopd.tasks import TaskConfig
from effopd.tasks.base import Example, Task

ROWS = Dataset.from_dict({"prompt": ["a"] * 5})


def save(folder, *, seed=0, vocab_size=64, tokenizer=None, eos=2):
    model = make_model(seed, vocab_size=vocab_size)
    model.generation_config.eos_token_id = eos
    model.config.eos_token_id = eos
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def student_dir(tmp_path):
    return save(tmp_path / "student")


def test_a_fitting_pair_passes(student_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_models(student_dir, save(tmp_path / "teacher", seed=1, vocab_size=80), make_tokenizer())
    assert not caplog.records


def test_different_tokenizers(student_dir, tmp_path):
    other = make_tokenizer()
    other.add_tokens(["<think>"])
    teacher = save(tmp_path / "teacher", tokenizer=other)
    with pytest.raises(CompatibilityError, match=r"different tokenizers: 1 tokens have different ids.*'<think>'"):
        check_models(student_dir, teacher, make_tokenizer())


def test_small_vocabulary(student_dir, tmp_path):
    with pytest.raises(CompatibilityError, match=r"teacher.*has 40 vocabulary rows"):
        check_models(student_dir, save(tmp_path / "teacher", vocab_size=40), make_tokenizer())


def test_end_tokens(student_dir, tmp_path, caplog):
    with pytest.raises(CompatibilityError, match=r"different tokens: \[2\] and \[1\]"):
        check_models(student_dir, save(tmp_path / "other", eos=1), make_tokenizer())
    with caplog.at_level(logging.WARNING):
        check_models(student_dir, save(tmp_path / "both", eos=[1, 2]), make_tokenizer())
    assert "End tokens differ" in caplog.text


def test_teacher_without_tokenizer_and_other_template_only_warn(student_dir, tmp_path, caplog):
    bare = tmp_path / "bare"
    make_model(1).save_pretrained(bare)
    other = make_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    with caplog.at_level(logging.WARNING):
        check_models(student_dir, str(bare), make_tokenizer())
        check_models(student_dir, save(tmp_path / "template", tokenizer=other), make_tokenizer())
    assert "has no tokenizer" in caplog.text and "different chat templates" in caplog.text


def test_unreadable_model(student_dir, tmp_path):
    with pytest.raises(CompatibilityError, match=r"the teacher.*no such folder, and not a valid Hub id"):
        check_models(student_dir, str(tmp_path / "nothing"), make_tokenizer())


def test_task_checks():
    tokenizer = make_tokenizer()
    assert check_task(make_task(4), tokenizer, None) > 5
    with pytest.raises(TaskError, match="at most 3 prompt tokens"):
        check_task(make_task(4), tokenizer, 3)
    with pytest.raises(TaskError, match="no examples"):
        check_task(Task("t", (), contains), tokenizer, None)
    always = Task("t", (Example("0", "a", "b"),), lambda completion, example: 1.0)
    with pytest.raises(TaskError, match="does not tell right from wrong"):
        check_task(always, tokenizer, None)
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(TaskError, match="chat template"):
        check_task(make_task(4), bare, None)
    check_task(Task("t", (Example("0", "a"),), contains), tokenizer, None)  # no answers: nothing to verify


def test_parameter_count_needs_no_weights(student_dir):
    assert meta_model("the student", student_dir).num_parameters() == make_model(0).num_parameters()


def test_a_dataset_that_no_step_can_be_made_of(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a"] * 5})
    check_dataset(rows, 5)
    check_dataset(rows.to_iterable_dataset(), 8)  # its length is not known
    for wrong, error, message in (
        (None, ConfigError, "train_dataset is missing"),
        (rows, ConfigError, "a step takes 8 prompts but train_dataset has 5"),
        (rows.select([]), ConfigError, "train_dataset has 0"),
        (rows.rename_column("prompt", "messages"), TaskError, "expected a column 'prompt'.*rename_column"),
    ):
        with pytest.raises(error, match=message):
            check_dataset(wrong, 8)
        with pytest.raises(error, match=message):
            OPDTrainer(
                make_model(0), make_model(1), OPDConfig(str(tmp_path), use_cpu=True, report_to="none"),
                train_dataset=wrong, processing_class=make_tokenizer(),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (make_task(4), r"got a Task. Pass task.to_dataset\(\)"),
        (DatasetDict(train=ROWS, test=ROWS), "got a DatasetDict. Pass one of its parts: train, test"),
        ("rows.jsonl", "got a str. Read it first"),
        (Path("rows.jsonl"), "Read it first"),
        (ROWS.to_pandas(), "got a DataFrame. Convert it"),
    ],
)
def test_what_is_no_dataset_is_refused_with_its_fix(wrong, fix):
    with pytest.raises(TaskError, match=f"train_dataset: expected a dataset.*{fix}"):
        check_dataset(wrong, 1)
    if not isinstance(wrong, DatasetDict):
        with pytest.raises(TaskError, match="eval_dataset: expected a dataset"):
            check_eval_dataset(wrong, None, "no")


def test_data_of_evaluations():
    task = make_task(4)
    check_eval_dataset({"a": ROWS, "b": ROWS}, None, "steps")
    check_eval_dataset(None, task, "steps")
    check_eval_dataset(None, None, "no")
    with pytest.raises(ConfigError, match="eval_strategy='steps' needs data: expected eval_task"):
        check_eval_dataset(None, None, "steps")
    check_eval_task(None)
    check_eval_task(task)
    for wrong, message in (
        (ROWS, "eval_task: expected an effopd.Task, got Dataset"),
        (Task("t", (), lambda text, example: 1.0), "has no examples"),
        (Task("t", (Example("0", "a"),), lambda text, example: 1.0), "has no answer"),
        (Task("t", (Example("0", "a", "b"),), lambda text, example: None), "expected a number"),
        (Task("t", (Example("0", "a", "b"),), lambda text, example: 1 / 0), "raised ZeroDivisionError"),
    ):
        with pytest.raises(TaskError, match=message):
            check_eval_task(wrong)


@pytest.mark.parametrize("trainer", [OPDTrainer, OfflineOPDTrainer, ServedOPDTrainer])
def test_a_configuration_of_the_host_is_refused(trainer, tmp_path):
    wrong = DistillationConfig(str(tmp_path), bf16=False, report_to="none")
    with pytest.raises(ConfigError, match=f"{trainer.__name__}: expected args to be an OPDConfig, got Distillation"):
        trainer("student", args=wrong)


def test_disk(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 5 * 10**9))
    check_disk(tmp_path / "a" / "b", 10**8, checkpoints=3, effopd=True)  # 3 × 1.6 GB
    with pytest.raises(CheckpointError, match="--save_total_limit"):
        check_disk(tmp_path, 10**8, checkpoints=4, effopd=True)
    check_disk(tmp_path, 10**8, checkpoints=4, effopd=False)  # without the anchor it fits
    check_disk(tmp_path, 10**8, checkpoints=4, optimizer=False, effopd=True)  # and without the moments
    check_disk(tmp_path, 10**8, checkpoints=3, copies=0, effopd=False)
    with pytest.raises(CheckpointError, match=r"3 checkpoints of 2\.0 GB"):  # 4 + 8 bytes, and two copies of 4
        check_disk(tmp_path, 10**8, checkpoints=3, copies=2, effopd=False)
    with pytest.raises(CheckpointError, match="--trajectory"):
        check_disk(tmp_path, 10**8, checkpoints=3, models=2, effopd=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**6))
    with pytest.raises(CheckpointError, match=r"has 1\.0 MB free, but 2 checkpoints of 12\.0 MB"):
        check_disk(tmp_path, 10**6, checkpoints=2, effopd=False)


def test_a_file_system_that_takes_no_files():
    """In /proc, permissions allow all to root."""
    with pytest.raises(CheckpointError, match="/proc is write-protected"):
        RunDir("/proc/nothing/run").refuse_unwritable()
    with pytest.raises(ConfigError, match="--out: /proc is write-protected"):
        check_writable(Path("/proc/nothing"), "--out")


def test_what_gives_a_step_more_prompts(tmp_path):
    opd = OPDConfig(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=8)
    for available in (None, 100):
        with pytest.raises(ConfigError, match=r"has only 4\..* or raise --train_size\."):
            check_step(opd, 4, available)
    with pytest.raises(ConfigError, match=r"has only 1\..* or add rows to the source; those held out for evaluation"):
        check_step(opd, 1, 1)


def test_a_run_that_samples_nothing_counts_its_stored_answers(tmp_path):
    rows = [SimpleNamespace(prompt_ids=[0] * a, completion_ids=[0] * b) for a, b in ((9, 2), (3, 30), (5, 4))]
    opd = OPDConfig(str(tmp_path), use_cpu=True, report_to="none", max_completion_length=512)
    settings = RunSettings(ModelConfig(), TaskConfig(task="testbed:chain_sum"), opd, EffOPDConfig("none"))
    stored = SimpleNamespace(rows=rows)
    assert lengths(settings, 9, stored) == (3, 30) and lengths(settings, 9, None) == (9, 512)
    settings.effopd = EffOPDConfig("effopd")  # scores sampled answers
    assert lengths(settings, 9, stored) == (9, 512)
    settings.effopd, opd.eval_strategy = EffOPDConfig("none"), "steps"
    assert lengths(settings, 9, stored) == (9, 512)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("nonsense", r"It has, for example, q_proj, k_proj, v_proj, o_proj, gate"), ("q_prj", r"Did you mean q_proj")],
)
def test_a_target_of_lora_that_the_model_lacks(name, hint):
    model = ModelConfig(use_peft=True, lora_target_modules=[name])
    with pytest.raises(ConfigError, match=rf"has no module '{name}'\. {hint}") as error:
        check_adapter(model, make_model(0))
    assert "embed" not in str(error.value)
