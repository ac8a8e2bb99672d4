"""Verdict and score of one answer: its program on the cases of a row."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effopd.tasks.base import Grading
from effopd.tasks.code.compare import same_output, same_value
from effopd.tasks.code.execution import Outcome
from effopd.tasks.code.extract import completed, refusal
from effopd.tasks.code.guest.values import decode, encode
from effopd.tasks.code.limits import Limits

#: `run(mode, jobs, limits, stdin, seconds)` → `Outcome`; see `effopd.tasks.code.execution.execute`.
Run = Callable[..., Outcome]
#: Characters up to which a returned value is built to print it; all types print so few quickly.
_SHOWN = 500
#: End of a case → verdict, for ends that are no answer.
_BAD_ENDS = {
    "error": "error", "timeout": "timeout", "memory": "memory", "output": "error", "files": "error", "lost": "error",
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How the results of cases become a grade.

    Attributes:
        score: "all": 1 if every case passed, otherwise 0; "share": the share of passed cases.
        whitespace, tolerance: see `same_output`.
    """

    score: str = "all"
    whitespace: str = "lines"
    tolerance: float = 1e-6


def grade(program: str | None, problem: Mapping[str, Any], run: Run, limits: Limits, rules: Rules) -> Grading:
    """Grade a program on all cases of a row.

    Args:
        program: `None`: the answer has none.
        problem: tests of the row, as `problem_of` returns them.
        run: runs one case in a sandbox.
    """
    why = refusal(program)
    if why or program is None:
        return Grading(0.0, "refused", why)
    if problem.get("before") and (whole := completed(problem["before"], program, problem["entry"][0])) is not None:
        program, own = whole, ""
    else:
        own = problem.get("before") or ""
    limits = limits.for_row(problem.get("limits") or {})
    cases, passed = problem["cases"], 0
    first: tuple[str, str] | None = None
    deadline = time.monotonic() + limits.total_seconds
    for number, case in enumerate(cases, start=1):
        left = deadline - time.monotonic()
        if left <= 0:
            verdict, detail = "timeout", f"no time left of {limits.total_seconds:g} s for all cases"
        else:
            verdict, detail = _case((own, program), problem, case, run, limits, rules, min(limits.seconds, left))
        if verdict == "passed":
            passed += 1
            continue
        first = first or (verdict, f"case {number} of {len(cases)}: {detail or verdict}")
        if rules.score == "all" or left <= 0:
            break
    verdict, detail = first or ("passed", "")
    detail = "".join(char if char.isprintable() else repr(char)[1:-1] for char in detail)
    score = passed / len(cases) if rules.score == "share" else float(first is None)
    return Grading(score, verdict, detail)


def _case(
    sources: tuple[str, str],
    problem: Mapping[str, Any],
    case: Mapping[str, Any],
    run: Run,
    limits: Limits,
    rules: Rules,
    seconds: float,
) -> tuple[str, str]:
    """Verdict and detail of one case; `sources` are the prompt that runs first, and the program."""
    (before, program), entry = sources, list(problem.get("entry") or ())
    if "tests" in case:
        tests = {"tests": case["tests"], "entry": entry, "before": problem.get("before") or ""}
        outcome = run("tests", [{"program": program, "before": before}, tests], limits, "", seconds)
        return _of_tests(outcome)
    if "arguments" in case:
        job = {
            "program": program,
            "before": before,
            "function": entry[0],
            "arguments": list(map(encode, case["arguments"])),
        }
        outcome = run("call", [job], limits, "", seconds)
        if outcome.end != "done":
            return _ended(outcome)
        return _of_value(outcome.result, case["output"], rules)
    outcome = run("program", [{"program": program}], limits, case["input"], seconds)
    if outcome.end != "done":
        return _ended(outcome)
    if problem.get("checker"):
        return _checked(problem["checker"], case, outcome.stdout, run, limits)
    if same_output(outcome.stdout, case["output"], whitespace=rules.whitespace, tolerance=rules.tolerance):
        return "passed", ""
    return "wrong", f"output {_short(outcome.stdout)}"


def _ended(outcome: Outcome) -> tuple[str, str]:
    lines = [line for line in outcome.stderr.strip().splitlines() if line.strip()]
    said = {
        "output": "too much output",
        "files": "too many files",
        "lost": "the sandbox ended",
        "timeout": "time limit",
        "memory": "memory limit",
    }
    return _BAD_ENDS[outcome.end], said.get(outcome.end) or (
        lines[-1][:300] if lines else "ended by a signal or status"
    )


def _of_tests(outcome: Outcome) -> tuple[str, str]:
    """Verdict that the process of the tests wrote; the program cannot write it."""
    if outcome.end not in ("done", "error"):
        return _ended(outcome)
    try:
        said = json.loads(outcome.result)
        verdict, detail = said["verdict"], str(said["detail"])
    except (ValueError, KeyError, TypeError):
        return "error", "the tests were ended"
    return (verdict, detail) if verdict in ("passed", "wrong", "memory") else ("error", detail)


def _of_value(result: str, expected: Any, rules: Rules) -> tuple[str, str]:
    alternatives = [expected] + (expected[:1] if isinstance(expected, list) and len(expected) == 1 else [])
    try:
        form = json.loads(result)
        if any(same_value(form, alternative, rules.tolerance) for alternative in alternatives):
            return "passed", ""
        shown = repr(decode(form)) if len(result) <= _SHOWN else result
    except (ValueError, RecursionError, TypeError):
        return "error", "the program ended without a result"
    return "wrong", f"returned {_short(shown)}"


def _checked(checker: str, case: Mapping[str, Any], output: str, run: Run, limits: Limits) -> tuple[str, str]:
    """Verdict of the row's own checker, which runs in the sandbox too.

    A function `check(input, expected, output)` returns whether the output is right; a script gets
    the names of three files and prints a number, 1 for right.
    """
    if "def check(" in checker:
        arguments = [case["input"], case["output"], output]
        job: dict[str, Any] = {"program": checker, "function": "check", "arguments": arguments}
        outcome = run("call", [job], limits)
        text = outcome.result.strip().replace("true", "1").replace("false", "0")
    else:
        files = {"input.txt": case["input"], "expected.txt": case["output"], "output.txt": output}
        job = {"program": checker, "files": files, "arguments": list(files)}
        outcome = run("program", [job], limits)
        text = (outcome.stdout.split() or [""])[0]
    if outcome.end != "done":
        return "error", f"the row's checker failed: {_ended(outcome)[1]}"
    try:
        return ("passed", "") if float(text) >= 1 else ("wrong", "the row's checker refused the output")
    except ValueError:
        return "error", f"the row's checker printed no number: {_short(text)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:120]}…")
