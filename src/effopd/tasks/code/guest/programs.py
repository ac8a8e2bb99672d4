"""Run one program, one call, or one test in a forked process of the sandbox."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import io
import json
import os
import signal
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from effopd.tasks.code.guest.peers import Peer, fetched
from effopd.tasks.code.guest.values import Channel, NotPlain, decode, encode

#: Modules that the sites of starter code (`def f(self, a: List[int])`) import for every program.
_IMPORTED = (
    "bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "json", "math", "operator",
    "random", "re", "statistics", "string", "sys", "typing",
)  # fmt: skip
#: Name of a script; there is no such file.
_FILE = "solution.py"
#: Exit status after an exception that nobody caught.
FAILED = 1
#: Status after `MemoryError`: minus the signal by which the process ends itself. No exit status of
#: a program is negative, and nothing else sends this signal inside the sandbox.
NO_MEMORY = -int(getattr(signal, "SIGPWR", 30))


def run_program(job: dict[str, Any]) -> int:
    """Run a program as a script with its standard streams; the exit status."""
    for name, text in (job.get("files") or {}).items():
        Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    _namespace(job["program"], job.get("arguments") or [])
    return 0


def run_call(job: dict[str, Any], result: int) -> int:
    """Run the program, call its function with plain arguments, and write the plain result."""
    given = {name: value for name, value in imported_names().items() if name != job["function"]}
    space = _namespace(job["program"], [], name="solution", before=job.get("before", ""), given=given)
    function = _entry(space, job["function"])
    value = function(*[decode(argument) for argument in job["arguments"]])
    if isinstance(value, types.GeneratorType):
        value = list(value)
    try:
        text = json.dumps(encode(value))
    except NotPlain as error:
        raise TypeError(f"the function returned no plain value: {error}") from None
    _write(result, text)
    return 0


def run_candidate(job: dict[str, Any], connection: int) -> int:
    """Run the program, then answer the calls of the tests."""
    channel = Channel(lambda count: os.read(connection, count), lambda data: os.write(connection, data))
    try:
        space = _namespace(job["program"], [], name="solution", before=job.get("before", ""))
    except MemoryError:
        raise
    except BaseException as error:
        channel.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})
        return FAILED
    channel.send({"ready": True})
    Peer(channel, space).serve()
    return 0


def run_tests(job: dict[str, Any], connection: int, result: int) -> int:
    """Run the tests against the other process and write their verdict."""
    channel = Channel(lambda count: os.read(connection, count), lambda data: os.write(connection, data))
    verdict, detail = "passed", ""
    try:
        hello = channel.receive()
        if not isinstance(hello, dict) or not hello.get("ready"):
            verdict, detail = "error", str((hello if isinstance(hello, dict) else {}).get("failed"))[:300]
        else:
            _tested(job, Peer(channel))
    except AssertionError as error:
        verdict, detail = "wrong", str(error)[:300]
    except MemoryError:
        verdict = "memory"
    except (EOFError, ConnectionError):
        verdict, detail = "error", "the program ended during the tests"
    except BaseException as error:
        verdict, detail = "error", f"{type(error).__name__}: {str(error)[:300]}"
    _write(result, json.dumps({"verdict": verdict, "detail": detail}))
    return 0


def _tested(job: dict[str, Any], peer: Peer) -> None:
    """Run the tests. Only names that neither they nor the prompt define come from the program."""
    entry = set(job.get("entry") or [])
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    if job.get("before"):
        with contextlib.suppress(SyntaxError):  # a prompt that is no complete program
            exec(compile(job["before"], "<prompt>", "exec", dont_inherit=True), space)
    tree = ast.parse(job["tests"])
    loaded, bound = _names(tree)
    unknown = (loaded - bound - space.keys() - set(dir(builtins))) | (entry & loaded)
    modules = {name for name in unknown - entry if name in sys.stdlib_module_names}
    space |= {name: __import__(name) for name in modules} | fetched(peer, sorted(unknown - modules), entry)
    exec(compile(tree, "<tests>", "exec", dont_inherit=True), space)


def _names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Names that a syntax tree reads, and names that it binds."""
    loaded: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return loaded, bound


@cache
def imported_names() -> dict[str, Any]:
    """The modules `_IMPORTED` and their public names, except for names of built-ins."""
    modules = {name: importlib.import_module(name) for name in _IMPORTED}
    names: dict[str, Any] = {}
    for module in modules.values():
        public = getattr(module, "__all__", ())
        names |= {name: getattr(module, name) for name in public if not hasattr(builtins, name)}
    return names | modules


def _namespace(
    program: str,
    arguments: list[str],
    *,
    name: str = "__main__",
    before: str = "",
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Namespace of a program after it ran; `before` runs first in the same namespace.

    `given` are names that the program finds there.
    """
    module = types.ModuleType(name)
    vars(module).update(given or {}, __file__=_FILE)
    sys.modules[name] = module
    sys.argv = [_FILE, *arguments]
    sources = [("<prompt>", before), ("<program>", program)]
    codes = [compile(source, file, "exec", dont_inherit=True) for file, source in sources if source]
    for code in codes:
        exec(code, module.__dict__)
    return module.__dict__


def _entry(space: dict[str, Any], name: str) -> Any:
    """The program's function, or the method of its class `Solution`."""
    if name in space:
        return space[name]
    if "Solution" in space and hasattr(space["Solution"], name):
        return getattr(space["Solution"](), name)
    raise NameError(f"the program has no function {name!r}")


def _write(fd: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(fd, data) :]


def new_streams() -> None:
    """Python's standard streams on the descriptors 0, 1 and 2, UTF-8, as for a script."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(  # type: ignore[misc]
        io.BufferedReader(io.FileIO(0, "rb", closefd=False)), "utf-8", "surrogateescape"
    )
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(  # type: ignore[misc]
        io.BufferedWriter(io.FileIO(1, "wb", closefd=False)), "utf-8", "surrogateescape", newline="\n"
    )
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(  # type: ignore[misc]
        io.BufferedWriter(io.FileIO(2, "wb", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
    )
