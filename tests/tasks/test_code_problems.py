"""Programs with known verdicts: 20 on standard input and output, and every other kind of case."""

from __future__ import annotations

import os
import pickle

import pytest

from effopd.errors import SandboxError, TaskError
from effopd.tasks.base import Example, Task
from effopd.tasks.code.execution import _end_of
from effopd.tasks.code.guest.programs import NO_MEMORY
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.sandbox import package_mounts
from effopd.tasks.code.verifier import PROBLEM, CodeVerifier

SUM = "print(sum(map(int, input().split())))"
#: name, program, input, expected output, settings, verdict
PROBLEMS = [
    ("sum", SUM, "1 2", "3", {}, "passed"),
    ("sum of another line", SUM, "1 2\n5", "8", {}, "wrong"),
    ("no newline at the end", "print(3, end='')", "", "3\n", {}, "passed"),
    ("trailing blanks", "print('1 2  ')\nprint('3\\t')\nprint()", "", "1 2\n3", {}, "passed"),
    ("leading blanks", "print('  1')", "", "1", {}, "wrong"),
    ("blank line inside", "print('1\\n\\n2')", "", "1\n2", {}, "wrong"),
    ("other lines, as words", "print('1\\n\\n2')", "", "1 2", {"whitespace": "words"}, "passed"),
    ("newline, exactly", "print(3)", "", "3", {"whitespace": "exact"}, "wrong"),
    ("Windows lines", "print(input() == 'a', end='\\r\\n')", "a\n", "True", {}, "passed"),
    ("float within", "print(1 / 3)", "", "0.33333333", {}, "passed"),
    ("float outside", "print(0.3334)", "", "0.33333333", {}, "wrong"),
    ("float, large and relative", "print(1e9 + 100)", "", "1000000000.0", {}, "passed"),
    ("float, exponent", "print('1e-3')", "", "0.001", {}, "passed"),
    ("float, tolerance 0", "print(0.1 + 0.2)", "", "0.3", {"float_tolerance": 0}, "wrong"),
    ("whole number as float", "print(3.0)", "", "3", {}, "wrong"),
    ("long whole number", "print(10 ** 30 + 1)", "", str(10**30), {}, "wrong"),
    ("Yes is not YES", "print('Yes')", "", "YES", {}, "wrong"),
    ("mentioned packages are warm", "import sys\nprint('numpy' in sys.modules)", "", "True", {}, "passed"),
    ("a script's file", "import os, sys\nprint(os.path.basename(__file__) == sys.argv[0])", "", "True", {}, "passed"),
    ("leaving early", "print(3)\nexit()\nprint(4)", "", "3", {}, "passed"),
    ("leaving early with a status", "print(3)\nquit(1)", "", "3", {}, "error"),
    ("an exception after the answer", "print(3); 1 / 0", "", "3", {}, "error"),
    ("a class in a script", "if __name__ == '__main__':\n    import sys\n    print(len(sys.stdin.readlines()))",
     "a\nb\n", "2", {}, "passed"),
    ("same order of sets everywhere", "import sys\nprint(sys.flags.hash_randomization)", "", "0", {}, "passed"),
    ("end of input", "input()", "", "", {}, "error"),
    ("endless", "while True: pass", "", "3", {}, "timeout"),
    ("too much memory", "x = bytearray(1 << 30)", "", "3", {"memory_mb": 256}, "memory"),
    ("too much memory, signals ignored", "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, "
     "signal.SIGSTOP}:\n  signal.signal(s, signal.SIG_IGN)\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.Signals)\n"
     "x = bytearray(1 << 30)", "", "3", {"memory_mb": 256}, "memory"),
    ("leaving with status 77", "print(3)\nraise SystemExit(77)", "", "3", {}, "error"),
]  # fmt: skip
#: Tests that a program passes or not: name, program, tests of the row, verdict.
OTHERS = [
    ("call", "def f(a, b): return (a + b, [b])", {"arguments": [1, 2], "output": [3, [2]]}, "passed"),
    ("call, wrapped output", "def f(a): return a", {"arguments": [[1]], "output": [[1]]}, "passed"),
    ("method of Solution", "class Solution:\n  def f(self, a): return a + 1.0",
     {"arguments": [1], "output": 2}, "passed"),
    ("call, names that sites provide",
     "class Solution:\n  def f(self, a: List[int]) -> Optional[int]: return max(Counter(a).values() or [math.inf])",
     {"arguments": [[1, 1]], "output": 2}, "passed"),
    ("call, own names first", "def f(a): return pow(a, 2, 5) + sum(map(gcd, [4]))\ndef gcd(a): return a",
     {"arguments": [3], "output": 8}, "passed"),
    ("assertions, no names provided", "def f(a: List[int]): return 1", {"tests": "assert f([]) == 1"}, "error"),
    ("call, True is not 1", "def f(a): return 1", {"arguments": [1], "output": True}, "wrong"),
    ("call, missing", "def g(a): return 1", {"arguments": [1], "output": 1}, "error"),
    ("call, long number", "def f(a): return 10 ** 5000", {"arguments": [1], "output": 1}, "wrong"),
    ("call, long number as key", "def f(a): return {10 ** 5000: 1}", {"arguments": [1], "output": {"1": 1}}, "wrong"),
    ("call, leaving with status 77", "def f(a): exit(77)", {"arguments": [1], "output": 1}, "error"),
    ("call, too much memory", "def f(a): return bytearray(1 << 31)", {"arguments": [1], "output": 1}, "memory"),
    ("assertions, leaving with status 77", "import os\ndef f(a): os._exit(77)", {"tests": "assert f(2)"}, "error"),
    ("assertions, too much memory", "x = bytearray(1 << 31)", {"tests": "assert f(2) == 4"}, "memory"),
    ("assertions, memory of a call", "def f(a): bytearray(1 << 31)", {"tests": "assert f(2) == 4"}, "memory"),
    ("call, set", "def f(a): return {1}", {"arguments": [1], "output": [1]}, "wrong"),
    ("call, dictionary", "def f(a): return {1: (2, None)}", {"arguments": [1], "output": {"1": [2, None]}}, "passed"),
    ("call, no plain value", "def f(a): return f", {"arguments": [1], "output": 1}, "error"),
    ("assertions", "def f(a):\n  return a * 2", {"tests": "assert f(2) == 4\nassert f([1]) == [1, 1]"}, "passed"),
    ("assertion fails", "def f(a): return a", {"tests": "assert f(2) == 4, 'two'"}, "wrong"),
    ("in place", "def f(a): a.sort()", {"tests": "x = [2, 1]\nf(x)\nassert x == [1, 2]"}, "passed"),
    ("function as an argument", "def f(g): return g(3)", {"tests": "assert f(lambda n: n + 1) == 4"}, "passed"),
    ("iterator as an argument", "def f(g): return sum(g)", {"tests": "assert f(iter([1, 2])) == 3"}, "passed"),
    ("exceptions", "def f(a): raise ValueError(a)",
     {"tests": "try:\n  f(1)\n  assert False\nexcept ValueError as error:\n  assert str(error) == '1'"}, "passed"),
    ("generator", "def f(n):\n  for i in range(n): yield i", {"tests": "assert list(f(3)) == [0, 1, 2]"}, "passed"),
    ("class", "class f:\n  def __init__(self): self.n = []\n  def add(self, x): self.n.append(x); return self",
     {"tests": "s = f()\ns.add(1).add(2)\nassert s.n == [1, 2]"}, "passed"),
    ("sets and tuples", "def f(): return {(1, 2): {3}, None: b'4', 5j: range(2)}",
     {"tests": "assert f() == {(1, 2): {3}, None: b'4', 5j: range(2)}"}, "passed"),
    ("names of the library", "from collections import Counter\ndef f(a): return Counter(a)",
     {"tests": "assert f('aa') == Counter('aa') and math.isclose(f('aa')['a'], 2)"}, "passed"),
    ("numpy", "import numpy\ndef f(a): return numpy.array(a) + numpy.float32(1)",
     {"tests": "import numpy as np\nassert np.allclose(f([1, 2]), [2, 3]) and f([1]) == [2]"}, "passed"),
    ("keyword arguments", "def f(a, *, b=1): return a - b", {"tests": "assert f(3, b=2) == 1"}, "passed"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grader():
    verifiers: dict[str, CodeVerifier] = {}

    def verdict(program: str, problem: dict, settings: dict | None = None, seconds: float = 10.0):
        settings = {"workers": 1, **(settings or {})}
        verifier = verifiers.setdefault(f"{settings}{seconds}", CodeVerifier(settings, seconds))
        try:
            return verifier.grade_batch([program], [Example("0", "q", None, {PROBLEM: problem})])[0]
        except SandboxError as error:
            pytest.skip(f"no sandbox here: {error}")

    yield verdict
    for verifier in verifiers.values():
        verifier.pool.close()


@pytest.mark.parametrize(("program", "given", "output", "settings", "verdict"), [p[1:] for p in PROBLEMS],
                         ids=[p[0] for p in PROBLEMS])  # fmt: skip
def test_script(grader, program, given, output, settings, verdict):
    problem = {"shape": "cases", "cases": [{"input": given, "output": output}]}
    grading = grader(program, problem, settings, 0.4 if verdict == "timeout" else 10.0)
    assert (grading.verdict, grading.score) == (verdict, float(verdict == "passed")), grading


@pytest.mark.parametrize(("program", "case", "verdict"), [p[1:] for p in OTHERS], ids=[p[0] for p in OTHERS])
def test_function(grader, program, case, verdict):
    grading = grader(program, {"shape": "cases", "cases": [case], "entry": ["f"]})
    assert grading.verdict == verdict, grading


@pytest.mark.parametrize(("program", "verdict"), [
    ("class Solution:\n  def merge(self, a): return a", "passed"), ("def sort(a): return a", "error"),
    ("from heapq import merge", "error"),
], ids=["method", "missing", "own import"])  # fmt: skip
def test_a_provided_name_is_no_answer(grader, program, verdict):
    problem = {"shape": "cases", "cases": [{"arguments": [1], "output": 1}], "entry": ["merge"]}
    assert grader(program, problem).verdict == verdict


@pytest.mark.parametrize(("program", "verdict"), [
    ("    return math.floor(a) + b\n\nprint(add(1, 2))\nand so", "passed"),
    ("\treturn a", "error"),
    ("    return a", "wrong"),
    ("from __future__ import annotations\ndef add(a, b):\n    return math.floor(a) + b", "passed"),
    ("a = 1", "wrong"),
])  # fmt: skip
def test_a_prompt_that_the_answer_completes(grader, program, verdict):
    prompt = 'import math\n\ndef add(a, b):\n    """Sum."""\n'
    tests = "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)"
    problem = {"shape": "HumanEval", "before": prompt, "entry": ["add"], "cases": [{"tests": tests}]}
    assert grader(program, problem).verdict == verdict


def test_no_exit_status_is_a_memory_fault():
    ends = {_end_of({"files": False, "status": [status], "cpu": 0.0}, Limits()) for status in range(1, 256)}
    assert ends == {"error"}
    assert _end_of({"files": False, "status": [NO_MEMORY], "cpu": 0.0}, Limits()) == "memory"


def test_share_of_cases_and_the_first_failure(grader):
    cases = [{"input": str(n), "output": "1"} for n in (1, 2, 1)]
    grading = grader("print(input())", {"shape": "cases", "cases": cases}, {"score": "share"})
    assert grading.score == pytest.approx(2 / 3) and grading.verdict == "wrong" and "case 2 of 3" in grading.detail


@pytest.mark.parametrize("checker", [
    "def check(given, expected, output):\n    return sum(map(int, output.split())) == int(given)",
    "import sys\na, b, c = (open(n).read() for n in sys.argv[1:])\nprint(int(sum(map(int, c.split())) == int(a)))",
])  # fmt: skip
def test_several_right_answers_through_a_checker(grader, checker):
    problem = {"shape": "cases", "cases": [{"input": "5", "output": "2 3"}], "checker": checker}
    assert [grader(f"print('{text}')", problem).verdict for text in ("1 4", "5 0", "1 1")] == ["passed"] * 2 + [
        "wrong"
    ]
    assert grader("print('x')", problem).verdict == "error"  # the checker itself failed


def test_a_row_has_its_own_time_limit(grader):
    problem = {"shape": "cases", "cases": [{"input": "", "output": ""}], "limits": {"seconds": 0.2}}
    assert grader("import time; time.sleep(9)", problem).verdict == "timeout"


def test_cases_do_not_share_state(grader):
    program = "import os\nprint(len(os.listdir('/tmp')))\nopen('/tmp/x', 'w').close()"
    assert grader(program, {"shape": "cases", "cases": [{"input": "", "output": "0"}] * 2}).verdict == "passed"


def test_no_program_is_refused_without_a_sandbox():
    verifier = CodeVerifier()
    gradings = verifier.grade_batch(
        ["", "```cpp\nint x;\n```"], [Example("0", "q", None, {PROBLEM: {"cases": []}})] * 2
    )
    assert [g.verdict for g in gradings] == ["refused"] * 2


def test_a_verifier_is_picklable():
    verifier = CodeVerifier({"score": "share", "processes": 9}, 2.0)
    copy = pickle.loads(pickle.dumps(verifier))
    assert (copy.limits, copy.rules) == (verifier.limits, verifier.rules)


def remote(mode, request):
    """A runner that knows two answers."""
    if mode == "program":
        return {"end": "done", "stdout": request["stdin"]}
    return {"end": "done", "result": '{"verdict": "passed", "detail": ""}'}


def test_a_remote_runner(monkeypatch):
    monkeypatch.syspath_prepend(str(__file__).rpartition("/")[0])
    verifier = CodeVerifier({"runner": "test_code_problems:remote"})
    problems = [{"cases": [{"input": "4", "output": "4"}]}, {"cases": [{"input": "4", "output": "5"}]}]
    problems.append({"cases": [{"tests": "assert f() == 1"}], "entry": ["f"]})
    task = Task("code:x", tuple(Example(str(i), "q", None, {PROBLEM: p}) for i, p in enumerate(problems)), verifier)
    gradings = task.grade_batch(["x"] * 3, task.examples)
    assert [g.verdict for g in gradings] == ["passed", "wrong", "passed"]


@pytest.mark.parametrize("answer", [
    None, {"end": "fine"}, {"end": "done", "stdout": b"4"}, {"end": "done", "status": 0}, OSError("no connection"),
], ids=repr)  # fmt: skip
def test_a_faulty_remote_runner_is_named(answer, monkeypatch):
    def faulty(mode, request):
        if isinstance(answer, Exception):
            raise answer
        return answer

    verifier = CodeVerifier()
    monkeypatch.setattr(verifier, "_runner", faulty)
    example = Example("0", "q", None, {PROBLEM: {"cases": [{"input": "", "output": ""}]}})
    with pytest.raises(TaskError, match="runner: expected"):
        verifier.grade_batch(["x"], [example])


def test_packages_are_folders_or_files():
    mounts = package_mounts(["numpy", "threadpoolctl"])
    assert {"/packages/numpy", "/packages/threadpoolctl.py"} <= set(mounts.values()) and all(
        map(os.path.exists, mounts)
    )


@pytest.mark.parametrize("settings", [
    {"packages": ["no_module_like_this"]}, {"packages": ["../numpy"]},
    {"score": "most"}, {"whitespace": "some"}, {"float_tolerance": -1}, {"workers": 0}, {"packages": "numpy"},
    {"memory_mb": 1}, {"processes": 1.5}, {"total_seconds": 0}, {"runner": "no_module_like_this:f"}, {"runner": "x"},
])  # fmt: skip
def test_settings_are_checked(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        CodeVerifier(settings)
