"""Properties of the shipped pair, its families and its recipe."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.errors import TaskError
from effopd.tasks.builtin_models import (
    ASSETS,
    FAMILIES,
    card,
    family_task,
    reference_settings,
    student_path,
    teacher_path,
    verify,
)
from effopd.tasks.testbed_families import ALL_FAMILIES, SPLITS, question, split_of, worked_reasoning

families = pytest.mark.parametrize("family", sorted(ALL_FAMILIES))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(student_path())


def questions(family: str, split: str, size: int = 300, seed: int = 0) -> list[str]:
    return [question(example) for example in family_task(family, split, size, seed).examples]


# --- families -------------------------------------------------------------------------------------


@families
def test_splits_are_deterministic_distinct_and_disjoint(family):
    drawn = {split: [questions(family, split, seed=seed) for seed in (0, 1)] for split in SPLITS}
    for split, (first, second) in drawn.items():
        assert first == questions(family, split) and first != second
        assert len(set(first)) == len(first) == 300
        assert {split_of(text) for text in first + second} == {split}
    train, validation, test = (set(drawn[split][0] + drawn[split][1]) for split in SPLITS)
    assert not train & validation and not train & test and not validation & test


@families
def test_a_larger_draw_begins_with_the_smaller_one(family):
    assert questions(family, "train", 50) == questions(family, "train", 100)[:50]


@families
def test_eval_is_the_validation_split(family):
    assert questions(family, "eval", 20) == questions(family, "validation", 20)


@families
def test_true_reasoning_scores_one_and_a_wrong_answer_less(family):
    task = family_task(family, "train", 200, 3)
    for example in task.examples:
        text = worked_reasoning(example)
        assert verify(text, example) == task.verify(text, example) == 1.0
        assert task.verify(task.render_answer(example.answer), example) == 1.0
        wrong = example.answer + "1"
        assert verify(f"<answer>{wrong}</answer>", example) < 1.0
        assert verify(text.replace("</answer>", ""), example) == verify(example.answer, example) == 0.0


@families
def test_falsified_reasoning_is_right_as_often_as_planned(family):
    """Each step is falsified on its own; some falsifications change nothing (skipping `+ 0`), hence
    the margin.
    """
    task, rng = family_task(family, "train", 1000, 0), random.Random(0)
    corruption = ALL_FAMILIES[family].corruption
    right = sum(verify(worked_reasoning(e, rng, corruption), e) == 1.0 for e in task.examples) / len(task)
    assert 0.25 < right < 0.5
    always = [verify(worked_reasoning(e, rng, 1.0), e) for e in task.examples]
    assert sum(score == 1.0 for score in always) / len(task) < 0.3


@pytest.mark.slow
def test_bad_requests_name_the_value_and_the_choices(monkeypatch):
    monkeypatch.setattr("effopd.tasks.testbed_families._MAX_DRY_DRAWS", 200)
    with pytest.raises(TaskError, match="'sorting'"):
        family_task("sorting")
    with pytest.raises(TaskError, match="'dev'"):
        family_task("chain_sum", "dev")
    with pytest.raises(TaskError, match="got 0"):
        family_task("chain_sum", size=0)
    with pytest.raises(TaskError, match="found"):
        family_task("spell_backward", "test", 100_000)
    with pytest.raises(TaskError, match="sorting"):
        reference_settings("sorting")
    with pytest.raises(TaskError, match="random generator"):
        worked_reasoning(family_task("chain_sum", size=1).examples[0], corruption=0.5)


# --- assets ---------------------------------------------------------------------------------------


def test_assets_are_small_and_are_what_the_card_says():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 10 * 2**20
    hashes = card()["sha256"]
    for name, digest in hashes.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
    assert len(set(hashes.values())) == 2


def test_pair_loads_and_shares_tokenizer_and_end_token(tokenizer):
    other = AutoTokenizer.from_pretrained(teacher_path())
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert tokenizer.chat_template == other.chat_template
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for path in (student_path(), teacher_path()):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.config.model_type == "qwen3" and str(model.dtype) == "torch.float32"
        assert sum(p.numel() for p in model.parameters()) == card()["parameters"]
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokenizer_round_trips_and_keeps_the_answer_tags(family, tokenizer):
    for example in family_task(family, "test", 200, 1).examples:
        for text in (question(example), worked_reasoning(example)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=True)
        assert len(prompt["input_ids"]) <= 40
        assert len(ids) + 1 <= reference_settings(family)["max_completion_length"]
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in ("<answer>", "</answer>"))
    assert tokenizer.unk_token is None and tokenizer.decode(tokenizer("é 中\t!")["input_ids"]) == "é 中\t!"


def test_card_records_accuracies_and_steps_within_their_targets():
    rows = {(row["model"], row["family"], row["decoding"]): row for row in card()["accuracy"]}
    assert len(rows) == 2 * 2 * len(FAMILIES)
    for family in FAMILIES:
        assert 0.25 <= rows["student", family, "sampled"]["accuracy"] <= 0.45
        assert rows["teacher", family, "sampled"]["accuracy"] >= 0.70
    reference = card()["reference_opd"]
    assert reference["settings"] == reference_settings()
    assert reference["steps_to_90_percent"] >= 48
    assert reference["median_seconds_per_step"] <= 1.0  # as recorded on 2 idle cores when the pair was made


def test_reference_settings_are_flags_of_trl():
    from trl import DistillationConfig

    config = DistillationConfig(output_dir="unused", report_to="none", use_cpu=True, **reference_settings())
    assert config.beta == 1.0 and config.learning_rate == reference_settings()["learning_rate"]
    reference_settings()["beta"] = 0.0
    assert reference_settings()["beta"] == 1.0


def test_importing_the_testbed_is_light():
    code = "import sys, effopd.tasks.builtin_models as models; models.student_path(); "
    code += "print([name in sys.modules for name in ('torch', 'trl')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[False,", "False]"]


# --- recipe ---------------------------------------------------------------------------------------


def micro_settings():
    from effopd.testbed.base_training import BaseSettings, ModelSettings
    from effopd.testbed.measure import MeasureSettings
    from effopd.testbed.recipe import RecipeSettings
    from effopd.testbed.rl import RLSettings

    return RecipeSettings(
        model=ModelSettings(16, 32, 1, 2, 1, 8),
        base=BaseSettings(questions=40, steps=3, batch_size=8, warmup_steps=1),
        rl=RLSettings(questions=20, steps=2, prompts_per_step=2, num_generations=2),
        measure=MeasureSettings(questions=8, opd_steps=2, opd_train_questions=160, opd_held_out=8, opd_every=1),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_micro_build_goes_through_every_stage_and_repeats(tmp_path):
    from effopd.testbed.recipe import build

    first = build(tmp_path / "a", seed=1, settings=micro_settings())
    assert json.loads((tmp_path / "a" / "card.json").read_text()) == json.loads(json.dumps(first))
    assert set(first["seconds"]) == {"tokenizer", "base", "teacher", "accuracy", "reference_opd"}
    assert set(first) == set(card())
    assert (tmp_path / "a" / "build.log").read_text().count("stage") == 5
    assert [step for step, _ in first["reference_opd"]["held_out_kl"]] == [0, 1, 2]
    for role in ("student", "teacher"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a" / role)
        AutoTokenizer.from_pretrained(tmp_path / "a" / role)
    again = build(tmp_path / "b", seed=1, settings=micro_settings())
    assert again["sha256"] == first["sha256"]
