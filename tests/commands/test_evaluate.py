"""`effopd eval` measures a model on the prompts that it was trained with, and says what it found in
its answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import TEMPLATE, make_model, make_tokenizer
from safetensors.torch import load_file

from effopd.commands import evaluate as evaluate_command
from effopd.commands import intervene as intervene_command
from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_train
from effopd.common.files import read_rows
from effopd.launch import prompts as launch_prompts
from effopd.launch.opd import to_yaml
from effopd.launch.rl import rl_yaml
from effopd.runs import run_prompts
from effopd.runs.inputs import Inputs, prompt_set, write_inputs
from effopd.runs.run_prompts import run_of
from effopd.tasks import TaskConfig
from effopd.tasks.generate import encode_prompts
from effopd.tasks.math_grading import MathVerifier

THINKING = (
    "{{ '<s>' }}" + TEMPLATE + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ 'nothink' }}{% endif %}{% if mode is defined %}{{ mode }}{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """student/, teacher/ and math.jsonl; the template reads `enable_thinking` and `mode`."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"question": f"what is {i} + 1", "solution": str(i + 1)} for i in range(30)]
    (root / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "math.jsonl").write_text(
        "".join(json.dumps({"problem": row["question"], "answer": row["solution"]}) + "\n" for row in rows)
    )
    (root / "other.jsonl").write_text('{"problem": "2 + 2", "answer": "4"}\n{"problem": "3 + 3", "answer": "6"}\n')
    return root


def a_run(models, root, task, *flags, command="train"):
    """A finished run's folder without the training; returns its held-out prompts, as token ids, and
    its settings.
    """
    argv = [
        "--model_name_or_path",
        str(models / "student"),
        "--task",
        task,
        "--output_dir",
        str(root),
        "--use_cpu",
        "--report_to",
        "none",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        *flags,
    ]
    argv += ["--per_device_eval_batch_size", "16"]  # fmt: skip
    if command == "train":
        settings = parse_train([*argv, "--teacher_model_name_or_path", str(models / "teacher")])
        args, text = settings.opd, to_yaml(settings)
    else:
        settings = parse_rl(argv)
        args, text = settings.rl, rl_yaml(settings)
    shutil.copytree(models / "student", root)
    (root / "config.yaml").write_text(text)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    _, held_out, *_ = launch_prompts.load_prompts(settings.task, args, tokenizer, "")
    return encode_prompts(tokenizer, [e.prompt for e in held_out.examples], args.chat_template_kwargs)


@pytest.fixture
def measured(monkeypatch):
    """What `effopd eval` measures: token ids of the prompts, the task and the settings."""
    seen = SimpleNamespace()

    class Stop(Exception):
        pass

    def evaluate(model, tokenizer, task, sampling, **_):
        seen.ids = encode_prompts(tokenizer, [e.prompt for e in task.examples], sampling.template)
        seen.task, seen.sampling = task, sampling
        raise Stop

    monkeypatch.setattr(evaluate_command, "evaluate", evaluate)
    monkeypatch.setattr(evaluate_command, "load_model", lambda *_, **__: None)
    for module in (evaluate_command, launch_prompts):  # the verifier works; to show it takes a process each time
        monkeypatch.setattr(module, "check_task", lambda *_, **__: 1)

    def run(*argv):
        with pytest.raises(Stop):
            main(["eval", *map(str, argv)])
        return seen

    return run


SETTINGS = {
    "nothing": [],
    "template": ["--chat_template_kwargs", '{"enable_thinking": false, "mode": "x"}'],
    "suffix": ["--prompt_suffix", " short"],
    "no suffix": ["--prompt_suffix", ""],
    "system": ["--system_prompt", "be brief"],
    "plain": ["--as_chat", "false"],
    "seed": ["--task_seed", "5"],
    "size": ["--eval_size", "7"],
    "length": ["--max_completion_length", "9", "--eval_temperature", "0.5"],
    "all": ["--chat_template_kwargs", '{"enable_thinking": false}', "--prompt_suffix", " a", "--system_prompt", "b",
            "--task_seed", "2", "--eval_size", "4"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "command"), [*((name, "train") for name in SETTINGS), ("template", "rl"), ("all", "rl")]
)
def test_eval_writes_the_prompts_that_training_wrote(models, tmp_path, measured, name, command, capsys):
    root, task = tmp_path / "run", f"math:{models / 'math.jsonl'}"
    ids = a_run(models, root, task, *SETTINGS[name], command=command)
    checkpoint = root / "checkpoints" / "step-000002"
    shutil.copytree(models / "student", checkpoint)
    for model in (root, checkpoint):
        for flags in ([], ["--task", task]):
            assert measured("--model", model, *flags).ids == ids, (model, flags)
        printed = capsys.readouterr().out
        assert f"as in {root / 'config.yaml'}: " in printed
    if name == "length":
        sampling = measured("--model", root).sampling
        assert sampling.max_new_tokens == 9 and sampling.temperature == 0.5


