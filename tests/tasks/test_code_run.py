"""The code recipe with rows of every shape: dry run, two steps of a tiny model, evaluation, RL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_models import make_model, make_tokenizer
from tasks.test_code_rows import ROWS

from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.errors import SandboxError
from effopd.runs.records import read_evaluations
from effopd.tasks.base import VERDICTS
from effopd.tasks.code import sandbox
from effopd.tasks.code.limits import Limits

RECIPE = Path(__file__).parents[2] / "recipes" / "code-4b.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    rows = []
    columns = ("prompt", "problem", "question", "question_content", "description", "text")
    for copy in range(3):
        for name, (row, _, _) in ROWS.items():
            column = next(column for column in columns if column in row)
            text = row[column] if isinstance(row[column], str) else row[column][0]["content"]
            rows.append({**row, "id": f"{name} {copy}", column: f"# {copy} {name}\n{text}"})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def sandboxed():
    try:
        sandbox.Sandbox(Limits()).close()
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")


def flags(root, output: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(root / "student"), "--task", f"code:{root / 'rows.jsonl'}", "--task_args",
        '{"workers": 1}', "--as_chat", "false", "--eval_size", "6", "--max_steps", "2",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1",
        "--per_device_eval_batch_size", "6", "--max_completion_length", "6", "--max_prompt_length", "1000",
        "--activation_checkpointing", "false", "--use_cpu", "--report_to", "none",
        "--output_dir", str(root / output), *more,
    ]  # fmt: skip


def trained(root, output: str, *more: str) -> int:
    teacher = ["--teacher_model_name_or_path", str(root / "teacher"), "--save_steps", "2"]
    evaluations = [] if "--eval_strategy" in more else ["--eval_steps", "2"]
    return main(["train", "--config", str(RECIPE), *flags(root, output, *teacher, *evaluations, *more)])


def test_the_recipe_dry_runs_with_rows_of_each_shape(root, capsys, sandboxed):
    assert trained(root, "dry", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "rows.jsonl" in out and all(name in " ".join(out.split()) for name in ROWS) and not (root / "dry").exists()


def test_without_a_sandbox_the_dry_run_refuses(root, capsys, monkeypatch):
    def missing():
        raise SandboxError("grading programs needs bubblewrap. Install bubblewrap.")

    monkeypatch.setattr(sandbox, "find_bubblewrap", missing)
    assert trained(root, "refused", "--dry_run") != 0
    assert "Install bubblewrap" in capsys.readouterr().err and not (root / "refused").exists()


def test_rows_on_the_hub_need_a_sandbox_in_a_dry_run(root, capsys, monkeypatch):
    def missing():
        raise SandboxError("grading programs needs bubblewrap. Install bubblewrap.")

    monkeypatch.setattr(sandbox, "find_bubblewrap", missing)
    assert trained(root, "hub", "--task", "code:some/where", "--dry_run") != 0
    assert "Install bubblewrap" in capsys.readouterr().err
    assert trained(root, "hub", "--task", "code:some/where", "--eval_strategy", "no", "--dry_run") == 0


def test_two_steps_of_the_recipe_and_an_evaluation(root, capsys, sandboxed):
    assert trained(root, "run") == 0
    evaluation = read_evaluations(root / "run")[-1]
    counts = {name: getattr(evaluation, f"verdict_{name}") for name in VERDICTS}
    assert sum(counts.values()) == evaluation.answers == 6 and counts["passed"] == 0
    capsys.readouterr()
    answers = root / "answers.jsonl"
    command = ["eval", "--model", str(root / "run"), "--n", "2", "--output", str(answers)]
    assert main(command) == 0
    assert "verdicts" in capsys.readouterr().out
    rows = list(read_rows(answers))
    assert len(rows) == 12 and {row["verdict"] for row in rows} <= set(VERDICTS)
    assert json.loads(answers.with_suffix(".summary.json").read_text())["verdicts"].keys() == set(VERDICTS)


@pytest.mark.slow
def test_the_gate_and_rewards_grade_programs(root, sandboxed):
    assert trained(root, "gate", "--effopd.strategy", "effopd", "--effopd.validation_size", "4") == 0
    searches = list(read_rows(root / "gate" / "searches.jsonl"))
    assert searches and all(sum(t["verdicts"].values()) == 4 for row in searches for t in row["trials"])
    rl = ["--algorithm", "grpo", "--num_generations", "4", "--eval_strategy", "no", "--eval_on_start", "false"]
    assert main(["rl", *flags(root, "rl", *rl, "--save_strategy", "no", "--logging_steps", "1")]) == 0
    rows = list(read_rows(root / "rl" / "metrics.jsonl"))
    assert [sum(row[f"verdicts/{name}"] for name in VERDICTS) for row in rows] == pytest.approx([1.0, 1.0])


@pytest.mark.slow
def test_an_intervention_grades_programs(root, sandboxed):
    out = root / "interventions"
    command = [
        "intervene", "alpha", "--base", str(root / "student"), "--trained", f"kl={root / 'teacher'}", "--task",
        f"code:{root / 'rows.jsonl'}", "--task_args", '{"workers": 1}', "--as_chat", "false", "--eval_size", "3",
        "--max_new_tokens", "4", "--max_prompt_length", "1000", "--alphas", "1", "--out", str(out),
    ]  # fmt: skip
    assert main(command) == 0
    measured = [row["measured"]["verdicts"] for row in read_rows(out / "results.jsonl")]
    assert measured and all(sum(counts.values()) == 3 for counts in measured)
