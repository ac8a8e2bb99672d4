"""Prompts that no model can be given are refused before anything is loaded, by every command and
for every host.
"""

from __future__ import annotations

import json
import re

import pytest
from datasets import Dataset
from helpers.tiny_models import TEMPLATE, make_model, make_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM

from effopd.commands.main import main
from effopd.distill.config import OPDConfig
from effopd.distill.trainer import OPDTrainer
from effopd.errors import CompatibilityError, TaskError
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.launch.preflight import check_task, load_tokenizer
from effopd.tasks import Example, Task, check_prompt_lengths
from effopd.tasks.generate import encode_prompts, generate
from effopd.tasks.prompts import prompt_ids
from effopd.tasks.sampling import Sampling

USER = [{"role": "user", "content": "1+1"}]
SYSTEM = [{"role": "system", "content": "hi"}, *USER]
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
#: Templates that fail, each in its own way, on a user message.
BROKEN = ["{{ raise_exception('no') }}", "{{ messages[7]['role'] }}", "{{ 1 / 0 }}", "{{ 1 + messages }}", "{% if %}"]


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ending(template="<s> $A <e>"):
    """A tokenizer that ends every text."""
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("<e>", 2), ("<pad>", 0)]
    )
    return tokenizer


def one(prompt):
    return Task("t", (Example("a", prompt, "2"),), lambda *_: 0.0)


def refused(tokenizer, prompt, error, match):
    """By everything that writes prompts."""
    for write in (
        lambda: prompt_ids(tokenizer, prompt),
        lambda: encode_prompts(tokenizer, [prompt]),
        lambda: check_prompt_lengths(one(prompt), tokenizer, None),
        lambda: check_task(one(prompt), tokenizer, None),
        lambda: generate(make_model(0), tokenizer, [prompt], Sampling(max_new_tokens=1)),
        lambda: AccuracyScorer(one(prompt), tokenizer, Sampling(max_new_tokens=1)),
    ):
        with pytest.raises(error, match=match):
            write()


def test_a_template_that_refuses_a_role():
    match = r"rejects this prompt \(roles: system, user\): System role not supported. Remove --system_prompt"
    refused(with_template(REFUSING), SYSTEM, TaskError, match)
    assert prompt_ids(with_template(REFUSING), USER)


@pytest.mark.parametrize("template", BROKEN)
def test_templates_that_fail_otherwise(template):
    refused(with_template(template), USER, TaskError, "the chat template of .* rejects this prompt")


def test_no_template():
    refused(with_template(None), USER, TaskError, "expected a tokenizer with a chat template")


@pytest.mark.parametrize("template", ["<s> $A <e>", "$A <e>", "$A <e> <pad>"])
def test_a_tokenizer_that_ends_every_text(template):
    refused(ending(template), "1+1=", CompatibilityError, "ends every text with '(<e>|<pad>)'")
    assert prompt_ids(ending(template), USER)[-1] == 1, "chat prompts end as their template says"


def test_a_tokenizer_that_begins_every_text_is_fine():
    assert prompt_ids(ending("<s> $A"), "1+1=")[0] == 1


def test_a_prompt_that_ends_with_the_end_token():
    refused(make_tokenizer(), "1+1<e>", CompatibilityError, "ends with the end token '<e>'")
    assert prompt_ids(make_tokenizer(), "1<e>1")


def test_prompts_are_encoded_as_the_hosts_encode_them():
    tokenizer = ending("<s> $A")
    assert prompt_ids(tokenizer, "1+1=") == tokenizer(text=["1+1="])["input_ids"][0]
    theirs = tokenizer.apply_chat_template(
        conversation=[SYSTEM], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert prompt_ids(tokenizer, SYSTEM) == theirs["input_ids"][0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Rows, and models whose tokenizers refuse a system message, or end every text."""
    rows = [{"problem": f"{n} + {n}", "answer": str(2 * n)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, tokenizer in (("refusing", with_template(REFUSING)), ("ending", ending())):
        make_model(0).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = [
    (
        "refusing",
        ["--system_prompt", "hi"],
        r"rows.jsonl row \d+ \(id .*System role not supported. Remove --system_prompt",
    ),
    ("ending", ["--as_chat", "false"], "ends every text with '<e>'"),
]


@pytest.mark.parametrize(("model", "flags", "message"), CASES)
def test_every_command_says_it_before_a_model_is_loaded(model, flags, message, folder, capsys, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    task = ["--task", "math:rows.jsonl", *flags]
    student = ["--model_name_or_path", model, "--use_cpu", "--per_device_train_batch_size", "4"]
    commands = [
        ["train", *student, "--teacher_model_name_or_path", model, "--output_dir", "r", *task],
        ["train", *student, "--teacher_model_name_or_path", model, "--output_dir", "r", *task, "--dry_run"],
        ["rl", "--algorithm", "grpo", *student, "--num_generations", "2", "--output_dir", "r", *task],
        ["eval", "--model", model, *task],
        ["intervene", "alpha", "--base", model, "--trained", f"x={model}", "--out", "o", *task],
    ]
    for command in commands:
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert re.search(message, said) and "Traceback" not in said, command
    assert not (folder / "r").exists()


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "message"),
    [
        (with_template(REFUSING), SYSTEM, "System role not supported"),
        (ending(), "1+1=", "ends every text"),
        ("no end", "1+1=", "has no end token"),
    ],
)
def test_a_trainer_of_ones_own_says_it_before_it_trains(tokenizer, prompt, message, tmp_path):
    if tokenizer == "no end":
        tokenizer = make_tokenizer()
        tokenizer.eos_token = tokenizer.pad_token = None
    args = OPDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"prompt": prompt}] * 8)
    with pytest.raises((TaskError, CompatibilityError), match=message):
        OPDTrainer(make_model(0), make_model(1), args, rows, processing_class=tokenizer)


@pytest.mark.slow
def test_a_tokenizer_without_an_end_token_gets_the_models(tmp_path):
    bare = make_tokenizer()
    bare.eos_token = bare.pad_token = None
    for name, seed in (("s", 0), ("t", 1)):
        make_model(seed).save_pretrained(tmp_path / name)
        bare.save_pretrained(tmp_path / name)
    tokenizer = load_tokenizer(str(tmp_path / "s"))
    assert tokenizer.eos_token == "<e>"
    rows = [{"problem": f"{n} + {n}", "answer": str(2 * n)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [
        "--model_name_or_path",
        str(tmp_path / "s"),
        "--task",
        f"math:{tmp_path / 'rows.jsonl'}",
        "--use_cpu",
        "--bf16",
        "false",
        "--max_completion_length",
        "4",
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--per_device_train_batch_size",
        "4",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_strategy",
        "no",
    ]
    teacher = ["--teacher_model_name_or_path", str(tmp_path / "t")]
    assert main(["train", *flags, *teacher, "--output_dir", str(tmp_path / "r")]) == 0
    assert (
        main(["rl", "--algorithm", "grpo", *flags, "--num_generations", "2", "--output_dir", str(tmp_path / "g")]) == 0
    )
