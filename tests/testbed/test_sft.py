"""Supervised start: worked answers are right, and training on them writes a usable model folder."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.commands import testbed
from effopd.commands.main import main
from effopd.errors import ConfigError
from effopd.tasks.load import load_task
from effopd.tasks.verify import last_number
from effopd.testbed.base_training import BaseSettings
from effopd.testbed.sft import TASKS, SFTSettings, start


@pytest.mark.parametrize("name", TASKS)
def test_every_worked_answer_is_right_line_by_line(name):
    task = load_task(TASKS[name].config(name, train_size=300, eval_size=0), "train")
    for example in task.examples:
        text = TASKS[name].write(example.metadata["entry"])
        assert last_number(text, example) == 1.0, (example.prompt, text)
        for line in text.splitlines():
            assert len({eval(part) for part in line.split(" = ")}) == 1, line


def test_the_start_writes_model_tokenizer_and_card(tmp_path):
    tokenizer, model = make_tokenizer(), make_model(0)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "student")
    lines: list[str] = []
    training = BaseSettings(questions=8, steps=2, batch_size=2, warmup_steps=1)
    card = start(
        "chain_sum", str(tmp_path / "student"), tmp_path / "out", 0, SFTSettings(8, 4, training), lines.append
    )
    assert card == json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["accuracy"]["before"]["n"] == card["accuracy"]["after"]["n"] == 4
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    moved = [not p.equal(q) for p, q in zip(made.parameters(), model.parameters(), strict=True)]
    assert any(moved) and made.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert len([line for line in lines if "accuracy" in line]) == 2


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="chain_sum, products"):
        start("sudoku", "nowhere", tmp_path)


def test_the_command_trains_with_its_flags_and_refuses_what_it_cannot_use(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr("effopd.testbed.sft.start", lambda *a, **k: calls.append(a))
    assert tuple(TASKS) == testbed.WORKED_TASKS
    student = tmp_path / "student"
    make_model(0).save_pretrained(student)
    make_tokenizer().save_pretrained(student)
    flags = ["testbed", "sft", "chain_sum", "--model_name_or_path", str(student), "--output_dir"]
    assert main([*flags, str(tmp_path / "out"), "--steps", "20", "--learning_rate", "1e-3", "--seed", "3"]) == 0
    name, model, out, seed, settings = calls.pop()
    assert (name, model, out, seed) == ("chain_sum", str(student), tmp_path / "out", 3)
    assert (settings.questions, settings.training.steps, settings.training.learning_rate) == (160, 20, 1e-3)
    assert main([*flags, str(student)]) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*flags, str(tmp_path / "x"), "--steps", "0"]) == 2 and "at least 1" in capsys.readouterr().err
    flags[4] = str(tmp_path / "nowhere")
    assert main([*flags, str(tmp_path / "x")]) == 2 and "nowhere" in capsys.readouterr().err
    assert not calls
