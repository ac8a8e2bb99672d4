"""A command whose verifier finds no answers says so early, once, and with what to do."""

from __future__ import annotations

import logging

import pytest
from helpers.tiny_models import make_task
from helpers.tiny_run import make_trainer

from effopd import EffOPDConfig
from effopd.distill.rl import WATCHED_BATCHES, RewardWatch
from effopd.runs.missing_answers import AnswerWatch, Counts, missing_answers
from effopd.tasks.base import Example, Task
from effopd.tasks.gym_tasks import ReasoningGymVerifier
from effopd.tasks.math_grading import MathVerifier
from effopd.tasks.testbed_families import verify
from effopd.tasks.verify import last_number

SILENT = {"effect": "accuracy means nothing", "flag": "--max_new_tokens", "limit": 8}


def task_of(verifier, name="math:x.jsonl", answer="7") -> Task:
    return Task(name, tuple(Example(str(i), "q", answer) for i in range(3)), verifier)


def never(completion, example):
    return 0.0


class TaggedNever:
    """Grades answers in tags, of which a random model writes none."""

    sought = "<answer> tags"

    def __call__(self, completion, example):
        return 0.0

    def answer_found(self, completion):
        return "<answer>" in completion


@pytest.mark.parametrize(
    ("counts", "parts", "absent"),
    [
        (Counts(100, 0, 60, 0, 0, "so 7"), ["100 of 100 answers have no \\boxed{} (100 %): accuracy means nothing",
         "raise --max_new_tokens (60 answers were cut at 8 tokens)", "--prompt_suffix", "'so 7'"], "empty"),
        (Counts(100, 0, 0, 100, 0), ["--as_chat and the chat template (100 answers are empty)"], "--prompt_suffix"),
        (Counts(100, 10, 0, 0, 2), ["90 of 100 answers", "change --prompt_suffix"], "--max_new_tokens"),
        (Counts(100, None, 0, 0, 0), ["100 of 100 answers score 0", "does not find its answers"], "\\boxed"),
    ],
)  # fmt: skip
def test_what_to_do(counts, parts, absent):
    text = missing_answers(task_of(MathVerifier()), counts, **SILENT)
    assert all(part in text for part in parts) and absent not in text


def test_advice_fits_the_task():
    counts = Counts(10, 0, 0, 0, 0)
    assert "verify:last_number" in missing_answers(task_of(MathVerifier()), counts, **SILENT)
    assert "last_number" not in missing_answers(task_of(MathVerifier(), answer="x + 1"), counts, **SILENT)
    assert "last_number" not in missing_answers(task_of(last_number), counts, **SILENT)
    for verifier, sought in (
        (verify, "<answer> tags"), (last_number, "number"), (never, "answer to grade"),
        (ReasoningGymVerifier("chain_sum"), "<answer> tags"),
    ):  # fmt: skip
        assert f"have no {sought} (" in missing_answers(task_of(verifier), counts, **SILENT)
    toy = missing_answers(task_of(verify, "testbed:chain_sum"), counts, **SILENT)
    assert "--prompt_suffix" not in toy  # refused for testbed tasks
    assert "supervised" not in toy
    assert "supervised" in missing_answers(task_of(verify), counts, **SILENT, train=True)


def test_a_long_completion_is_shortened():
    text = missing_answers(task_of(verify), Counts(9, 0, 0, 0, 0, "so\n" * 400 + "end"), **SILENT)
    assert "so so" in text and "so end'" in text and len(text) < 800


