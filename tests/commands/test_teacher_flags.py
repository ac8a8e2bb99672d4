"""Flags of local and of several teachers: dry runs, and mistakes refused before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effopd.commands.main import main
from effopd.commands.train import parse_train
from effopd.common import optional
from effopd.common.files import read_rows
from effopd.distill.teachers.manifest import TeacherEntry, write_manifest
from effopd.runs.run_dir import RunDir

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/several-teachers.yaml"
ONE = ["--model_name_or_path", "testbed:student", "--teacher_model_name_or_path", "testbed:teacher"]
ONE += ["--task", "testbed:chain_sum", "--max_completion_length", "8", "--use_cpu", "true"]
ONE += ["--per_device_train_batch_size", "4", "--eval_strategy", "no", "--report_to", "none"]


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_recipe_names_two_teachers_and_its_dry_run_counts_their_rows(at_root, capsys, tmp_path):
    settings = parse_train(["--config", RECIPE])
    assert list(settings.opd.teacher_sources) == ["sums", "differences"]
    assert main(["train", "--config", RECIPE, "--dry_run", "--output_dir", str(tmp_path / "run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "teacher sums" in out and "teacher differences" in out and out.count("training prompts") >= 3
    assert "teachers' weights" in out and "one in memory" in out and "8 × FSDP2" in out
    assert not (tmp_path / "run").exists()


def test_unknown_labels_are_refused_by_row_also_in_a_dry_run(at_root, capsys, tmp_path):
    rows = [json.loads(line) for line in Path("recipes/several-teachers.jsonl").read_text().splitlines()]
    rows[3]["teacher"] = "chess"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config", RECIPE, "--task", f"math:{tmp_path}/rows.jsonl", "--train_size", "40"]
    for dry in (["--dry_run"], []):
        assert main(["train", *flags, "--output_dir", str(tmp_path / "run"), *dry]) != 0
        said = capsys.readouterr().err
        assert "rows.jsonl row " in said and "'chess'" in said and "differences, sums" in said
    assert not (tmp_path / "run").exists()


def test_quantization_without_bitsandbytes_names_the_extra(capsys, monkeypatch, tmp_path):
    real = optional.is_available
    monkeypatch.setattr(optional, "is_available", lambda module: module != "bitsandbytes" and real(module))
    flags = [*ONE, "--teacher_load_in_8bit", "true", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert main(["train", *flags]) != 0
    assert "effopd[quantization]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--teacher_dtype", "bfloat16"], "dtype float32 → bfloat16"),
        (["--teacher_model_name_or_path", "testbed:teacher"], None),
    ],
)
def test_a_dry_run_of_a_resumed_run_compares_the_teachers(flags, said, capsys, monkeypatch, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    write_manifest(checkpoint, [TeacherEntry("teacher", "elsewhere", None, "float32", None, "1" * 64)])
    monkeypatch.setattr(RunDir, "to_resume", lambda self, argument: checkpoint if argument else None)
    monkeypatch.setattr("effopd.launch.run_checks.check_kind", lambda *args, **kwargs: None)
    words = [*ONE, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "true", "--dry_run", *flags]
    status = main(["train", *words])
    assert (status == 0) == (said is None)
    assert said is None or said in capsys.readouterr().err


def test_the_recipe_trains_two_steps_through_its_command(at_root, tmp_path):
    flags = ["--max_steps", "2", "--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no"]
    assert main(["train", "--config", RECIPE, *flags, "--use_cpu", "true", "--output_dir", str(tmp_path)]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    labels = [each["label"] for each in json.loads((tmp_path / "teachers.json").read_text())["teachers"]]
    assert labels == ["differences", "sums"]


def test_columns_of_code_rows_are_kept(tmp_path):
    from effopd.tasks.code.rows import read_code_rows

    row = {"prompt": "Add.", "test_list": ["assert add(1, 2) == 3"], "source": {"name": "code"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    path = str(tmp_path / "rows.jsonl")
    assert read_code_rows(path, keep=("source.name",))[0].metadata["source.name"] == "code"
    assert "source.name" not in read_code_rows(path)[0].metadata
