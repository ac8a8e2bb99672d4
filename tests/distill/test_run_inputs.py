"""`inputs.json`: what it holds, and what a resumed run must have in common with its checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.tiny_models import make_model, make_task
from helpers.tiny_run import make_trainer
from peft import LoraConfig, get_peft_model

from effopd.distill.run_inputs import adapter_settings, check_same_inputs, initial_sha256
from effopd.errors import CheckpointError
from effopd.runs.inputs import Inputs, PromptSet, prompt_set, read_inputs, write_inputs

FAST = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no"}


def adapted(seed=0, alpha=8, **more):
    return get_peft_model(
        make_model(seed), LoraConfig(r=2, lora_alpha=alpha, **({"target_modules": ["q_proj"]} | more))
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and its trainer."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(root, **FAST)
    trainer.train()
    return root, trainer


def test_the_run_and_its_checkpoints_record_prompts_and_initial_weights(run):
    root, trainer = run
    inputs = read_inputs(root)
    assert inputs == read_inputs(root / "checkpoints" / "step-000001")
    assert inputs.train == prompt_set(trainer.train_dataset["prompt"]) and inputs.train.rows == 64
    assert inputs.held_out == prompt_set(example.prompt for example in trainer.eval_task.examples)
    assert inputs.weights == initial_sha256(make_model(0), adapter=False) and inputs.adapter is None


def test_a_resumed_run_keeps_the_record_of_its_initial_weights(run, tmp_path):
    root, _ = run
    again = make_trainer(root, student=make_model(3), **(FAST | {"max_steps": 3}))
    again.train(resume_from_checkpoint=str(root / "checkpoints" / "step-000002"))
    assert read_inputs(root).weights == initial_sha256(make_model(0), adapter=False)


def test_other_held_out_prompts_are_refused_and_other_training_prompts_are_a_warning(run, caplog):
    root, _ = run
    checkpoint, rows = root / "checkpoints" / "step-000001", (root / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"held-out prompts: 12 rows \(\w+\) → 12 rows"):
        make_trainer(root, task=make_task(70), **FAST).train(resume_from_checkpoint=str(checkpoint))
    assert (root / "metrics.jsonl").read_text() == rows
    now = read_inputs(checkpoint)
    check_same_inputs(checkpoint, now)
    assert not caplog.records
    check_same_inputs(checkpoint, replace(now, train=PromptSet(7, "f" * 64), weights="0"))
    (record,) = caplog.records
    assert "64 rows" in record.getMessage() and "→ 7 rows (ffffffffffff)" in record.getMessage()


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda: adapted(alpha=128), "adapter 'default': lora_alpha 8 → 128"),
        (lambda: adapted(use_rslora=True), "adapter 'default': use_rslora False → True"),
        (lambda: adapted(target_modules=["v_proj"]), r"target_modules \['q_proj'\] → \['v_proj'\]"),
        (lambda: adapted(seed=1), r"weights below the adapter: \w{12} → \w{12}"),
    ],
)
def test_an_adapter_is_resumed_on_its_base_with_its_shape_and_scale(tmp_path, other, problem):
    def inputs(model):
        return Inputs(weights=initial_sha256(model, adapter=True), adapter=adapter_settings(model))

    write_inputs(tmp_path, inputs(adapted()))
    check_same_inputs(tmp_path, inputs(adapted()))
    with pytest.raises(CheckpointError, match=problem):
        check_same_inputs(tmp_path, inputs(other()))


def test_a_lora_run_with_another_scale_is_refused_before_anything_changes(tmp_path):
    make_trainer(tmp_path, student=adapted(), **FAST).train()
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="lora_alpha 8 → 128"):
        make_trainer(tmp_path, student=adapted(alpha=128), **FAST).train(
            resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000001")
        )
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_the_hash_of_the_base_depends_on_neither_the_adapter_nor_its_modules():
    plain = initial_sha256(make_model(0), adapter=False)
    assert initial_sha256(adapted(), adapter=True) == plain
    assert initial_sha256(adapted(target_modules=["v_proj", "o_proj"]), adapter=True) == plain
    assert initial_sha256(make_model(1), adapter=False) != plain


def test_a_folder_without_the_record_is_not_compared(tmp_path):
    assert read_inputs(tmp_path) is None
    check_same_inputs(tmp_path, Inputs(PromptSet(1, "a"), PromptSet(1, "b"), "c", {}))


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"inputs\.json"):
        read_inputs(tmp_path)