def test_counts_of_completions():
    task = task_of(TaggedNever())
    counts = Counts.of(task, ["", "seven", "<answer>7</answer>"], [True, False, False], [0.0, 0.0, 0.5])
    assert counts == Counts(3, 1, 1, 1, 1, "seven")
    assert Counts.of(task_of(never), ["a", "b"], [False] * 2, [0.5, 0.0]) == Counts(2, None, 0, 0, 1, "b")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (Counts(100, 0, 0, 0, 0), True),
        (Counts(100, 9, 0, 0, 9), True),
        (Counts(100, 10, 0, 0, 0), False),  # found, and wrong
        (Counts(7, 0, 0, 0, 0), False),  # too few to tell
        (Counts(100, None, 0, 0, 0), True),
        (Counts(100, None, 0, 0, 1), False),
        (Counts(47, None, 0, 0, 0), False),
    ],
)
def test_nearly_none_is_said_once(counts, said, caplog):
    watch = AnswerWatch(limit=8)
    for _ in range(3):
        watch.see(task_of(TaggedNever()), counts, "100 % meaningless")
    assert len(caplog.records) == said == watch.said


def test_tied_rewards_are_said_once(caplog):
    prompts = ["a", "a", "b", "b"]
    watch = RewardWatch()
    for batch in range(WATCHED_BATCHES + 3):
        assert len(caplog.records) == (batch >= WATCHED_BATCHES)
        watch.see(prompts, [1.0, 1.0, 0.0, 0.0])
    assert "No gradient" in caplog.text and "6 of 12 are right" in caplog.text and "easier" in caplog.text
    for rewards, quiet in (([1.0, 0.0, 0.0, 0.0], False), ([0.0] * 4, True)):
        caplog.clear()
        watch = RewardWatch()
        watch.see(prompts, rewards, quiet=quiet)
        for _ in range(9):
            watch.see(prompts, [0.0] * 4)
        assert not caplog.records
    watch = RewardWatch()
    for _ in range(WATCHED_BATCHES):
        watch.see(prompts, [1.0] * 4)
    assert "harder" in caplog.text


# -- in runs ---------------------------------------------------------------------------------------


def about(caplog, words):
    return [record.message for record in caplog.records if words in record.message]


@pytest.mark.slow
def test_train_says_it_at_the_first_evaluation(tmp_path, caplog):
    task = make_task(64)
    task = Task(task.name, task.examples, TaggedNever())
    trainer = make_trainer(tmp_path, task=task, max_steps=2, eval_steps=1, save_strategy="no")
    trainer.train()
    (text,) = about(caplog, "have no <answer> tags")
    assert text.startswith("12 of 12 answers have no <answer> tags (100 %): the accuracy on letters does not measure")
    assert "An example: '" in text and "--max_completion_length (" in text and "supervised" in text
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_a_search_by_accuracy_says_it_at_its_first_score(tmp_path, caplog):
    task = make_task(64)
    task = Task(task.name, task.examples, TaggedNever())
    trainer = make_trainer(
        tmp_path, task=task, effopd=EffOPDConfig(validation_size=12), max_steps=4, eval_strategy="no",
        save_strategy="no",
    )  # fmt: skip
    trainer.train()
    (text,) = about(caplog, "have no <answer> tags")
    assert "the look-ahead cannot tell candidates apart" in text


@pytest.mark.slow
@pytest.mark.parametrize(("verifier", "steps"), [(TaggedNever(), 1), (never, WATCHED_BATCHES)])
def test_rl_says_it_in_the_first_steps(tmp_path, caplog, verifier, steps):
    from helpers.tiny_models import make_model, make_tokenizer

    from effopd.distill.rl import TaskGRPOTrainer
    from effopd.distill.rl_config import TaskGRPOConfig

    task = Task("letters", make_task(32).examples, verifier)
    args = TaskGRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=16, num_generations=4, max_completion_length=5, beta=0.0,
        max_steps=steps, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    TaskGRPOTrainer(make_model(0), args, task, processing_class=make_tokenizer()).train()
    (text,) = about(caplog, "gradient")  # the same cause is not said twice
    assert ("16 of 16 answers have no <answer> tags" in text) == (steps == 1)
    assert ("0 of 48 are right" in text) == (steps > 1)


@pytest.mark.slow
def test_a_run_with_answers_says_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "effopd")
    effopd = EffOPDConfig(validation_size=16)
    make_trainer(tmp_path, max_steps=2, eval_steps=1, save_strategy="no", effopd=effopd).train()
    assert not about(caplog, "answers")
