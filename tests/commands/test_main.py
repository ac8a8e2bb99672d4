"""The commands as a user runs them: math problems in a JSONL file, a random Qwen3 pair."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny_models import make_model, make_tokenizer, small_scores
from safetensors.torch import load_file

from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.commands.train import effopd_arguments, parse_train
from effopd.common import optional
from effopd.common.files import read_rows
from effopd.distill.config import OPDConfig
from effopd.distill.rl_config import config_class
from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.strategy import STRATEGIES
from effopd.tasks.builtin_models import student_path, teacher_path, with_spoken_names


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    rng = random.Random(0)
    numbers = [(rng.randrange(100), rng.randrange(100)) for _ in range(80)]
    rows = [{"problem": f"what is {a} + {b}", "answer": str(a + b)} for a, b in dict.fromkeys(numbers)]
    (root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def train_flags(pair, output_dir, *extra, strategy="effopd"):
    ((name, size),) = small_scores(strategy).items()
    return [
        "--model_name_or_path", str(pair / "student"), "--teacher_model_name_or_path", str(pair / "teacher"),
        "--task", f"math:{pair / 'math.jsonl'}", "--prompt_suffix", "", "--eval_size", "12",
        "--max_steps", "4", "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "12",
        "--max_completion_length", "6", "--learning_rate", "1e-3", "--eval_strategy", "steps", "--eval_steps", "2",
        "--save_strategy", "steps", "--save_steps", "2", "--activation_checkpointing", "false", "--use_cpu",
        "--report_to", "none", "--output_dir", str(output_dir),
        "--effopd.strategy", strategy, f"--effopd.{name}", str(size), *extra,
    ]  # fmt: skip


@pytest.mark.slow
def test_train_evaluates_checkpoints_and_resumes(pair, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(["train", *train_flags(pair, whole)]) == 0
    assert [row["step"] for row in read_rows(whole / "evals.jsonl")] == [0, 2, 4]  # with a look-ahead, before it, too
    assert [row["step"] for row in read_rows(whole / "searches.jsonl")] == [1, 2, 4]
    assert (whole / "checkpoints" / "step-000002" / "effopd_anchor.safetensors").exists()

    assert main(["train", *train_flags(pair, part, "--max_steps", "2")]) == 0
    assert main(["train", *train_flags(pair, part)]) == 2  # without resume: refused, nothing lost
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert main(["train", *train_flags(pair, part, "--resume_from_checkpoint", "true")]) == 0
    assert [row["step"] for row in read_rows(part / "evals.jsonl")] == [0, 2, 4]
    one, other = (load_file(root / "model.safetensors") for root in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)

    # the saved YAML re-runs the run
    again = tmp_path / "again"
    assert main(["train", "--config", str(whole / "config.yaml"), "--output_dir", str(again)]) == 0
    other = load_file(again / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert yaml.safe_load((whole / "config.yaml").read_text())["effopd"]["validation_size"] == 8
    assert "# trl 1.16" in (whole / "config.yaml").read_text()


def test_eval_command(pair, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    flags = ["eval", "--model", str(pair / "student"), "--task", f"math:{pair / 'math.jsonl'}", "--eval_size", "10",
             "--prompt_suffix", "", "--n", "4", "--max_new_tokens", "6", "--output", str(output)]  # fmt: skip
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "avg@4" in printed and "pass@4" in printed and "95 % interval over 10 prompts" in printed
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 40 and {"completion", "score", "answer", "truncated"} <= rows[0].keys()
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    assert summary["avg@4"] == pytest.approx(sum(row["correct"] for row in rows) / 40)
    assert main(flags) == 2 and "exists" in capsys.readouterr().err


def test_bad_rows_are_reported_with_file_and_row(pair, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    lines = (pair / "math.jsonl").read_text().splitlines()
    lines[3], lines[5] = json.dumps({"problem": "x"}), json.dumps({"problem": "", "answer": "1"})
    path.write_text("\n".join(lines))
    flags = train_flags(pair, tmp_path / "run")
    flags[flags.index("--task") + 1] = f"math:{path}"
    assert main(["train", *flags]) == 2
    message = capsys.readouterr().err
    assert "bad.jsonl" in message and "row 4" in message and "row 6" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--effopd.args", '{"scales": [-1]}', "scales"),
        ("--loss_type", "half", "invalid choice"),
        ("--teacher_model_name_or_path", "/nowhere/at/all", "no such folder"),
        ("--per_device_train_batch_size", "1000", "a step takes 1000 prompts"),
        ("--max_prompt_length", "3", "at most 3"),
        ("--effopd.validation_size", "500", "500 validation prompts are drawn"),
    ],
)
def test_mistakes_are_explained_before_any_work(pair, tmp_path, capsys, flag, value, message):
    try:
        status = main(["train", *train_flags(pair, tmp_path / "run", flag, value)])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_lookahead_settings_without_a_strategy_are_refused(pair, tmp_path):
    base = train_flags(pair, tmp_path / "run")[:-4]
    with pytest.raises(ConfigError, match=r"--effopd\.min_z: .* without a strategy.*--effopd\.strategy newton_search"):
        parse_train([*base, "--effopd.min_z", "3"])
    assert not parse_train([*base, "--effopd.seed", "2", "--effopd.strategy", "none"]).effopd.enabled
    (tmp_path / "c.yaml").write_text("effopd: {strategy: line_search}\n")
    assert parse_train(["--config", str(tmp_path / "c.yaml"), *base, "--effopd.min_z", "3"]).effopd.min_z == 3


def test_unknown_yaml_keys_are_named(pair, tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rat: 1.0\n")
    with pytest.raises(ConfigError, match="learning_rat"):
        parse_train(["--config", str(tmp_path / "c.yaml"), *train_flags(pair, tmp_path / "run")])


@pytest.mark.parametrize(
    "command",
    [
        "train --task testbed:chain_sum",
        "rl --task testbed:chain_sum",
        "eval --model testbed:student --task testbed:chain_sum",
        "quickstart",
        "intervene alpha --base testbed:student --trained rl=testbed:teacher",
    ],
)
def test_a_typing_error_in_yaml_is_no_traceback(command, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("modl: x\n")
    flag = {"train": "--output_dir", "rl": "--output_dir", "intervene": "--out"}.get(command.split()[0])
    out = [flag, str(tmp_path / "run")] if flag else []
    assert main([*command.split(), *out, "--config", str(tmp_path / "c.yaml")]) == 2
    assert "modl" in capsys.readouterr().err


LORA = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "down_proj", "--max_steps", "2"]


@pytest.mark.slow
def test_train_lora_by_flags(pair, tmp_path):
    assert main(["train", *train_flags(pair, tmp_path / "run", *LORA)]) == 0
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)  # zero at the start
    assert all("lora_lost_share" in row for row in read_rows(tmp_path / "run" / "searches.jsonl"))
    assert {row["step"] for row in read_rows(tmp_path / "run" / "searches.jsonl")} == {1, 2}


@pytest.mark.slow
def test_rl_lora_by_flags(pair, tmp_path):
    flags = [
        "--model_name_or_path",
        str(pair / "student"),
        "--task",
        f"math:{pair / 'math.jsonl'}",
        "--prompt_suffix",
        "",
        "--per_device_train_batch_size",
        "8",
        "--num_generations",
        "4",
        "--max_completion_length",
        "6",
        "--use_cpu",
        "--gradient_accumulation_steps",
        "1",
        "--learning_rate",
        "1e-2",
        "--save_strategy",
        "no",
        "--eval_strategy",
        "no",
        "--report_to",
        "none",
        "--gradient_checkpointing",
        "false",
        "--output_dir",
        str(tmp_path / "run"),
        *LORA,
    ]
    assert main(["rl", *flags]) == 0
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.parametrize(
    ("package", "flag"), [("peft", "--use_peft"), ("bitsandbytes", "--load_in_4bit"), ("vllm", "--use_vllm")]
)
def test_a_flag_whose_package_is_missing_is_refused_before_anything_is_loaded(
    package, flag, pair, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(optional, "is_available", lambda module: module != package)
    assert main(["train", *train_flags(pair, tmp_path / "run", flag, "true")]) == 2
    said = capsys.readouterr().err
    assert flag in said and "pip install" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "train --dry_run", "rl"])
def test_a_task_whose_package_is_missing_is_refused_before_anything_is_loaded(
    command, pair, tmp_path, monkeypatch, capsys
):
    """Also for the source of the evaluation, and if the other source cannot be read now."""
    monkeypatch.setattr(optional, "is_available", lambda module: module != "reasoning_gym")
    flags = train_flags(pair, tmp_path / "run", "--task", "math:ORG/SET", "--eval_task", "reasoning-gym:chain_sum")
    if command == "rl":
        flags = ["--model_name_or_path", str(pair / "student"), "--task", "reasoning-gym:chain_sum", "--use_cpu",
                 "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert main([*command.split(), *flags]) == 2
    assert "pip install 'effopd[gym]'" in capsys.readouterr().err and not (tmp_path / "run").exists()


OTHER_VALUES = {
    "gate": "significant",
    "min_z": 3.0,
    "parameters": "mlp",
    "anchor_device": "cpu",
    "schedule": "every_step",
    "score_rollouts": 16,
    "reset_moments": True,
    "adapt_learning_rate": True,
    "validation_size": 51,
    "seed": 1,
}
OTHER_ARGS = {"scales": [3.0, 5.0], "max_completion_length": 7, "every": 1, "until": 32, "target": 0.5, "k": 0.5}


def other_settings(strategy):
    """Another value of every setting that the strategy reads."""
    start = EffOPDConfig(strategy)
    args = {name: OTHER_ARGS[name] if name in OTHER_ARGS else value + 1 for name, value in start.args.items()}
    values = {name: value for name, value in OTHER_VALUES.items() if getattr(start, name) is not None}
    values |= {"anchor_device": "cpu"} | ({"gate": "significant", "min_z": 3.0} if start.gate else {})
    for name in ("reset_moments", "adapt_learning_rate"):
        if name in values:
            values[name] = not getattr(start, name)
    return {"strategy": strategy, "args": args, **values}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_lookahead_field_reaches_the_config_by_flag_and_by_yaml(pair, tmp_path, strategy):
    wanted = other_settings(strategy)
    flags = []
    for name, value in wanted.items():
        flags += [f"--effopd.{name}", json.dumps(value) if name == "args" else str(value)]
    base = train_flags(pair, tmp_path / "run")[:-4]
    config = parse_train([*base, *flags]).effopd
    assert config == EffOPDConfig(**wanted) and {name: getattr(config, name) for name in wanted} == wanted
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"effopd": wanted}))
    assert parse_train(["--config", str(tmp_path / "c.yaml"), *base]).effopd == config


@pytest.mark.parametrize("how", ["flag", "yaml"])
@pytest.mark.parametrize(
    ("strategy", "name", "value"),
    [
        ("fixed", "validation_size", 20),
        ("alpha_opd", "score_rollouts", 16),
        ("fixed", "adapt_learning_rate", True),
        ("effopd", "min_z", 3),
        ("line_search", "args", '{"k": 2}'),
        ("none", "gate", "better"),
    ],
)
def test_a_lookahead_setting_that_would_be_ignored_is_refused(pair, tmp_path, capsys, how, strategy, name, value):
    base = ["train", *train_flags(pair, tmp_path / "run")[:-4], "--dry_run"]
    if how == "flag":
        given = ["--effopd.strategy", strategy, f"--effopd.{name}", str(value)]
    else:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"effopd": {"strategy": strategy, name: value}}))
        given = ["--config", str(tmp_path / "c.yaml")]
    assert main([*base, *given]) == 2
    said = capsys.readouterr().err
    assert f"(--effopd.{name})" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--effopd.anchor_device", "disk"), "cannot hold the anchor"),
        (("--effopd.anchor_device", "cuda:99"), "cannot hold the anchor"),
        (("--effopd.parameters", "("), "regular expression"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(pair, tmp_path, capsys, flags, message):
    base = ["train", *train_flags(pair, tmp_path / "run")[:-4], "--effopd.strategy", "line_search", *flags]
    said = []
    for more in (["--dry_run"], []):
        assert main([*base, *more]) == 2
        said.append(capsys.readouterr().err)
    assert all(message in text and "Traceback" not in text for text in said)


def test_a_dry_run_refuses_a_rule_that_moves_nothing(pair, tmp_path, capsys):
    look = ["--effopd.strategy", "line_search", "--effopd.parameters", "no_such_module", "--dry_run"]
    assert main(["train", *train_flags(pair, tmp_path / "run")[:-4], *look]) == 2
    assert "matches no trained parameter" in capsys.readouterr().err


def test_settings_survive_the_yaml_round_trip(pair, tmp_path):
    from effopd.launch.opd import to_yaml

    extra = ("--loss_type", "sampled", "--temperature", "0.9", "--warmup_steps", "3", "--eval_on_start", "true",
             "--lr_scheduler_type", "cosine")  # fmt: skip
    settings = parse_train(train_flags(pair, tmp_path / "run", *extra))
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    again = parse_train(["--config", str(tmp_path / "c.yaml")])
    assert to_yaml(again) == to_yaml(settings)
    assert again.task == settings.task and again.effopd == settings.effopd
    for name in ("loss_type", "temperature", "warmup_steps", "eval_on_start", "learning_rate", "eval_steps"):
        assert getattr(again.opd, name) == getattr(settings.opd, name)


def test_built_in_models_keep_their_names_in_the_yaml(tmp_path):
    """Their folder is another on the next machine. What is loaded stays a folder."""
    from effopd.launch.opd import to_yaml
    from effopd.launch.rl import rl_yaml

    names = {"student": "testbed:student", "teacher": "testbed:teacher"}
    base = ["--model_name_or_path", names["student"], "--task", "testbed:chain_sum", "--use_cpu"]
    exopd = ["--lambda_extrapolation", "1.25", "--reference_model_name_or_path", names["student"]]
    settings = parse_train([*base, "--teacher_model_name_or_path", names["teacher"], *exopd])
    assert settings.model.model_name_or_path == str(student_path())
    written = yaml.safe_load(to_yaml(settings))
    assert written["model_name_or_path"] == written["reference_model_name_or_path"] == names["student"]
    assert written["teacher_model_name_or_path"] == names["teacher"]
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    again = parse_train(["--config", str(tmp_path / "c.yaml")])
    assert again.model == settings.model and to_yaml(again) == to_yaml(settings)

    settings = parse_train([*base, "--teachers", "a=testbed:teacher", f"b={tmp_path}"])
    assert settings.opd.teachers == [f"a={teacher_path()}", f"b={tmp_path}"]
    assert yaml.safe_load(to_yaml(settings))["teachers"] == ["a=testbed:teacher", f"b={tmp_path}"]

    settings = parse_rl([*base, "--algorithm", "dgrpo", "--teacher_model_name_or_path", names["teacher"]])
    written = yaml.safe_load(rl_yaml(settings))
    assert [written["model_name_or_path"], written["teacher_model_name_or_path"]] == list(names.values())


def test_messages_have_the_name_of_a_built_in_model(tmp_path, monkeypatch):
    student = student_path()
    message = f"--model_name_or_path '{student}' is small. See {student}/config.json, {student}-2, x{student}."
    assert with_spoken_names(message) == message.replace(f"'{student}'", "'testbed:student'")
    assert with_spoken_names(f"{student}.") == "testbed:student."
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path))
    missing = str(tmp_path / "testbed-other" / "long_teacher")
    assert with_spoken_names(missing) == missing


def bare_flags(pair):
    return [
        "--model_name_or_path", str(pair / "student"), "--teacher_model_name_or_path", str(pair / "teacher"),
        "--task", "testbed:chain_sum", "--use_cpu",
    ]  # fmt: skip


def test_a_strategy_of_another_package_is_a_choice(pair, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "mine", dataclasses.replace(STRATEGIES["fixed"], help="jumps as I like"))
    flags = [*bare_flags(pair), "--effopd.strategy", "mine", "--effopd.args", '{"k": 2}']
    assert parse_train(flags).effopd == EffOPDConfig("mine", args={"k": 2})
    help_texts = {field.name: field.metadata["help"] for field in dataclasses.fields(effopd_arguments())}
    assert "'mine': jumps as I like." in help_texts["effopd_strategy"]
    assert "fixed, mine: k (" in help_texts["effopd_args"]


def test_another_strategy_does_not_inherit_the_values_of_the_files_strategy(pair, tmp_path):
    """A run's config.yaml holds all values of its strategy; only the chosen ones are kept."""
    from effopd.launch.opd import to_yaml

    file, base = tmp_path / "config.yaml", bare_flags(pair)
    flags = ["--config", str(file), "--effopd.strategy"]
    file.write_text(to_yaml(parse_train([*base, "--effopd.strategy", "line_search"])))
    for name in ("effopd", "newton_search", "relex", "line_search", "none"):
        assert parse_train([*flags, name]).effopd == EffOPDConfig(name)
    own = parse_train([*flags, "effopd", "--effopd.gate", "significant", "--effopd.validation_size", "8"]).effopd
    assert own == EffOPDConfig("effopd", gate="significant", validation_size=8)  # the gate is also the file's
    chosen = ("--effopd.strategy", "line_search", "--effopd.score_rollouts", "4", "--effopd.seed", "3")
    file.write_text(to_yaml(parse_train([*base, *chosen])))
    assert parse_train([*flags, "effopd"]).effopd == EffOPDConfig("effopd", score_rollouts=4, seed=3)
    file.write_text(to_yaml(parse_train([*base, "--effopd.strategy", "fixed", "--effopd.args", '{"k": 3}'])))
    with pytest.raises(ConfigError, match="would ignore k"):
        parse_train([*flags, "noop"])


