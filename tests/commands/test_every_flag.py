"""Bad values of every flag of `effopd train` and `effopd rl`, made from the parsers: each ends in a
message that names the flag, with exit status 2, before anything is loaded. A new flag is covered by
being there."""

from __future__ import annotations

import functools

import pytest

from effopd.commands import rl, train
from effopd.commands.main import main
from effopd.commands.parser import spelling
from effopd.commands.rl import rl_parser
from effopd.commands.train import train_parser
from effopd.distill.values import MAPPINGS, RANGES
from effopd.launch import opd as launch
from effopd.launch import rl as launch_rl

#: Flags of text that take any text, or whose text is judged by rows and models that are read later.
ANY_TEXT = {
    "model_name_or_path",
    "teacher_model_name_or_path",
    "reference_model_name_or_path",
    "model_revision",
    "teacher_model_revision",
    "reference_model_revision",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "hub_token",
    "hub_model_id",
    "hub_revision",
    "metric_for_best_model",
    "label_names",
    "length_column_name",
    "include_for_metrics",
    "system_prompt",
    "prompt_suffix",
    "output_dir",
    "log_completions_hub_repo",
    "optim_target_modules",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
}
#: Numbers that a flag takes though most would not; those of `RANGES` are known from it.
ZERO = {"eval_size", "effopd_seed", "effopd_min_z"}

COMMANDS = {
    "train": ["train", "--model_name_or_path", "testbed:student", "--teacher_model_name_or_path", "testbed:teacher"],
    "grpo": ["rl", "--algorithm", "grpo", "--model_name_or_path", "testbed:student"],
    "rloo": ["rl", "--algorithm", "rloo", "--model_name_or_path", "testbed:student"],
    "dgrpo": [
        "rl",
        "--algorithm",
        "dgrpo",
        "--model_name_or_path",
        "testbed:student",
        "--teacher_model_name_or_path",
        "testbed:teacher",
    ],
}
#: What some flags need beside them to be read at all.
BESIDE = {
    "lora_": ["--use_peft", "true"], "use_rslora": ["--use_peft", "true"], "use_dora": ["--use_peft", "true"],
    "effopd_min_z": ["--effopd.strategy", "line_search"], "effopd_": ["--effopd.strategy", "effopd"],
}  # fmt: skip


@functools.cache
def parser_of(name):
    return train_parser() if name == "train" else rl_parser(name)


def actions(name):
    return {
        action.dest: action for action in parser_of(name)._actions if action.nargs != 0 and action.dest != "config"
    }


def bad_values(action) -> list[str]:
    """Values that a flag cannot take, by its type."""
    kind, name = getattr(action.type, "__name__", ""), action.dest
    if action.choices is not None:
        return ["nonsense"]
    if kind in ("int", "float"):
        allowed = RANGES.get(name)
        numbers = [value for value in (-1, 0) if (value not in allowed if allowed else value < 0 or name not in ZERO)]
        texts = ["x", "1.5", "1" + "0" * 30] if kind == "int" else ["abc", "nan", "inf", "-inf"]
        return [*texts, *map(str, numbers)]
    if kind == "string_to_bool":
        return ["maybe"]
    if name in MAPPINGS or (name.endswith(("_args", "_config")) and name != "optim_args"):
        return ["not json", "enable_thinking=false", "{'single': 'quotes'}", '["a", "list"]', '"text"']
    return [] if name in ANY_TEXT else ["nonsense", "{'single': 'quotes'}"]


ALL = [(command, name) for command in COMMANDS for name in actions(command)]
#: A flag that two commands share, with the same type, is tried on the first.
FIRST = {name: command for command, name in reversed(ALL)}
TRIED = [(command, name) for command, name in ALL if command == FIRST[name] or name in MAPPINGS or name == "loss_type"]


@pytest.fixture
def nothing_is_loaded(monkeypatch, tmp_path):
    def loaded(*args, **kwargs):
        raise AssertionError("the models would have been loaded")

    for module, name in (
        (launch, "OPDTrainer"),
        (launch_rl, "TaskGRPOTrainer"),
        (launch_rl, "TaskRLOOTrainer"),
        (launch_rl, "TaskDGRPOTrainer"),
    ):
        monkeypatch.setattr(module, name, loaded)
    # one parser for thousands of commands: without --config, parsing changes nothing that they need
    monkeypatch.setattr(train, "train_parser", functools.partial(parser_of, "train"))
    monkeypatch.setattr(rl, "rl_parser", parser_of)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), TRIED, ids=[f"{command}-{name}" for command, name in TRIED])
def test_a_bad_value_is_refused_by_its_flag(command, name, nothing_is_loaded, capsys):
    action = actions(command)[name]
    flag = spelling(action)
    beside = next((flags for start, flags in BESIDE.items() if name.startswith(start)), [])
    for number, value in enumerate(bad_values(action)):
        given = [*COMMANDS[command], "--task", "testbed:chain_sum", "--use_cpu", "--output_dir", "run", *beside]
        given = [*given, f"{flag}={value}"]
        for dry in [True, False] if command == "train" and number == 0 else [command == "train"]:
            try:
                status = main([*given, *["--dry_run"] * dry])
            except SystemExit as stop:  # argparse's own
                status = stop.code
            said = capsys.readouterr().err
            assert status == 2, f"{flag} {value} was taken"
            last = said.strip().splitlines()[-1]
            assert flag.lstrip("-").removeprefix("effopd.") in last, f"{flag} {value}: {last}"
            assert "Traceback" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command):
    own = ("effopd_", "train_size", "eval_size", "max_prompt_length", "verify_timeout")  # checked by their dataclass
    numbers = {name for name, a in actions(command).items() if getattr(a.type, "__name__", "") in ("int", "float")}
    assert not {name for name in numbers if name not in RANGES and not name.startswith(own)}
