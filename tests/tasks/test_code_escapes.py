"""Attempts to escape from the sandbox are contained: no false pass, and the next grade is right."""

from __future__ import annotations

import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from effopd.errors import SandboxError
from effopd.tasks.code.execution import _pipe, resident_bytes
from effopd.tasks.code.grade import Rules, grade
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.pool import Pool

_SECTION = re.compile(r"^### (\w+) \| (\w+) \| ([\w ]+?)(?: \| (slow))?\n(.*?)\n(?=###|\Z)", re.MULTILINE | re.DOTALL)
SCRIPT = {"shape": "cases", "cases": [{"input": "1 2\n" * 1000, "output": "42"}]}
FUNCTION = {
    "shape": "MBPP",
    "cases": [{"tests": "assert abs(f(1) - 42) < 1e-9 and f(1) == 42 and math.isclose(f(1), 42)"}],
    "entry": ["f"],
}
PROBLEMS = {"script": SCRIPT, "function": FUNCTION}
RIGHT = {"script": "print(42)", "function": "def f(x): return 42"}


class Escape(NamedTuple):
    name: str
    mode: str
    verdicts: list[str]
    slow: bool
    source: str


def read_escapes() -> list[Escape]:
    text = (Path(__file__).parent / "code_escapes.txt").read_text()
    return [Escape(m[1], m[2], m[3].split(), bool(m[4]), m[5]) for m in _SECTION.finditer(text)]


ESCAPES = read_escapes()
NULL = Escape("null_in_source", "script", ["error"], False, "print(42)\0")
SURROGATE = Escape("surrogate_in_source", "script", ["error"], False, "print('\ud800')")


#: Wall-clock seconds of programs that must be stopped, and of all others, on a busy machine.
SHORT, LONG = 0.4, 10.0


@pytest.fixture(scope="module")
def pool():
    os.environ["SECRET_OF_THE_GRADER"] = "secret"
    pool = Pool(LIMITS, workers=1, packages=["numpy"])
    try:
        pool.map(lambda run, _: run("program", [{"program": ""}], pool.limits), [None])
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
    yield pool
    pool.close()
    del os.environ["SECRET_OF_THE_GRADER"]


LIMITS = Limits(seconds=LONG, memory_mb=256, processes=12, folder_mb=8, file_mb=4, output_mb=1)


def graded(pool: Pool, programs: list[tuple[str, dict, float]]):
    def one(run, item):
        program, problem, seconds = item
        return grade(program, problem, run, replace(pool.limits, seconds=seconds), Rules())

    return pool.map(one, programs)


def params(escapes):
    return [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.slow else []) for e in escapes]


@pytest.mark.parametrize("escape", params([*ESCAPES, NULL, SURROGATE]))
def test_escape(pool, escape):
    mode, program, problem = escape.mode, escape.source, PROBLEMS.get(escape.mode)
    if problem is None:
        tests, _, program = program.partition("\n---\n")
        mode, problem = "function", {"shape": "MBPP", "cases": [{"tests": tests}], "entry": ["f"]}
    seconds = SHORT if "timeout" in escape.verdicts else LONG
    tried, after = graded(pool, [(program, problem, seconds), (RIGHT[mode], PROBLEMS[mode], LONG)])
    assert tried.verdict in escape.verdicts and tried.detail.isprintable(), tried
    assert after.verdict == "passed", after


@pytest.mark.parametrize("value", [
    """'["Fraction", "1e999999999"]'""", """'["Fraction", ["0x1", "0x0"]]'""", """'["set", [[]]]'""", """'{"a": 1}'""",
    "'[' * 10 ** 5", "'9' * 9999", "'NaN'", """json.dumps(["dict", [[["int", hex(10 ** 5000)], 1]]])""",
    """json.dumps(["set", [["int", hex((2 ** 61 - 1) * (k + 2 ** 20))] for k in range(20000)]])""",
], ids=range(9))  # fmt: skip
def test_forged_values_do_no_harm(pool, value):
    """A called program can write any text as its result: building the value could take hours."""
    program = f"import json, os\ndata = ({value}).encode()\nwhile data: data = data[os.write(4, data):]\nos._exit(0)"
    problem = {"shape": "cases", "cases": [{"arguments": [1], "output": {"a": 1}}], "entry": ["f"]}
    (tried,) = graded(pool, [(program, problem, LONG)])
    assert tried.verdict in ("wrong", "error")


def test_a_writer_in_another_process_does_not_hold_the_grader():
    readers: dict = {}
    writer = _pipe(readers, "stdout", 100)
    os.write(writer, b"42")
    ((descriptor, reader),) = readers.items()
    reader.drain()
    assert reader.text() == "42"
    os.close(writer)
    os.close(descriptor)


def test_nothing_is_left(pool):
    """After a case the sandbox has one process; after the pool is closed there is none."""
    graded(pool, [("import os\nif os.fork(): print(42)\nelse:\n  while True: pass", SCRIPT, LONG)])
    holder = pool._idle.get()
    assert holder is not None
    process = holder.process.pid
    assert resident_bytes(process) < LIMITS.memory_mb << 20
    assert sum(1 for _ in descendants(process)) <= 4
    pool._idle.put(holder)
    pool.close()
    assert not list(descendants(process))


def descendants(process: int):
    """Processes below a process, and the process itself."""
    pending = [process]
    while pending:
        folder = Path(f"/proc/{pending.pop()}")
        if folder.exists():
            yield folder
            for task in (folder / "task").iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]


def test_the_pool_restarts_after_a_crash(pool):
    graded(pool, [(RIGHT["script"], SCRIPT, LONG)])
    sandbox = pool._idle.get()
    assert sandbox is not None
    os.kill(sandbox.process.pid, signal.SIGKILL)
    pool._idle.put(sandbox)
    before = pool.restarts
    assert [g.verdict for g in graded(pool, [(RIGHT["script"], SCRIPT, LONG)] * 2)] == ["passed"] * 2
    assert pool.restarts == before + 1


def test_a_thread_that_ends_does_not_end_the_sandbox(pool):
    for _ in range(2):
        thread = threading.Thread(target=graded, args=(pool, [(RIGHT["script"], SCRIPT, LONG)]))
        before = pool.restarts
        thread.start()
        thread.join()
    assert pool.restarts == before


def test_the_list_is_read_whole():
    text = (Path(__file__).parent / "code_escapes.txt").read_text()
    assert len(ESCAPES) == text.count("\n### ") >= 60
