"""Imports run downwards through the rooms of docs/architecture.md, and the package is light to
import.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import effopd

PACKAGE = Path(effopd.__file__).parent
#: Rooms from the ground up: a module imports from its own room and from rooms before it.
ROOMS = (
    "errors", "common", "weights", "models", "tasks", "runs", "extrapolate", "distill", "launch", "analysis",
    "interventions", "testbed", "compare", "report", "commands", "__main__",
)  # fmt: skip
LONGEST_FILE, MEDIAN_FILE = 450, 200


def name_of(path: Path, root: Path) -> str:
    return ".".join(("effopd", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def imports(root: Path) -> dict[str, set[str]]:
    """Module → modules of the package that it imports, at module level or inside a function."""
    files = {name_of(path, root): path for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name.split(".")[0] == "effopd"}
            elif isinstance(node, ast.ImportFrom):
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                source = ".".join(filter(None, (package if node.level else "", node.module or "")))
                if source.split(".")[0] == "effopd":
                    full = {f"{source}.{alias.name}" for alias in node.names}
                    graph[name] |= {target if target in files else source for target in full}
    return graph


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a higher room. The package's own `__init__` may name everything and be imported
    for its version.
    """
    floors = {name: floor for floor, name in enumerate(ROOMS)}
    return sorted(
        f"{source} imports {target}"
        for source, targets in graph.items()
        for target in targets
        if source != "effopd" and target != "effopd" and floors[room(target)] > floors[room(source)]
    )


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a loop: strongly connected components of more than one
    module.
    """

    @cache
    def reachable(module: str) -> frozenset[str]:
        seen, stack = set(), [module]
        while stack:
            for target in graph.get(stack.pop(), set()) - seen - {"effopd"}:
                seen.add(target)
                stack.append(target)
        return frozenset(seen)

    loops = {
        tuple(sorted(other for other in reachable(module) if module in reachable(other)))
        for module in graph
        if module in reachable(module)
    }
    return sorted(map(list, loops))


def test_imports_run_downwards():
    assert not arrows_up(imports(PACKAGE))


def test_no_circles():
    assert not circles(imports(PACKAGE))


def test_root_holds_no_other_modules():
    names = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names - {"__init__"} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


def test_files_are_short():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [str(path) for path, count in lines.items() if count > LONGEST_FILE] == []
    assert statistics.median(lines.values()) <= MEDIAN_FILE


@pytest.mark.parametrize(
    ("files", "up", "loops"),
    [
        ({"tasks/a.py": "def f():\n    from effopd.runs import b", "runs/b.py": ""}, 1, 0),  # inside a function
        ({"tasks/a.py": "from ..runs import b", "runs/b.py": ""}, 1, 0),  # relative
        ({"tasks/a.py": "import effopd.runs.b", "runs/b.py": ""}, 1, 0),
        ({"tasks/a.py": "from effopd.tasks import b", "tasks/b.py": "from effopd.tasks.a import x"}, 0, 1),
        ({"runs/b.py": "from effopd.tasks import a\nimport effopd", "tasks/a.py": ""}, 0, 0),
    ],
)  # fmt: skip
def test_what_the_rules_see(tmp_path, files, up, loops):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = imports(tmp_path)
    assert (len(arrows_up(graph)), len(circles(graph))) == (up, loops)


def test_import_is_light():
    code = "import effopd, effopd.commands.main, sys\n"
    code += "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", effopd.__all__)
def test_public_names_resolve(name):
    assert getattr(effopd, name) is not None


#: Private names of a host that a class of ours has for itself, by file, and what it is there.
OURS_TOO = {("interventions/results.py", "_models"): "results by the model they are of"}


@pytest.mark.slow
def test_private_names_of_hosts_stay_behind_the_door():
    from helpers.host_names import uses  # loads the hosts

    strays = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith("distill/trl_host/"):
            strays += [f"{where}:{line} {name}" for name, line in uses(path) if (where, name) not in OURS_TOO]
    assert not strays
    for where, name in OURS_TOO:  # no excuse outlives its reason
        assert name in {each for each, _ in uses(PACKAGE / where)}


@pytest.mark.parametrize(
    "code",
    [
        "trainer._buffered_inputs = None",
        "getattr(trainer, '_metrics', None)",
        "class T(Trainer):\n    def _run_epoch(self): ...",
        "class T(Trainer):\n    _tag_names = []",
        "def f():\n    from trl.models.utils import _ForwardRedirection",
        "from trl.kernels.chunked_divergence import ChunkedDivergenceFunction",
    ],
)
def test_a_private_name_outside_the_door_is_seen(code, tmp_path):
    from helpers.host_names import uses

    (tmp_path / "stray.py").write_text(code)
    assert uses(tmp_path / "stray.py")
    (tmp_path / "ours.py").write_text("self._model = f'{name}_metrics'\ndef _step(): ...\nfrom trl import GRPOTrainer")
    assert not uses(tmp_path / "ours.py")


@pytest.mark.slow
def test_look_ahead_knows_no_trainer():
    """`extrapolate` imports neither TRL nor the trainer of transformers, not even through what it
    imports.
    """
    code = "import pkgutil, importlib, sys, effopd.extrapolate as room\n"
    code += (
        "for each in pkgutil.walk_packages(room.__path__, 'effopd.extrapolate.'): importlib.import_module(each.name)\n"
    )
    code += "hosts = ('trl', 'transformers.trainer', 'transformers.trainer_callback')\n"
    code += "print(sorted(m for m in hosts if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
