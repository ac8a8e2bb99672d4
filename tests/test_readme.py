"""The integrations of the README run word for word, and its tree is the tree on disk."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from effopd import EffOPDCallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_a_block_for_trl_for_pytorch_and_for_all_of_it():
    assert len(BLOCKS) == 3 and "OPDTrainer(" in BLOCKS[2]
    assert "DistillationTrainer(" in BLOCKS[0] and "effopd.step(step)" in BLOCKS[1]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["trl", "pytorch", "all"])
def test_blocks_run_as_they_stand(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), names)
    if index == 1:
        look_ahead = names["effopd"]
    else:
        callbacks = names["trainer" if index == 0 else "run"].callback_handler.callbacks
        (look_ahead,) = [callback.look_ahead for callback in callbacks if isinstance(callback, EffOPDCallback)]
    assert [search.step for search in look_ahead.history] == ([1, 2, 4, 8, 16, 32, 64] if index == 1 else [2, 3, 4])
    if index == 2:
        assert names["answers"].accuracy.mean > 0 and names["update"].summary["runs"]


def test_the_printed_tree_is_the_tree_on_disk():
    block = re.search(r"```\n(src/effopd/.*?)```", README, flags=re.DOTALL)
    assert block is not None
    printed: set[str] = set()
    folders: list[str] = []
    for line in block.group(1).splitlines():
        name = re.search(r"([\w.]+/?)(?:\s{2,}|$)", line.lstrip("│├└─ ").strip())
        if not name or line.startswith("src/"):
            continue
        level = (len(line) - len(line.lstrip("│├└─ "))) // 4 - 1
        folders = [*folders[:level], name.group(1)]
        printed.add("".join(folders))
    package = ROOT / "src" / "effopd"
    on_disk = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    printed_files = {name for name in printed if name.endswith(".py")}
    assert printed_files == on_disk


@pytest.fixture(scope="module")
def readme_results():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        loaded = importlib.util.spec_from_file_location("readme_results", ROOT / "benchmarks" / "readme_results.py")
        module = importlib.util.module_from_spec(loaded)
        loaded.loader.exec_module(module)
        yield module


def test_figures_are_those_of_the_results(readme_results):
    docs = readme_results.published(ROOT / "docs")
    assert readme_results.rewritten(README, docs) == README
    assert (ROOT / "docs" / readme_results.PAGE).read_text() == readme_results.page(docs["results"], docs["ablation"])


def test_the_demos_output_is_that_of_its_data(readme_results):
    docs = readme_results.published(ROOT / "docs")
    changed = docs | {"demo": docs["demo"] | {"seed": 7}}
    assert readme_results.demo(docs["demo"]) in README
    assert "testbed:chain_sum, seed 7: " in readme_results.rewritten(README, changed)


def test_figures_change_with_the_results(readme_results):
    docs = readme_results.published(ROOT / "docs")
    section = README[README.index(readme_results.START) : README.index(readme_results.END)]
    curve = {
        run["strategy"]: run for run in docs["results"]["runs"] if run["learning_rate"] == 9e-05 and run["seed"] == 0
    }
    assert "1.02× [0.74, 2.40]" in section  # at ×3, where the baseline is tuned
    fewer = [run for run in docs["results"]["runs"] if run is not curve["line_search"]]
    changed = docs | {"results": docs["results"] | {"runs": fewer}}
    assert readme_results.section(changed) != section
