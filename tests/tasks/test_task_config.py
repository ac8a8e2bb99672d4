"""TaskConfig: what it rejects, and that every field reaches it from the command line and YAML."""

from __future__ import annotations

from dataclasses import fields

import pytest

from effopd.errors import ConfigError
from effopd.tasks import TaskConfig

#: field -> (command-line text, value it must arrive as)
_CLI = {
    "task": ("math:a.jsonl", "math:a.jsonl"),
    "task_args": ('{"prompt_column": "q"}', {"prompt_column": "q"}),
    "verifier": ("mine:grade", "mine:grade"),
    "prompt_suffix": ("!", "!"),
    "system_prompt": ("Be brief.", "Be brief."),
    "as_chat": ("true", True),
    "train_size": ("7", 7),
    "eval_size": ("3", 3),
    "task_seed": ("5", 5),
    "eval_task": ("math:b.jsonl", "math:b.jsonl"),
    "eval_task_args": ('{"answer_column": "a"}', {"answer_column": "a"}),
    "max_prompt_length": ("64", 64),
    "verify_timeout": ("1.5", 1.5),
}


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("task", "gsm8k", "reasoning-gym:NAME"),
        ("task", "math:", "math:FILE_OR_HUB_ID"),
        ("task", "maths:x", "math:FILE_OR_HUB_ID"),
        ("eval_task", "countdown", "reasoning-gym:NAME"),
        ("task_args", "{max: 3}", "JSON object"),
        ("task_args", "[1]", "JSON object"),
        ("verifier", "grade", "module:function"),
        ("verifier", 5, "in quotes"),
        ("prompt_suffix", 5, "in quotes"),
        ("as_chat", "no", "true or false"),
        ("train_size", 0, "at least 1"),
        ("eval_size", -1, "at least 0"),
        ("task_seed", -1, "at least 0"),
        ("task_seed", None, "at least 0"),
        ("max_prompt_length", 1.5, "whole number"),
        ("verify_timeout", 0, "above 0"),
        ("verify_timeout", float("nan"), "above 0"),
    ],
)
def test_bad_value_names_field_value_and_fix(field, value, fix):
    with pytest.raises(ConfigError) as error:
        TaskConfig(**{"task": "math:x.jsonl", field: value})
    assert str(error.value).startswith(f"{field}: expected")
    assert repr(value) in str(error.value) and fix in str(error.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"task": "math:x", "as_chat": False, "system_prompt": "hi"}, "system_prompt"),
        ({"task": "math:x", "eval_task_args": {"split": "test"}}, "eval_task_args"),
        ({"task": "math:x", "eval_task": "math:y", "eval_size": 0}, "eval_size"),
        ({"task": "testbed:echo", "prompt_suffix": "!"}, "prompt_suffix"),
    ],
)
def test_contradictions(settings, field):
    with pytest.raises(ConfigError, match=f"^{field}: expected"):
        TaskConfig(**settings)


def test_every_field_teaches_and_reaches_the_config_from_the_command_line():
    from transformers import HfArgumentParser

    assert {item.name for item in fields(TaskConfig)} == set(_CLI)
    assert all(len(item.metadata["help"]) > 40 for item in fields(TaskConfig))
    parser = HfArgumentParser(TaskConfig)
    parser.format_help()
    arguments = [part for name, (text, _) in _CLI.items() for part in (f"--{name}", text)]
    (config,) = parser.parse_args_into_dataclasses(arguments)
    assert {name: getattr(config, name) for name in _CLI} == {name: value for name, (_, value) in _CLI.items()}
    (config,) = parser.parse_args_into_dataclasses(["--task", "math:a.jsonl", "--no_as_chat"])
    assert config == TaskConfig(task="math:a.jsonl", as_chat=False)


def test_yaml_through_trl_parser(tmp_path):
    from trl import TrlParser

    file = tmp_path / "run.yaml"
    file.write_text("task: reasoning-gym:countdown\ntask_args:\n  max_numbers: 3\ntrain_size: 10\n")
    (config,) = TrlParser((TaskConfig,)).parse_args_and_config(["--config", str(file), "--eval_size", "4"])
    assert config == TaskConfig("reasoning-gym:countdown", {"max_numbers": 3}, train_size=10, eval_size=4)
