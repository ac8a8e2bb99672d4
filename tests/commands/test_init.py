"""`effopd init`: the YAML it writes is one that `effopd train --config` takes as it is."""

from __future__ import annotations

import json
import re
import sys

import pytest
import yaml
from helpers.tiny_models import make_model, make_tokenizer

from effopd.commands import init
from effopd.commands.init import Answers, ask, yaml_text
from effopd.commands.main import main
from effopd.commands.train import parse_command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("init")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    rows = [{"problem": f"what is {i} + 1", "answer": str(i + 1)} for i in range(160)]
    (root / "rows: 1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def flags(place, out):
    return [
        "init", "--model_name_or_path", str(place / "student"), "--teacher_model_name_or_path", str(place / "teacher"),
        "--task", f"math:{place / 'rows: 1.jsonl'}", "--out", str(out),
    ]  # fmt: skip


@pytest.mark.slow
def test_init_writes_checks_and_refuses_to_overwrite(place, tmp_path, capsys):
    out = tmp_path / "new" / "first.yaml"
    assert main(flags(place, out)) == 0
    printed = capsys.readouterr().out
    assert "the run" in printed and "peak" in printed and f"effopd train --config {out}" in printed
    text = out.read_text()
    settings, _ = parse_command(["--config", str(out)])
    assert settings.task.task == f"math:{place / 'rows: 1.jsonl'}"  # a space and a colon in the name
    assert settings.model.model_name_or_path == str(place / "student")
    assert settings.effopd.strategy == "newton_search" and settings.opd.output_dir == "runs/first"
    assert main(flags(place, out)) == 2
    assert "exists" in capsys.readouterr().err and out.read_text() == text

    # a dry run that fails leaves the file, and says so
    (place / "teacher" / "config.json").rename(place / "teacher" / "hidden")
    try:
        assert main(flags(place, tmp_path / "second.yaml")) == 2
    finally:
        (place / "teacher" / "hidden").rename(place / "teacher" / "config.json")
    error = capsys.readouterr().err
    assert "second.yaml is kept" in error and "--dry_run" in error and (tmp_path / "second.yaml").exists()


@pytest.mark.parametrize("student", ["testbed:student", "some/student"])
def test_every_line_is_a_setting_of_train_also_those_that_are_commented_out(student, tmp_path):
    task = "testbed:chain_sum" if student.startswith("testbed") else "math:rows.jsonl"
    teacher = student.replace("student", "teacher")
    text = yaml_text(Answers(student, teacher, task, "runs/x"), tmp_path / "x.yaml")
    (tmp_path / "as it is.yaml").write_text(text)
    settings, _ = parse_command(["--config", str(tmp_path / "as it is.yaml"), "--dry_run"])
    assert settings.task.task == task and settings.opd.max_steps == yaml.safe_load(text)["max_steps"]
    commented = [line[2:] for line in text.splitlines() if re.match(r"# \w+: ", line)]
    (tmp_path / "all.yaml").write_text("\n".join([text, *commented]))
    settings, _ = parse_command(["--config", str(tmp_path / "all.yaml"), "--dry_run"])
    if student == "some/student":
        assert settings.model.use_peft and settings.task.eval_task == "math:test.jsonl" and len(commented) == 13


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model_name_or_path, --teacher_model_name_or_path, --task"),  # no terminal: nothing is asked
        (["--task", "math:x.jsonl"], "--model_name_or_path, --teacher_model_name_or_path: expected a value"),
        (["--out", "x.json"], "ends in .yaml"),
        (["--out", "file/x.yaml"], "is a file"),
        (["--model_name_or_path", "a b", "--teacher_model_name_or_path", "t", "--task", "math:x"], "no such folder"),
        (["--model_name_or_path", "testbed:x", "--teacher_model_name_or_path", "t", "--task", "math:x"], "one of"),
        (["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--task", "x.jsonl"], "--task: expected"),
    ],
)  # fmt: skip
def test_mistakes_write_nothing(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["init", *argv]) == 2
    assert message in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_questions_on_a_terminal(capsys, monkeypatch, tmp_path):
    answers = iter(["a b", "org/student", "", "org/teacher", "rows.jsonl", "math:rows.jsonl"])
    given = ask(lambda question: next(answers))
    assert list(given.values()) == ["org/student", "org/teacher", "math:rows.jsonl"]
    assert capsys.readouterr().out.count("expected") >= 2  # what was wrong with three of the answers
    given = ask(lambda question: "")
    assert list(given.values()) == ["testbed:student", "testbed:teacher", "testbed:chain_sum"]

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: (_ for _ in ()).throw(EOFError))
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 2 and "the input ended" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda question: "")
    with monkeypatch.context() as patch:
        patch.setattr(init, "write_atomically", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
        assert main(["init"]) == 2 and "cannot be written (read-only)" in capsys.readouterr().err
    monkeypatch.setattr(init, "_dry_run", lambda out: None)
    assert main(["init"]) == 0 and "testbed:student" in (tmp_path / "opd.yaml").read_text()


@pytest.mark.parametrize(
    "text", ["a", "org/x-1.5B", "1", "1e5", "true", "a: b", "~/x", "x #1", "-", "'", '"', "ä/ö", "a:", ""]
)
def test_scalars_survive(text):
    assert yaml.safe_load(f"x: {init._scalar(text)}  # comment") == {"x": text}
