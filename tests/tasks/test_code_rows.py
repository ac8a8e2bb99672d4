"""Code rows: shapes, prompts, programs of answers, comparison, limits and the command line; nothing
is run.
"""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import struct
import sys
import zlib
from decimal import Decimal
from fractions import Fraction

import pytest

from effopd.errors import SandboxError, TaskError
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.code import sandbox
from effopd.tasks.code.compare import same_output, same_value
from effopd.tasks.code.extract import extract_program
from effopd.tasks.code.guest.values import NotPlain, decode, encode
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.pool import Pool
from effopd.tasks.code.seccomp import seccomp_filter
from effopd.tasks.code.shapes import Unrecognized, problem_of
from effopd.tasks.code.verifier import PROBLEM

STDIN = [{"input": "1 2\n", "output": "3\n"}]
IN_OUT = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
CALLS = json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]})
LCB_CALL = json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}])
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(STDIN)))).decode()
HUMAN_EVAL = {
    "task_id": "HumanEval/0", "prompt": "import math\n\ndef add(a, b):\n    \"\"\"Sum.\"\"\"\n", "entry_point": "add",
    "canonical_solution": "    return a + b\n", "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}  # fmt: skip
MBPP = {
    "task_id": 11, "text": "Add two numbers.", "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "",
    "challenge_test_list": ["assert add([0, 0], []) == [0, 0]"],
}  # fmt: skip
MBPP_PLUS = {
    "prompt": "Add.", "test_imports": ["import math"], "test_list": ["assert add(1, 2) == 3"],
    "test": "for a, b in [(1, 2)]:\n    assert add(a, b) == a + b\n",
}  # fmt: skip
ROWS = {
    "HumanEval": (HUMAN_EVAL, ["add"], [{"tests": HUMAN_EVAL["test"] + "\n\ncheck(add)\n"}]),
    "MBPP": (MBPP, ["add"], [{"tests": test} for test in (*MBPP["test_list"], *MBPP["challenge_test_list"])]),
    "MBPP+": (MBPP_PLUS, ["add"], [{"tests": "import math\n" + MBPP_PLUS["test"]}]),
    "TACO/APPS": ({"question": "q", "input_output": IN_OUT}, [], STDIN),
    "TACO/APPS (calls)": ({"question": "q", "input_output": CALLS}, ["add"], [{"arguments": [1, 2], "output": [3]}]),
    "cases": ({"problem": "q", "tests": json.dumps([{"type": "stdin_stdout", **STDIN[0]}])}, [], STDIN),
    "Codeforces": (
        {"description": "q", "input_format": "i", "output_format": "o", "examples": STDIN, "official_tests": STDIN,
         "time_limit": 2.0, "memory_limit": 256.0}, [], STDIN,
    ),
    "CodeContests": ({"description": "q", "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
                      "time_limit": {"seconds": 1, "nanos": 500_000_000}, "memory_limit": 256_000_000}, [], STDIN),
    "LiveCodeBench": ({"question_content": "q", "public_test_cases": json.dumps(STDIN), "private_test_cases": PACKED,
                       "metadata": "{}"}, [], STDIN * 2),
    "LiveCodeBench (calls)": (
        {"question_content": "q", "public_test_cases": LCB_CALL, "metadata": '{"func_name": "add"}',
         "starter_code": "class Solution:\n    def add(self, a, b):\n"}, ["add"], [{"arguments": [1, 2], "output": 3}],
    ),
    "Eurus-2-RL": (
        {"data_source": "taco", "ability": "code", "prompt": [{"role": "user", "content": "q"}],
         "reward_model": {"ground_truth": IN_OUT, "style": "rule"}}, [], STDIN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", ROWS)
def test_shape(shape):
    row, entry, cases = ROWS[shape]
    problem = problem_of(row)
    assert (problem["shape"], problem.get("entry", []), problem["cases"]) == (shape, entry, cases)


def test_limits_of_rows():
    assert problem_of(ROWS["Codeforces"][0])["limits"] == {"seconds": 2.0, "memory_mb": 256.0}
    limits = problem_of(ROWS["CodeContests"][0])["limits"]
    assert limits["seconds"] == 1.5 and 244 < limits["memory_mb"] < 245
    row = {"input_output": IN_OUT}
    assert problem_of({**row, "time_limit": "2 seconds"})["limits"] == {"seconds": 2.0}
    assert problem_of({**row, "time_limit": "500 ms"})["limits"] == {"seconds": 0.5}
    assert problem_of({**row, "time_limit": float("inf"), "memory_limit": float("inf")})["limits"] == {}
    assert problem_of({**row, "checker": "print(1)"})["checker"] == "print(1)"
    assert Limits(memory_mb=512).for_row({"memory_mb": 256.0, "seconds": 2.0}) == Limits(memory_mb=512, seconds=2.0)


@pytest.mark.parametrize("row", [
    {"answer": "7"}, {"test_list": []}, {"input_output": "{"}, {"input_output": '{"inputs": ["1"], "outputs": []}'},
    {"tests": '[{"input": "1"}]'}, {"test_list": ["assert ("]}, {"tests": "7"},
    {"tests": '[{"type": "function_call", "input": "1", "output": "2"}]'},
    {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
    {"input_output": '{"fn_name": "f", "inputs": ["x("], "outputs": [1]}'},
    {"input_output": '{"inputs": ["\\ud800"], "outputs": ["1"]}'},
])  # fmt: skip
def test_unrecognized(row):
    with pytest.raises(Unrecognized):
        problem_of(row)


@pytest.fixture
def mixed(tmp_path):
    """One file with a row of each shape."""
    path = tmp_path / "mixed.jsonl"
    rows = [{"id": name, **row} for name, (row, _, _) in ROWS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_with_every_shape(mixed):
    task = load_task(TaskConfig(task=f"code:{mixed}", eval_size=0), "train")
    prompts = {example.id: example.prompt[-1]["content"] for example in task.examples}
    assert len(task) == len(ROWS) and task.verifiable
    assert prompts["HumanEval"].startswith("Please provide a self-contained Python script")
    assert "assert add(0, 0) == 0" in prompts["MBPP"] and "Example output\n3" in prompts["Codeforces"]
    assert "[0, 0]" not in prompts["MBPP"] and prompts["MBPP+"].endswith(
        '\n"""\nAdd.\nassert add(1, 2) == 3\n"""\n```'
    )
    assert "starter code" in prompts["LiveCodeBench (calls)"] and "`add`" in prompts["TACO/APPS (calls)"]
    assert (
        "from stdin" in prompts["TACO/APPS"]
        and prompts["cases"].startswith("### Question:\nq\n\n### Format: Read")
        and prompts["Eurus-2-RL"] == "q"
    )
    answers = {example.id: example.answer for example in task.examples if example.answer}
    assert set(answers) == {"HumanEval", "MBPP"} and answers["HumanEval"].endswith("return a + b\n")


def test_prompts_of_base_models_and_own_suffix(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(HUMAN_EVAL) + "\n" + json.dumps(MBPP) + "\n")
    plain = load_task(TaskConfig(task=f"code:{path}", eval_size=0, as_chat=False), "train")
    by_id = {example.id: example.prompt for example in plain.examples}
    assert by_id["HumanEval/0"] == HUMAN_EVAL["prompt"] and by_id["11"].startswith('"""\nAdd two numbers.')
    own = load_task(TaskConfig(task=f"code:{path}", eval_size=0, as_chat=False, prompt_suffix="!"), "train")
    assert {example.prompt for example in own.examples} == {HUMAN_EVAL["prompt"] + "!", "Add two numbers.!"}


def test_nothing_to_grade_needs_no_sandbox(mixed):
    task = load_task(TaskConfig(task=f"code:{mixed}", eval_size=0), "train", answers_required=False)
    assert not task.verifiable


def test_bad_rows_are_reported_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [MBPP, {"text": "q"}, {"test_list": ["assert f()"]}, {**MBPP, "text": " "}, {**MBPP}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=r"(?s)4 bad rows.*row 2.*row 3.*row 4.*row 5.*unique id"):
        load_task(TaskConfig(task=f"code:{path}", eval_size=0), "train")


@pytest.mark.parametrize(("completion", "program"), [
    ("x = 1", "x = 1"),
    ("", None),
    ("<think>```python\n1\n```</think>\n```python\n2\n```", "2\n"),
    ("<think>```python\n1\n```", None),
    ("```python\n1\n```\nthen\n```\n2\n```\nrun\n```bash\npython x.py\n```", "2\n"),
    ("```cpp\nint x;\n```", None),
    ("```python\nx = 1", "x = 1"),
    ("```py\r\nx = 1\r\n```\r\n", "x = 1\n"),
    ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
    ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
    ("use `x` and ```y``` inline\nx = 1", "use `x` and ```y``` inline\nx = 1"),
    ("1. Code:\n   ```Python3 main.py\n   1\n   ```", "1\n"),
    ("- \n\t```python\n\tif x:\n\n\t    y\n\t```", "if x:\n\n    y\n"),
    ("  ```python\nif x:\n    y\n  ```", "if x:\n    y\n"),
    ("  ```python\n  a\n  ```python\n  b", "b"),
    ("```python\na\n```\n```python\nb\n```\n```python\n```", "b\n"),
])  # fmt: skip
def test_program_of_an_answer(completion, program):
    assert extract_program(completion) == program


def same(value, expected) -> bool:
    return same_value(json.loads(json.dumps(encode(value))), expected)


def test_comparison_of_values():
    assert same([1, (2, 3.0000001)], [1, [2, 3.0]]) and same({1: "a", None: {}}, {"1": "a", "null": {}})
    assert same(float("nan"), float("nan")) and not same(10**400, 1.0) and same(10**400, 10**400)
    assert not same(1, True) and not same("1", 1) and not same([1], [1, 2]) and not same({1}, [1])
    assert not same({"a": 1}, {"a": 2}) and not same({(1,): 1}, {"(1,)": 1}) and not same({10**5000: 1}, {"1": 1})
    for malformed in ([], [1, 2], ["list", 3], ["dict", [3]], ["int", "x"]):
        with pytest.raises((ValueError, TypeError)):
            same_value(malformed, 10 if malformed[:1] == ["int"] else {"a": 1})


def test_comparison_of_outputs():
    assert same_output("nan", "nan") and not same_output("1e400", "1.0") and not same_output("1\n2", "1.0")
    assert not same_output("x 1.0", "y 1.0") and same_output("a 1.0000001", "a 1.0")
    assert not same_output("\u0663.0", "3.0") and same_output("3", "3.0") and same_output("+.5e1", "5.0")


@pytest.mark.parametrize("text", [
    "~" * 10**6 + "`", "```" + "a" * 10**6 + "`", "```" + " " * 10**6 + "`", "```\n" * 10**5, "1" * 10**6 + "x",
    "0." + "1" * 10**6, "1" * 10**6 + "e9x",
], ids=lambda text: text[:5])  # fmt: skip
def test_long_texts_take_linear_time(text):
    """Quadratic matching of a million characters takes hours."""
    extract_program(text)
    assert not same_output(text, "0.5")


@pytest.mark.parametrize("value", [
    None, True, 0, -(10**40), 1.5, Fraction(-7, 3), Decimal("1.50"),
    "\ud800é", b"\0", [1, [2]], (1,), {1, 2}, frozenset({3}), {(1, 2): [None]}, 1 + 2j,
    range(3, 9, 2), float("inf"),
])  # fmt: skip
def test_values_cross_unchanged(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


def test_only_built_in_types_cross():
    liar = type("Liar", (int,), {"__eq__": lambda self, other: True, "__hash__": int.__hash__})
    assert type(decode(encode(liar(3)))) is int
    for bad in (object(), [object()]):
        with pytest.raises(NotPlain):
            encode(bad)
    for bad in (
        {"a": 1},
        ["mine", 0],
        ["int", 5],
        ["Fraction", "1e9"],
        ["list", 3],
        ["dict", [[["list", []], 1]]],
        [1, 2, 3],
    ):
        with pytest.raises(NotPlain):
            decode(bad)


def verdict_of_filter(program: bytes, number: int, argument: int = 0, arch: int = 0xC000003E, flags: int = 0) -> int:
    """Run a filter on a system call, as the kernel does."""
    data = struct.pack("<iIQ6Q", number, arch, 0, argument, 0, 0, flags, 0, 0)
    lines = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        code, true, false, k = lines[at]
        if code == 0x06:
            return k
        if code == 0x20:
            value = struct.unpack_from("<I", data, k)[0]
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += true if holds else false
        at += 1


def test_the_system_call_filter():
    program = seccomp_filter("x86_64")
    refused, allowed = 0x00050001, 0x7FFF0000
    assert verdict_of_filter(program, 101) == verdict_of_filter(program, 41) == refused  # ptrace, socket
    assert verdict_of_filter(program, 0) == verdict_of_filter(program, 56) == allowed  # read, clone
    assert verdict_of_filter(program, 302) == allowed and verdict_of_filter(program, 302, 1) == refused  # prlimit64
    assert verdict_of_filter(program, 56, 0x11) == allowed and verdict_of_filter(program, 435) == 0x00050026  # clone3
    assert {verdict_of_filter(program, 56, 0x11 | 1 << bit) for bit in (17, *range(25, 31))} == {refused}
    assert verdict_of_filter(program, 0x40000000 + 101) == refused
    assert verdict_of_filter(program, 9, flags=0x22) == allowed  # mmap: private
    assert {verdict_of_filter(program, 9, flags=kind) for kind in (0x21, 0x1, 0x3)} == {refused}  # shared
    assert verdict_of_filter(program, 456) == allowed and verdict_of_filter(program, 457) == 0x00050026  # unknown
    assert verdict_of_filter(program, 154) == refused and verdict_of_filter(program, 188) == refused
    assert verdict_of_filter(program, 0, arch=0x40000003) == 0x80000000
    assert seccomp_filter("aarch64") and seccomp_filter("riscv64") is None


def test_command_line(monkeypatch):
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: "/usr/bin/bwrap")
    for user, count in ((1000, 1), (0, 2)):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        line = sandbox.command(Limits(folder_mb=3), ["json"], 7, 8)
        assert line.count("/usr/bin/bwrap") == count
        inner = line[len(line) - line[::-1].index("/usr/bin/bwrap") :]
        for flag in ("--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "--clearenv", "--as-pid-1"):
            assert flag in inner
        assert inner[inner.index("--size") + 1] == str(3 << 20) and inner[inner.index("--seccomp") + 1] == "8"
        assert "/packages/json" in inner and "--proc" not in inner and "/home" not in inner and "main(7)" in inner[-1]


@pytest.mark.parametrize("why", ["missing", "refused", "not Linux"])
def test_without_a_sandbox_nothing_runs(why, monkeypatch, tmp_path):
    if why == "missing":
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    elif why == "not Linux":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: str(fake))
    pool = Pool(Limits(), 2)
    with pytest.raises(SandboxError, match=r"(?s)(bwrap|namespace|Linux).*(apt-get install bubblewrap).*runner"):
        pool.map(lambda run, _: run("program", [{"program": "open('/tmp/ran', 'w')"}], pool.limits), [None] * 3)


def test_example_keys_are_json():
    problem = problem_of(HUMAN_EVAL)
    assert json.loads(json.dumps({PROBLEM: problem}))[PROBLEM] == problem