def test_columns_verifier_and_an_evaluation_of_its_own_are_the_runs(models, tmp_path, measured, monkeypatch):
    (tmp_path / "grading_of_mine.py").write_text("def grade(completion, example):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    task, other = f"math:{models / 'columns.jsonl'}", f"math:{models / 'other.jsonl'}"
    columns = '{"prompt_column": "question", "answer_column": "solution"}'
    ids = a_run(models, tmp_path / "columns", task, "--task_args", columns)
    assert measured("--model", "columns", "--task", task).ids == ids
    ids = a_run(models, tmp_path / "other", task, "--task_args", columns, "--eval_task", other)
    assert measured("--model", "other").ids == ids == measured("--model", "other", "--eval_task", other).ids
    assert len(ids) == 2
    # another task than the run's: prompts are written alike, rows and grading are that task's own
    flags = ["--task_args", columns, "--task_seed", "9", "--prompt_suffix", " hm", "--eval_size", "3"]
    a_run(models, tmp_path / "third", task, *flags)
    seen = measured("--model", "third", "--eval_task", other)
    assert len(seen.task) == 2 and all(e.prompt[-1]["content"].endswith(" hm") for e in seen.task.examples)
    # testbed prompts are used as they come, whatever the run says
    assert len(measured("--model", "third", "--task", "testbed:chain_sum", "--eval_size", "3").task) == 3


def test_flags_and_files_win_over_the_run(models, tmp_path, measured):
    root, task = tmp_path / "run", f"math:{models / 'math.jsonl'}"
    flags = SETTINGS["all"] + ["--max_completion_length", "9", "--eval_temperature", "0.5"]
    a_run(models, root, task, *flags)
    default = [
        "--max_new_tokens",
        "512",
        "--temperature",
        "1.0",
        "--prompt_suffix",
        "",
        "--system_prompt",
        "c",
        "--chat_template_kwargs",
        '{"enable_thinking": true}',
        "--task_seed",
        "0",
        "--eval_size",
        "5",
    ]
    (tmp_path / "c.yaml").write_text(
        "".join(f"{k.lstrip('-')}: {v!r}\n" for k, v in zip(default[::2], default[1::2], strict=True))
        .replace("'512'", "512").replace("'1.0'", "1.0").replace("'0'", "0").replace("'5'", "5")
    )  # fmt: skip
    for given in (default, ["--config", str(tmp_path / "c.yaml")]):
        seen = measured("--model", root, *given)
        assert (seen.sampling.max_new_tokens, seen.sampling.temperature, len(seen.task)) == (512, 1.0, 5)
        assert seen.sampling.chat_template_kwargs == {"enable_thinking": True}
        assert all(e.prompt[0]["content"] == "c" and e.prompt[1]["content"][-1].isdigit() for e in seen.task.examples)
    seen = measured("--model", root, "--as_chat", "false")  # plain text has no system message
    assert all(isinstance(e.prompt, str) for e in seen.task.examples)


def test_a_relative_task_is_the_runs_file_from_any_folder(models, tmp_path, measured, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "other").mkdir()
    file = tmp_path / "home" / "p.jsonl"
    shutil.copy(models / "math.jsonl", file)
    shutil.copy(models / "other.jsonl", tmp_path / "other" / "p.jsonl")  # other rows by the same name
    monkeypatch.chdir(tmp_path / "home")
    ids = a_run(models, Path("runs/first"), "math:p.jsonl", "--task_seed", "3", "--eval_size", "7")
    for folder, model in (("home", "runs/first"), ("other", "../home/runs/first")):
        monkeypatch.chdir(tmp_path / folder)
        for flags in ([], ["--task", "math:../home/p.jsonl"]):
            assert measured("--model", model, *flags).ids == ids
            assert "7 of 30 rows (held out with the settings of training;" in capsys.readouterr().out
    measured("--model", "../home/runs/first", "--task", f"math:{models / 'math.jsonl'}")
    assert "(held out with --task_seed 0, perhaps not as in training;" in capsys.readouterr().out
    file.unlink()
    assert main(["eval", "--model", "../home/runs/first"]) == 2
    error = capsys.readouterr().err
    assert f"task of the run ../home/runs/first: expected the file '{file}', but there is none" in error


def test_rows_count_as_held_out_in_training_only_if_they_are_those_of_the_runs_evaluations(
    models, tmp_path, measured, capsys
):
    """A grown file keeps its name and settings, and its rows are split in another way."""
    file = tmp_path / "p.jsonl"
    rows = (models / "math.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:20]))
    a_run(models, tmp_path / "run", f"math:{file}", "--task_seed", "3", "--eval_size", "7")
    seen = measured("--model", tmp_path / "run")
    prompts = [example.prompt for example in seen.task.examples]
    write_inputs(tmp_path / "run", Inputs(held_out=prompt_set(prompts)))
    capsys.readouterr()
    measured("--model", tmp_path / "run")
    assert "7 of 20 rows (held out as in training;" in capsys.readouterr().out
    file.write_text("".join(rows))
    grown = measured("--model", tmp_path / "run")
    assert [example.prompt for example in grown.task.examples] != prompts
    assert "7 of 30 rows (held out with --task_seed 3, perhaps not as in training;" in capsys.readouterr().out


def test_a_runs_settings_are_read_once(models, tmp_path, measured, monkeypatch, capsys):
    a_run(models, tmp_path / "run", f"math:{models / 'math.jsonl'}", "--task_seed", "3", "--eval_size", "7")
    read, settings = [], run_prompts._settings
    monkeypatch.setattr(run_prompts, "_settings", lambda path: read.append(path) or settings(path))
    measured("--model", tmp_path / "run")
    assert "7 of 30 rows (held out with the settings of training;" in capsys.readouterr().out
    assert read == [(tmp_path / "run/config.yaml").resolve()]


def test_every_setting_of_a_task_is_taken_over_or_left_on_purpose():
    from dataclasses import fields

    # which rows train, and checks that the run itself has made
    left = {"train_size", "max_prompt_length"}
    known = {"task", *run_prompts.PROMPTS, *run_prompts.SOURCE} - {"chat_template_kwargs"}
    assert {field.name for field in fields(TaskConfig)} == known | left


def test_models_without_a_run(models, tmp_path, measured, capsys):
    assert run_of(models / "student") is None and run_of("org/model") is None
    (tmp_path / "config.yaml").write_text("a: [1, 2]\n")  # another program's
    model = tmp_path / "deep" / "model"
    shutil.copytree(models / "student", model)
    seen = measured("--model", model, "--task", f"math:{models / 'math.jsonl'}")
    assert seen.sampling.max_new_tokens == 512 and seen.sampling.chat_template_kwargs is None
    assert "as in " + str(tmp_path) not in capsys.readouterr().out
    assert main(["eval", "--model", str(model)]) == 2
    assert "--task and --eval_task are missing" in capsys.readouterr().err


def test_a_point_written_by_intervene_is_of_the_run_it_was_made_from(models, tmp_path, measured):
    root, task = tmp_path / "run", f"math:{models / 'math.jsonl'}"
    ids = a_run(models, root, task, *SETTINGS["template"])
    save = tmp_path / "points"
    flags = ["--base", str(models / "student"), "--trained", f"opd={root}", "--save_dir", str(save), "--alphas", "0.5"]
    assert main(["intervene", "alpha", *flags]) == 0
    (point,) = {path.parent for path in save.rglob("config.json")}
    assert measured("--model", point).ids == ids


def test_intervene_measures_on_the_runs_prompts_and_asks_where_runs_differ(models, tmp_path, monkeypatch, capsys):
    for module in (intervene_command, launch_prompts):
        monkeypatch.setattr(module, "check_task", lambda *_, **__: 1)
    task = f"math:{models / 'math.jsonl'}"
    ids = a_run(models, tmp_path / "run", task, *SETTINGS["all"], "--max_completion_length", "9")
    a_run(models, tmp_path / "other", task, *SETTINGS["all"][2:], "--max_completion_length", "9")
    seen = []

    def evaluate(points, sources, request, results, task, tokenizer):
        kwargs = request.sampling.chat_template_kwargs
        seen.append((encode_prompts(tokenizer, [e.prompt for e in task.examples], kwargs), request.sampling))
        raise KeyboardInterrupt

    monkeypatch.setattr(intervene_command, "_evaluate", evaluate)
    one = ["intervene", "alpha", "--base", str(models / "student"), "--trained", f"opd={tmp_path / 'run'}",
           "--task", task, "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(one) == 130
    assert seen[0][0] == ids and seen[0][1].max_new_tokens == 9
    two = [*one, "--trained", f"other={tmp_path / 'other'}"]
    capsys.readouterr()
    assert main(two) == 2
    error = capsys.readouterr().err
    assert "the runs differ in chat_template_kwargs" in error and "--chat_template_kwargs" in error
    assert main([*two, "--chat_template_kwargs", '{"enable_thinking": false}']) == 130
    assert seen[1][0] == ids


def test_every_answers_file_has_its_own_summary(models, tmp_path, capsys):
    paths = [tmp_path / name for name in ("answers-0.5", "answers-0.7", "r.v1", "r.v2", "a.jsonl", "b.json")]
    summaries = [evaluate_command.summary_path(path).name for path in paths]
    assert summaries == [*(f"{path.name}.summary.json" for path in paths[:4]), "a.summary.json", "b.json.summary.json"]
    (tmp_path / "a.summary.json").write_text("{}")
    flags = ["eval", "--model", str(models / "student"), "--eval_task", f"math:{models / 'math.jsonl'}"]
    assert main([*flags, "--output", str(tmp_path / "a.jsonl")]) == 2
    assert "a.summary.json, which exists: expected a new file" in capsys.readouterr().err
    assert (tmp_path / "a.summary.json").read_text() == "{}"


# -- what was found in the answers -----------------------------------------------------------------


@pytest.mark.slow
def test_the_result_says_how_many_answers_could_be_graded(models, tmp_path, capsys, caplog):
    output = tmp_path / "answers.jsonl"
    flags = ["--eval_task", f"math:{models / 'math.jsonl'}", "--max_new_tokens", "3", "--n", "2"]
    assert main(["eval", "--model", str(models / "student"), *flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "answers.summary.json").read_text())
    assert summary["answers_found"] == 0 and summary["answers_cut"] > 30
    assert f"60, 0 with something to grade, {summary['answers_cut']} cut at the limit" in printed
    (said,) = caplog.messages
    assert "60 of 60 answers have no \\boxed{} (100 %): accuracy does not measure" in said
    assert f"raise --max_new_tokens ({summary['answers_cut']} answers were cut at 3 tokens)" in said
    assert "An example: " in said and "supervised" not in said and "answers have no" not in printed


@pytest.mark.slow
def test_eval_says_early_that_nothing_can_be_graded(models, capsys, caplog, monkeypatch):
    """After 16 answers and once, however many follow; of fewer answers, at the end."""
    lines: list[str] = []
    flags = ["eval", "--model", str(models / "student"), "--eval_task", f"math:{models / 'math.jsonl'}",
             "--max_new_tokens", "3", "--batch_size", "5"]  # fmt: skip
    monkeypatch.setattr(
        evaluate_command.Counted, "update", lambda self, n: lines.append(f"{n} {len(caplog.messages)}")
    )
    assert main(flags) == 0
    assert lines == ["5 0"] * 3 + ["5 1"] * 3 and "20 of 20 answers" in caplog.messages[0]
    assert "answers have no" not in capsys.readouterr().out
    caplog.clear()
    known: dict[str, bool] = {}
    monkeypatch.setattr(MathVerifier, "answer_found", lambda self, text: known.setdefault(text, not known))
    assert main([*flags, "--eval_size", "6"]) == 0  # too few to tell early
    assert "5 of 6 answers have no \\boxed{} (83 %)" in capsys.readouterr().out and not caplog.messages


@pytest.mark.slow
def test_training_evaluations_count_their_answers(models, tmp_path, capsys):
    flags = [
        "--model_name_or_path",
        str(models / "student"),
        "--teacher_model_name_or_path",
        str(models / "teacher"),
        "--task",
        f"math:{models / 'math.jsonl'}",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--max_completion_length",
        "4",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--use_cpu",
        "--effopd.strategy",
        "line_search",
        "--effopd.score_rollouts",
        "4",
    ]
    rows = {}
    for name, more in (("as it is", []), ("without", ["--eval_on_start", "false"])):
        assert main(["train", *flags, *more, "--output_dir", str(tmp_path / name)]) == 0
        rows[name] = [list(read_rows(tmp_path / name / f"{kind}.jsonl")) for kind in ("evals", "metrics", "searches")]
    evals, metrics, searches = rows["as it is"]
    # before the first step, too, because of the look-ahead; which changes nothing that training
    # does
    assert [row["step"] for row in evals] == [0, 1, 2]
    assert [row["step"] for row in rows["without"][0]] == [1, 2]

    def decided(value):
        if isinstance(value, dict):
            return {
                k: decided(v) for k, v in value.items() if not any(part in k for part in ("second", "time", "eval"))
            }
        return [decided(one) for one in value] if isinstance(value, list) else value

    for mine, others in zip((metrics, searches), rows["without"][1:], strict=True):
        assert decided(mine) == decided(others)
    same = {"eval_kl", "eval_accuracy", "eval_accuracy_greedy"}
    assert [{k: row[k] for k in same} for row in evals[1:]] == [
        {k: row[k] for k in same} for row in rows["without"][0]
    ]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in rows)
    assert all(torch.equal(one[name], other[name]) for name in one)

    for row in evals:
        assert (row["eval_answers"], row["eval_answers_found"]) == (3, 0)
        assert row["eval_answers_cut"] + row["eval_answers_empty"] <= 3
        assert row["eval_answers_cut"] == round(3 * row["eval_truncated_share"])
    assert capsys.readouterr().out.count("(only 0 of 3 answers could be graded)") == 5


@pytest.mark.slow
def test_an_intervention_says_where_answers_could_not_be_graded(models, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [
        "--base",
        str(models / "student"),
        "--trained",
        f"a={models / 'teacher'}",
        "--out",
        str(out),
        "--alphas",
        "0",
    ]
    # --eval_task alone is a task, too
    assert (
        main(["intervene", "alpha", *flags, "--eval_task", f"math:{models / 'other.jsonl'}", "--max_new_tokens", "2"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "reference/base: 2 of 2 answers have no \\boxed{}" in printed
    rows = list(read_rows(out / "results.jsonl"))
    assert all(row["measured"]["answers_found"] == 0 and "answers_cut" in row["measured"] for row in rows)


@pytest.mark.parametrize("template", ["{% for", "{{ nothing.at.all }}", "{{ raise_exception('no system message') }}"])
def test_a_template_that_cannot_write_prompts(models, tmp_path, template, capsys):
    model, tokenizer = tmp_path / "model", make_tokenizer()
    shutil.copytree(models / "student", model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    assert main(["eval", "--model", str(model), "--eval_task", f"math:{models / 'other.jsonl'}"]) == 2
    assert f"the chat template of '{model}'" in capsys.readouterr().err


def test_a_good_result_has_no_warning(capsys):
    flags = ["--task", "testbed:chain_sum", "--eval_size", "8", "--max_new_tokens", "24"]
    assert main(["eval", "--model", "testbed:teacher", *flags]) == 0
    assert "does not measure" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ['{"enable_thinking": false', "[1]", "3", '"text"'],
)  # fmt: skip
def test_template_arguments_that_are_no_json_object(value, capsys):
    flags = ["--model", "testbed:student", "--task", "testbed:chain_sum", "--chat_template_kwargs", value]
    assert main(["eval", *flags]) == 2
    error = capsys.readouterr().err
    assert "--chat_template_kwargs: expected a JSON object" in error and '{"enable_thinking": false}' in error