@pytest.mark.parametrize("command", ["train", "rl"])
def test_the_precision_of_a_run_does_not_depend_on_the_machine_that_repeats_it(command, pair, tmp_path, monkeypatch):
    from effopd.commands.rl import parse_rl
    from effopd.launch.opd import to_yaml
    from effopd.launch.rl import rl_yaml

    parse, write, name = {"train": (parse_train, to_yaml, "opd"), "rl": (parse_rl, rl_yaml, "rl")}[command]
    base = ["--model_name_or_path", "testbed:student", "--task", "testbed:chain_sum", "--output_dir", str(tmp_path)]
    base += ["--teacher_model_name_or_path", "testbed:teacher"] * (command == "train")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = getattr(parse(base), name)
    assert (config.bf16, config.fp16) == (False, False)
    (tmp_path / "c.yaml").write_text(write(parse(base)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    again = getattr(parse(["--config", str(tmp_path / "c.yaml")]), name)
    assert (again.bf16, again.fp16) == (False, False)


@pytest.mark.parametrize("command", ["train", "rl", "eval", "compare", "analyze", "intervene", "quickstart"])
def test_help_teaches(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert f"effopd {command}" in said and ("example" in said.lower() or command in ("compare", "quickstart"))


def test_an_unknown_command_is_an_error():
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])


@pytest.mark.parametrize("command", ["train", "rl"])
def test_short_help_has_the_essentials_and_long_help_every_flag_once(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = {}
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit, match="0"):
            main([command, flag])
        said[flag] = capsys.readouterr().out
    assert (
        said["-h"].index("--model_name_or_path") < said["-h"].index("--learning_rate")
        and len(said["-h"].splitlines()) <= 170
    )
    assert "--adam_beta1" not in said["-h"] and "more flags" in said["-h"] and "true: resume" in said["-h"]
    shown = re.findall(r"^  (?:-h, )?(--[\w.]+)", said["--help"], flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    fields = {
        field.name
        for field in dataclasses.fields(OPDConfig if command == "train" else config_class("grpo"))
        if field.init
    }
    assert {f"--{name}" for name in fields} <= set(shown)


def test_config_with_an_equals_sign_is_not_ignored(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config=missing.yaml"])
    assert "--config missing.yaml" in capsys.readouterr().err


def test_a_launcher_can_start_it_as_a_module():
    result = subprocess.run([sys.executable, "-m", "effopd", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "train" in result.stdout


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
def test_recipe_testbed_runs_two_steps_through_its_command(tmp_path):
    flags = ["--max_steps", "2", "--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no"]
    flags += ["--per_device_train_batch_size", "16", "--output_dir", str(tmp_path), "--use_cpu"]
    assert main(["train", "--config", str(RECIPES / "testbed.yaml"), *flags]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "searches.jsonl")] == [1, 2]


def test_recipe_testbed_is_the_reference():
    from effopd.tasks import builtin_models as testbed

    opd = parse_train(["--config", str(RECIPES / "testbed.yaml")]).opd
    for name, value in testbed.reference_settings().items():
        assert getattr(opd, name) == value, name


PAPER = sorted(RECIPES.glob("paper-*.yaml"))
CLUSTER = [*PAPER, RECIPES / "code-4b.yaml"]


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
def test_recipes_of_the_paper_say_what_the_paper_says(recipe):
    settings = parse_train(["--config", str(recipe)])
    opd = settings.opd
    processes = int(re.search(r"--num_processes (\d+)", recipe.read_text())[1])
    assert opd.per_device_train_batch_size * opd.gradient_accumulation_steps * processes == 1024
    assert (opd.learning_rate, opd.loss_type, opd.max_completion_length) == (1e-6, "sampled", 16384)
    assert settings.effopd == EffOPDConfig()
    assert settings.task.max_prompt_length == 2048


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*CLUSTER, RECIPES / "testbed.yaml"], ids=lambda path: path.stem)
def test_a_dry_run_shows_the_plan_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if recipe.stem == "code-4b":
        monkeypatch.setattr("effopd.tasks.code.verifier.CodeVerifier.check", lambda self: None)
    assert main(["train", "--config", str(recipe), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "look-ahead" in out and "32 × FSDP2" in out and "optimizer" in out
    assert "unknown" not in out.replace("sharded over 8: unknown until", "")  # that alone needs a configuration
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CLUSTER, ids=lambda path: path.stem)
def test_cluster_recipes_run_two_steps_with_tiny_models(recipe, pair, tmp_path):
    strategy = parse_train(["--config", str(recipe)]).effopd.strategy
    more = (
        "--task_args",
        "{}",
        "--gradient_accumulation_steps",
        "1",
        "--max_prompt_length",
        "64",
        "--save_steps",
        "2",
    )
    flags = train_flags(pair, tmp_path / "run", *more, "--max_steps", "2", strategy=strategy)
    assert main(["train", "--config", str(recipe), *flags]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run" / "checkpoints").is_dir() and (tmp_path / "run" / "searches.jsonl").is_file()


def test_eval_of_the_shipped_teacher(capsys):
    flags = ["--task", "testbed:chain_sum", "--eval_size", "64", "--max_new_tokens", "24", "--temperature", "0"]
    assert main(["eval", "--model", "testbed:teacher", *flags]) == 0
    assert "avg@1" in capsys.readouterr().out
