"""Shapes of code rows: the tests of a row as cases, recognized by its columns.

    assertions   HumanEval (test, entry_point), MBPP and MBPP+ (test_list, test)
    cases        TACO, APPS, DeepCoder (input_output, tests), Codeforces (official_tests, examples),
                 CodeContests (public_tests, …), LiveCodeBench (public_test_cases, …),
                 Eurus-2-RL (reward_model.ground_truth)

A case has `input` and `output` (a script's standard streams), `arguments` and `output` (a call), or
`tests` (source text with assertions).
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping
from typing import Any

#: Columns with cases of standard input and output, or calls; all that are present are used.
_CASE_COLUMNS = (
    "input_output", "tests", "test_cases", "official_tests", "public_tests", "private_tests", "generated_tests",
    "public_test_cases", "private_test_cases", "reward_model.ground_truth", "verification_info",
)  # fmt: skip
_CALL = re.compile(r"assert\s+(?:not\s+)?\(*\s*(?:[\w.]+\()*?\s*([A-Za-z_]\w*)\(")
_SECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|milliseconds?|s|seconds?)?\s*", re.IGNORECASE)


class Unrecognized(ValueError):
    """A row whose tests cannot be read; the message is what was found instead."""


def problem_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tests of a row, JSON-ready: `shape`, `cases`, and where present `entry`, `before`, `checker`,
    `limits`, and `shown`: the assertions that the source shows in the prompt.

    Raises:
        Unrecognized: the row has no tests in a known shape.

    Example:
        >>> row = {"input_output": '{"inputs": ["1 2"], "outputs": ["3"]}'}
        >>> problem_of(row)["cases"]
        [{'input': '1 2', 'output': '3'}]
    """
    if isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):
        problem = _human_eval(row)
    elif isinstance(row.get("test_list"), list) or isinstance(row.get("test"), str):
        problem = _mbpp(row)
    else:
        problem = _cases(row)
    checker = next((row[name] for name in ("checker", "generated_checker") if isinstance(row.get(name), str)), None)
    if checker and checker.strip():
        problem["checker"] = checker
    limits = {"seconds": _time_limit(row.get("time_limit")), "memory_mb": _memory(row.get("memory_limit"))}
    problem["limits"] = {name: value for name, value in limits.items() if value is not None}
    return problem


def _human_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    entry = row["entry_point"]
    tests = f"{row['test']}\n\ncheck({entry})\n" if "def check(" in row["test"] else row["test"]
    prompt = row.get("prompt")
    before = prompt if isinstance(prompt, str) and f"def {entry}" in prompt else ""
    _check_syntax(tests, "test")
    return {"shape": "HumanEval", "cases": [{"tests": tests}], "entry": [entry], "before": before}


def _mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    imports = row.get("test_imports") or []
    setup = "\n".join([*(imports if isinstance(imports, list) else [imports]), row.get("test_setup_code") or ""])
    shown = [text for text in row.get("test_list") or [] if isinstance(text, str)]
    more = row.get("challenge_test_list")
    listed = shown + ([text for text in more if isinstance(text, str)] if isinstance(more, list) else [])
    long = row.get("test")
    if isinstance(long, str) and long.strip():
        shape, texts = ("MBPP+", [long]) if listed else ("assertions", [long])
    else:
        shape, texts = "MBPP", listed
    if not texts:
        raise Unrecognized("an empty test_list")
    for text in texts:
        _check_syntax(text, "test_list")
    called = [match[1] for text in (*listed, *texts) for match in _CALL.finditer(text)]
    entry = row.get("entry_point")
    entries = [entry] if isinstance(entry, str) else sorted(set(called[: len(listed) or 1]))
    return {
        "shape": shape,
        "cases": [{"tests": f"{setup.strip()}\n{text}".lstrip()} for text in texts],
        "entry": entries,
        "shown": shown[:1] if shape == "MBPP+" else shown,
    }


def _check_syntax(tests: str, column: str) -> None:
    try:
        ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise Unrecognized(f"'{column}' that is no Python ({error})") from error


def _cases(row: Mapping[str, Any]) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    names: set[str] = set()
    used: list[str] = []
    for column in _CASE_COLUMNS:
        payload: Any = row
        for part in column.split("."):
            payload = payload.get(part) if isinstance(payload, dict) else None
        if payload is None or payload == "":
            continue
        found, name = _payload(_parsed(payload, column), _function_of(row))
        cases += found
        names |= {name} if name else set()
        used += [column] if found else []
    if not cases and isinstance(row.get("examples"), list):
        cases, used = _payload(row["examples"], None)[0], ["examples"]
    if not cases:
        raise Unrecognized(f"columns {sorted(row)} without a test")
    if len(names) > 1:
        raise Unrecognized(f"tests of several functions: {', '.join(sorted(names))}")
    problem: dict[str, Any] = {"shape": _shape_name(used, bool(names)), "cases": cases}
    if any("tests" in case for case in cases):
        problem["entry"] = sorted({match[1] for case in cases for match in _CALL.finditer(case.get("tests", ""))})
    return problem | ({"entry": sorted(names)} if names else {})


