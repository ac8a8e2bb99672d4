"""Help that was rendered once is read from disk; a cache that cannot be used costs time and nothing
else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effopd.commands import help_cache
from effopd.commands.help_cache import asks_for_help, help_text


class Command:
    """Prints a text and exits, as argparse does; counts how often."""

    def __init__(self, text: str = "usage: …\n", status: int = 0):
        self.text, self.status, self.calls = text, status, 0

    def __call__(self):
        self.calls += 1
        print(self.text, end="")
        raise SystemExit(self.status)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "effopd" / "help"


def test_a_text_is_rendered_once():
    command = Command()
    assert [help_text(("train", "-h"), command) for _ in range(3)] == ["usage: …\n"] * 3
    assert command.calls == 1


@pytest.mark.parametrize("changed", ["flag", "width", "code", "transformers"])
def test_what_decides_the_text_has_a_text_of_its_own(monkeypatch, changed):
    command, argv = Command(), ("train", "-h")
    help_text(argv, command)
    if changed == "flag":
        argv = ("train", "--help")
    elif changed == "width":
        monkeypatch.setenv("COLUMNS", "120")
    elif changed == "code":
        monkeypatch.setattr(help_cache, "code", lambda: "other")
    else:
        monkeypatch.setattr(help_cache, "versions", lambda names: {"transformers": "99"})
    help_text(argv, command)
    assert command.calls == 2


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    command = Command()
    assert help_text(("train", "-h"), command) == help_text(("train", "-h"), command) == command.text
    assert command.calls == 2


def test_nor_is_one_without_a_home(monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert help_text(("train", "-h"), Command()) == "usage: …\n"


def test_a_command_that_fails_is_not_kept(cache):
    for _ in range(2):
        with pytest.raises(SystemExit):
            help_text(("train", "-h"), Command(status=2))
    assert not cache.exists()


@pytest.mark.slow
def test_old_texts_go(cache):
    for i in range(help_cache.KEPT + 3):
        help_text(("train", "-h", str(i)), Command())
    assert len(list(cache.iterdir())) == help_cache.KEPT


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["-h"], True),
        (["--help"], True),
        (["--algorithm", "dapo", "-h"], True),
        ([], False),
        (["--config", "run.yaml", "-h"], False),  # the file decides what is printed
        (["-h", "--max_steps"], False),
    ],
)
def test_arguments_that_ask_for_help_alone(argv, answer):
    assert asks_for_help(argv) == answer


@pytest.mark.parametrize("argv", [("train", "-h"), ("rl", "-h"), ("rl", "--algorithm", "dapo", "--help")])
def test_a_kept_text_needs_neither_torch_nor_transformers(argv):
    help_text(argv, Command("kept\n"))
    code = (
        "import sys\nfrom effopd.commands.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, [name for name in ('torch', 'transformers', 'trl', 'yaml') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=os.environ)
    assert result.stdout == "kept\n0 []\n", result.stderr
