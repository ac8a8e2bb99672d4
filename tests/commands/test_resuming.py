"""`--config FOLDER/config.yaml --resume_from_checkpoint true` resumes the run of that folder."""

from __future__ import annotations

import pytest
import yaml

from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_train
from effopd.errors import ConfigError

SETTINGS = {"model_name_or_path": "testbed:student", "task": "testbed:chain_sum", "use_cpu": True}
PAIR = SETTINGS | {"teacher_model_name_or_path": "testbed:teacher"}
COMMANDS = {"train": (parse_train, PAIR), "rl": (parse_rl, SETTINGS)}
RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture(params=COMMANDS)
def command(request):
    return request.param


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """The folder of a run that was started in `a`; the working directory is `b`."""
    root = tmp_path / "a" / "runs" / "h1"
    (root / "checkpoints" / "step-000002").mkdir(parents=True)
    (root / "config.yaml").write_text(yaml.safe_dump(COMMANDS[command][1] | {"output_dir": "runs/h1"}))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    return root


def output_dir(command, *flags):
    settings = COMMANDS[command][0](flags)
    return (settings.opd if command == "train" else settings.rl).output_dir


def test_from_another_directory_it_is_refused(command, run, tmp_path, capsys):
    assert main([command, "--config", "../a/runs/h1/config.yaml", *RESUME, "--dry_run"]) == 2
    message = capsys.readouterr().err
    assert f"the folder of a run, {run} (step-000002)" in message
    assert f"output_dir runs/h1 is another folder, {tmp_path / 'b' / 'runs' / 'h1'}." in message
    assert f"`cd {tmp_path / 'a'}` first, or add --output_dir {run}." in message
    assert not list((tmp_path / "b").iterdir())


def test_every_yaml_file_of_the_folder_counts(command, run):
    (run / "config.yaml").rename(run / "settings.yaml")
    (run / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"settings\.yaml lies in the folder of a run"):
        COMMANDS[command][0](["--config", "../a/runs/h1/settings.yaml", *RESUME])


def test_a_run_that_was_moved_is_refused_without_a_directory_to_change_to(command, run, tmp_path):
    moved = run.rename(tmp_path / "a" / "runs" / "h2")
    with pytest.raises(ConfigError, match=f"To resume the run, add --output_dir {moved}"):
        COMMANDS[command][0](["--config", str(moved / "config.yaml"), *RESUME])


def test_the_run_of_the_folder_and_a_folder_that_is_named_are_accepted(command, run, tmp_path, monkeypatch):
    there = ("--config", "../a/runs/h1/config.yaml")
    assert output_dir(command, *there, *RESUME, "--output_dir", str(run)) == str(run)
    assert output_dir(command, *there, *RESUME, "--output_dir", "again") == "again"  # another run, queued repeatedly
    assert output_dir(command, *there) == output_dir(command, *there, "--resume_from_checkpoint", "false") == "runs/h1"
    monkeypatch.chdir(tmp_path / "a")
    assert output_dir(command, "--config", "runs/h1/config.yaml", *RESUME) == "runs/h1"
    (tmp_path / "c").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "c")
    assert output_dir(command, "--config", str(run / "config.yaml"), *RESUME) == "runs/h1"


def test_a_yaml_file_elsewhere_may_name_any_folder(command, run):
    (run / "checkpoints" / "step-000002").rmdir()  # the file lies in a folder without a run
    assert output_dir(command, "--config", "../a/runs/h1/config.yaml", *RESUME) == "runs/h1"