def _shape_name(columns: list[str], calls: bool) -> str:
    names = {
        "reward_model.ground_truth": "Eurus-2-RL", "public_test_cases": "LiveCodeBench",
        "private_test_cases": "LiveCodeBench", "official_tests": "Codeforces", "examples": "Codeforces",
        "public_tests": "CodeContests", "private_tests": "CodeContests", "input_output": "TACO/APPS",
    }  # fmt: skip
    return f"{names.get(columns[0], 'cases')}{' (calls)' if calls else ''}"


def _parsed(payload: Any, column: str) -> Any:
    """Decoded column: JSON text, LiveCodeBench's compressed text, or the value itself."""
    if not isinstance(payload, str):
        return payload
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        if column == "private_test_cases":
            return _decompressed(payload)
        if "assert" in payload:
            _check_syntax(payload, column)
            return [payload]
        raise Unrecognized(f"'{column}' that is no JSON ({error})") from error


class _OnlyText(pickle.Unpickler):
    """Reads pickled text; a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle with {module}.{name}")


def _decompressed(text: str) -> Any:
    try:
        packed = zlib.decompressobj().decompress(base64.b64decode(text), 1 << 28)
        return json.loads(_OnlyText(io.BytesIO(packed)).load())
    except Exception as error:  # the formats' decoders raise many types
        raise Unrecognized(f"'private_test_cases' that cannot be read ({type(error).__name__}: {error})") from error


def _function_of(row: Mapping[str, Any]) -> str | None:
    """Name of LiveCodeBench's and TACO's function, from `metadata` or `fn_name`."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    names = [row.get("fn_name")] + ([metadata.get("func_name")] if isinstance(metadata, dict) else [])
    return next((name for name in names if isinstance(name, str) and name), None)


def _payload(payload: Any, function: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """Cases of a decoded column and the name of the function that they call."""
    if isinstance(payload, dict):
        if "test_cases" in payload:
            return _payload(payload["test_cases"], function)
        inputs, outputs = (payload.get(f"{name}s", payload.get(name)) for name in ("input", "output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise Unrecognized(f"tests with the keys {sorted(payload)}, not as many inputs as outputs")
        function = payload.get("fn_name") or function
        return [_case(pair, function) for pair in zip(inputs, outputs, strict=True)], function
    if not isinstance(payload, list):
        raise Unrecognized(f"tests of the type {type(payload).__name__}")
    cases: list[dict[str, Any]] = []
    name: str | None = None
    for item in payload:
        if isinstance(item, str):
            _check_syntax(item, "tests")
            cases.append({"tests": item})
        elif isinstance(item, dict) and "input" in item and "output" in item:
            kind = str(item.get("testtype") or item.get("type") or "")
            inner = item.get("metadata")
            named = inner.get("func_name") if isinstance(inner, dict) else None
            called = item.get("fn_name") or named or function
            calls = called if kind not in ("stdin", "stdin_stdout") else None
            if kind in ("functional", "function_call") and not calls:
                raise Unrecognized("a call without the name of its function")
            name = calls or name
            cases.append(_case((item["input"], item["output"]), calls, lines=kind == "functional"))
        else:
            raise Unrecognized(f"a test that is {str(item)[:60]!r}")
    return cases, name


def _case(pair: tuple[Any, Any], function: str | None, *, lines: bool = False) -> dict[str, Any]:
    given, expected = pair
    if function is None:
        try:
            (text := _text(given)).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise Unrecognized(f"an input that is no text ({error})") from error
        return {"input": text, "output": _text(expected)}
    try:
        if isinstance(given, str):
            given = [json.loads(line) for line in given.split("\n") if line.strip()] if lines else json.loads(given)
        if isinstance(expected, str) and lines:
            expected = json.loads(expected)
    except ValueError as error:
        raise Unrecognized(f"arguments of {function} that are no JSON ({error})") from error
    return {"arguments": given if isinstance(given, list) else [given], "output": expected}


def _text(value: Any) -> str:
    """Text of an input or output; a list is a list of lines."""
    if isinstance(value, list):
        return "\n".join(_text(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def _time_limit(value: Any) -> float | None:
    if isinstance(value, dict):  # CodeContests: seconds and nanos
        value = (value.get("seconds") or 0) + (value.get("nanos") or 0) / 1e9
    if isinstance(value, str):
        match = _SECONDS.fullmatch(value)
        value = float(match[1]) / (1000 if (match[2] or "").lower().startswith("m") else 1) if match else None
    return float(value) if _is_limit(value) else None


def _is_limit(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18


def _memory(value: Any) -> float | None:
    """Memory limit in MiB: Codeforces' megabytes, "256 megabytes", or bytes if above a million."""
    if isinstance(value, str):
        match = re.match(r"\s*(\d+(?:\.\d+)?)", value)
        value = float(match[1]) if match else None
    if not _is_limit(value):
        return None
    return value / (1 << 20) if value > 1e6 else float(value)
