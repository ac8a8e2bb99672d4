"""Training rows need reference answers only where a setting reads them; the error names it."""

from __future__ import annotations

import json

import pytest

from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_train
from effopd.common.files import read_rows
from effopd.errors import SandboxError, TaskError
from effopd.launch.opd import why_answers
from effopd.launch.prompts import graded_splits, load_prompts
from effopd.launch.rl import WHY_ANSWERS
from effopd.tasks import check_grading
from effopd.tasks.builtin_models import student_path, teacher_path
from effopd.tasks.code.verifier import CodeVerifier

PAIR = [
    "--model_name_or_path", str(student_path()), "--teacher_model_name_or_path", str(teacher_path()), "--use_cpu",
    "--as_chat", "false",
]  # fmt: skip
EVALUATES = ["--eval_strategy", "steps", "--eval_steps", "1"]
OTHER = ["--eval_task", "math:test.jsonl"]
LINE, PAPER = ["--effopd.strategy", "line_search"], ["--effopd.strategy", "effopd", "--effopd.validation_size", "4"]
CODE = {
    "task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "entry_point": "add",
    "canonical_solution": "    return a + b\n", "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}  # fmt: skip


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A current directory with training rows with and without answers, and rows for evaluation."""
    monkeypatch.chdir(tmp_path)
    for name, first, answered in (
        ("bare", 0, False),
        ("train", 0, True),
        ("test", 20, True),
        ("bare_test", 20, False),
    ):
        lines = [
            {"prompt": f"{n}+1="} | ({"answer": str(n + 1)} if answered else {}) for n in range(first, first + 16)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "code.jsonl").write_text(json.dumps(CODE) + "\n")
    return tmp_path


def loaded(*flags, task="math:bare.jsonl"):
    settings = parse_train([*PAIR, "--task", task, *flags])
    return load_prompts(settings.task, settings.opd, None, why_answers(settings))


@pytest.mark.parametrize("flags", [[], LINE, OTHER, [*OTHER, *EVALUATES], [*OTHER, *EVALUATES, *LINE]])
def test_rows_without_answers_are_accepted_where_nothing_reads_them(flags, rows):
    prompts = loaded(*flags)
    assert len(prompts.train) == (16 if OTHER[0] in flags else 14 + 1)
    assert not prompts.train.verifiable and (prompts.held_out is None) == (EVALUATES[0] not in flags)


@pytest.mark.parametrize(
    ("flags", "causes"),
    [
        (EVALUATES, ["--eval_strategy steps"]),
        (PAPER, ["--effopd.validation_size 4"]),
        ([*OTHER, *EVALUATES, *PAPER], ["--effopd.validation_size 4"]),
        ([*EVALUATES, *PAPER], ["--effopd.validation_size 4", "--eval_strategy steps"]),
        (["--effopd.strategy", "effopd", *OTHER], ["--effopd.strategy effopd"]),
        (["--curriculum", "nll", "--curriculum_stages", "2", *OTHER, *EVALUATES], ["--curriculum nll"]),
    ],
)
def test_the_error_names_what_reads_the_answers_and_nothing_else(flags, causes, rows):
    with pytest.raises(TaskError) as error:
        loaded(*flags)
    assert f"Answers are needed because of {' and '.join(causes)}. Without them, use " in str(error.value)


def test_answers_of_the_evaluation_are_needed_by_the_evaluation_alone(rows):
    bare = ["--eval_task", "math:bare_test.jsonl"]
    with pytest.raises(TaskError, match=r"bare_test.*Answers are needed because of --eval_strategy steps\."):
        loaded(*bare, *EVALUATES)
    assert len(loaded(*bare, *PAPER, task="math:train.jsonl").train) == 16  # only the questions are left out


def test_a_verifier_of_the_user_grades_only_rows_that_are_graded(rows):
    (rows / "own_grader.py").write_text(
        "def grade(text, example):\n    return float(example.answer.strip() in text)\n"
    )
    assert loaded("--verifier", "own_grader:grade", *OTHER, *EVALUATES, *LINE).held_out.verifiable
    with pytest.raises(TaskError):
        loaded("--verifier", "own_grader:grade", *OTHER, *PAPER)


def test_programs_that_nothing_grades_need_no_sandbox(rows, monkeypatch):
    def missing(self):
        raise SandboxError("no sandbox here")

    monkeypatch.setattr(CodeVerifier, "check", missing)
    flags = [*OTHER, *EVALUATES, *LINE]
    prompts = loaded(*flags, task="code:code.jsonl")
    assert prompts.train.examples[0].answer is None
    settings = parse_train([*PAIR, "--task", "code:code.jsonl", *flags])
    check_grading(settings.task, graded_splits(settings.opd, why_answers(settings)))
    rl = parse_rl(["--model_name_or_path", str(student_path()), "--task", "code:code.jsonl", *OTHER])
    with pytest.raises(SandboxError):
        check_grading(rl.task, graded_splits(rl.rl, WHY_ANSWERS))


@pytest.mark.slow
def test_a_run_on_rows_without_answers_is_evaluated_on_others(rows):
    flags = [
        "--task", "math:bare.jsonl", *OTHER, *EVALUATES, *LINE, "--max_steps", "1", "--per_device_train_batch_size",
        "4", "--max_completion_length", "4", "--prompt_suffix", "", "--report_to", "none", "--save_strategy", "no",
        "--output_dir", "run",
    ]  # fmt: skip
    assert main(["train", *PAIR, *flags]) == 0
    assert [set(row) >= {"eval_kl", "eval_accuracy"} for row in read_rows(rows / "run" / "evals.jsonl")] == [True] * 2


@pytest.mark.slow
def test_answers_of_the_student_are_collected_without_references(rows, capsys):
    cache = [
        "cache", *PAIR[:4], "--as_chat", "false", "--task", "math:bare.jsonl", "--prompt_suffix", "", "--eval_size",
        "0", "--output_dir", "stored", "--dry_run",
    ]  # fmt: skip
    assert main(cache) == 0
    assert main([*cache, "--sampled_by", "teacher"]) == 2
    assert "Answers are needed because of --sampled_by teacher" in capsys.readouterr().err
