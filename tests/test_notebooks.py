"""The notebooks run from the first cell to the last, and are committed without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
#: Settings of the notebooks' runs, and those of the tests.
SMALLER = {
    "quickstart": {"max_steps=8": "max_steps=4", "eval_steps=4": "eval_steps=2",
                   "per_device_train_batch_size=64": "per_device_train_batch_size=16"},
    "analyze_two_checkpoints": {"max_steps=4": "max_steps=2",
                                "per_device_train_batch_size=64": "per_device_train_batch_size=8"},
}  # fmt: skip


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def execute(path: Path) -> tuple[dict, list]:
    """Run the code cells in one namespace, as a kernel does: (names, value of each cell)."""
    names: dict = {"__name__": "__main__"}
    values, smaller = [], dict(SMALLER[path.stem])
    for number, source in enumerate(code_cells(path)):
        for setting in [setting for setting in smaller if f"{setting}," in source]:
            source = source.replace(setting, smaller.pop(setting))
        tree, value = ast.parse(source), None
        where = f"{path.name}, code cell {number}"
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(last, where, "eval"), names)
        values.append(value)
    assert not smaller, "settings that the notebook does not have"
    return names, values


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs(path):
    assert path.stat().st_size < 20_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )
    assert not any(line.startswith(("%", "!")) for source in code_cells(path) for line in source.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    names, values = execute(path)
    if path.stem == "quickstart":
        kl = {name: list(rows["eval_kl"]) for name, rows in names["evals"].items()}
        assert kl["plain"][0] == kl["line_search"][0] and kl["plain"][-1] < kl["plain"][0]
        assert len(names["searches"]) and values[0].answer
    else:
        assert {"opd", "rl"} == set(names["means"].columns) and not names["by_module"].isna().any(axis=None)
    names["plt"].close("all")
