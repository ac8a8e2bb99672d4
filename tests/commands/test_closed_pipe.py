"""A command whose output is a pipe without a reader ends with status 141 and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from effopd.commands import main as module

#: A command of each way of printing, as the body of a function.
WAYS = {
    "buffered until the end": "print('a line')",
    "more than a buffer at once": "print('x' * 100_000)",
    "many lines": "[print('a line') for _ in range(10_000)]",
    "argparse": "import argparse; argparse.ArgumentParser().parse_args(['--help'])",
    "rich": "from rich.console import Console; Console().print('a line')",
    "tqdm": "from tqdm.auto import tqdm; tqdm.write('a line')",
}
CODE = """
import sys
from effopd.commands import main as module
def command(argv):
    {body}
    return {status}
module.COMMANDS["doctor"] = (command, "")
sys.exit(module.main(["doctor"]))
"""


def unread(argv, stdout=True, stderr=False, unbuffered="") -> tuple[int, str]:
    """Exit status and standard error of a process; the pipes that are `True` have no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, *argv],
            stdout=writer if stdout else subprocess.PIPE,
            stderr=writer if stderr else subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writer)
    return result.returncode, result.stderr or ""


@pytest.mark.parametrize("body", WAYS.values(), ids=WAYS)
def test_every_way_of_printing(body):
    assert unread(["-c", CODE.format(body=body, status=0)]) == (141, "")


def test_without_a_buffer():
    assert unread(["-c", CODE.format(body="print('a line')", status=0)], unbuffered="1") == (141, "")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["methods"], ["report", "--help"]])
def test_commands(words):
    assert unread(["-m", "effopd", *words]) == (141, "")


@pytest.mark.slow
def test_doctor():
    assert unread(["-m", "effopd", "doctor"]) == (141, "")


def test_both_streams_and_the_error_alone():
    code = CODE.format(body="print('a line', file=sys.stderr)", status=0)
    assert unread(["-c", code], stderr=True)[0] == unread(["-c", code], stdout=False, stderr=True)[0] == 141


def test_a_status_that_says_more_is_kept():
    assert unread(["-c", CODE.format(body="print('a line')", status=143)]) == (143, "")


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def broken(argv):
        raise BrokenPipeError("the reader of another pipe is gone")

    monkeypatch.setitem(module.COMMANDS, "doctor", (broken, ""))
    with pytest.raises(BrokenPipeError, match="another pipe"):
        module.main(["doctor"])
    status, said = unread(["-c", CODE.format(body="raise BrokenPipeError", status=0)], stdout=False)
    assert status == 1 and "Traceback" in said
