"""A long loop says where it is: a bar on a terminal, lines without one."""

from __future__ import annotations

import io

import pytest

from effopd.common import progress
from effopd.common.progress import Counted


class Stream(io.StringIO):
    flushed = 0

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def flush(self):
        self.flushed += 1


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_now_and_then(clock, monkeypatch):
    stream = Stream(terminal=False)
    monkeypatch.setattr("sys.stderr", stream)
    with Counted(256, "chain_sum", "answer") as bar:
        for _ in range(4):
            clock[0] += 3
            bar.update(32)
        assert stream.getvalue() == "chain_sum: 64/256 answers, 6 s, about 18 s left\n" and stream.flushed
        bar.about("second")
        clock[0] += 30
        bar.update(64)
    assert stream.getvalue().splitlines()[1:] == ["second: 192/256 answers, 42 s, about 14 s left"]


def test_what_was_done_before_says_nothing_about_the_pace(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", Stream(terminal=False))
    bar = Counted(10, "points", "point", done=6)
    bar.update(2)
    assert bar.line(20.0) == "points: 8/10 points, 20 s, about 20 s left"
    assert Counted(4, "analyze", "matrix", done=4).line(7.0) == "analyze: 4/4 matrices, 7 s"


def test_units_of_different_work_are_weighted(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", Stream(terminal=False))
    bar = Counted(10, "analyze", "matrix", done=1, share=0.5)
    bar.update(1, share=0.9)
    assert bar.line(20.0) == "analyze: 2/10 matrices, 20 s, about 5 s left"


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    stream = Stream(terminal=True)
    monkeypatch.setattr("sys.stderr", stream)
    with Counted(3, "points", "point") as bar:
        for _ in range(3):
            bar.update()
    assert "100%" in stream.getvalue() and "left" not in stream.getvalue()
