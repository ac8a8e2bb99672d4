"""README and pages: code blocks run, tables and numbers follow from docs/*.json, links resolve, the
tree is that on disk.
"""

from __future__ import annotations

import re
from pathlib import Path

import architecture_tree
import check_links
import first_step
import pages
import pytest
import readme_results
import torch
from trl import DistillationConfig, DistillationTrainer

from effopd import EffOPDCallback
from effopd.tasks import builtin_models as testbed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TUTORIALS = ROOT / "docs" / "tutorials"
#: Speed-ups as the pages print them: `2.51×`.
FACTOR = re.compile(r"\d+\.\d+(?=×)")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def run(block: str, names: dict | None = None) -> dict:
    names = {} if names is None else names
    exec(compile(block, "a block of the page", "exec"), names)
    return names


def search_of(trainer):
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback)]
    return callback.look_ahead


def searched_steps(look_ahead) -> list[int]:
    return [search.step for search in look_ahead.history]


def test_the_front_page_is_read_in_a_minute():
    assert len(README.splitlines()) <= 120
    assert len(README.encode()) <= 9 * 1024


@pytest.mark.slow
def test_the_lines_for_a_trl_script(tmp_path):
    """The README's block, put into a script that has a `trl.DistillationTrainer`."""
    task = testbed.family_task("chain_sum", "train", size=256)
    trainer = DistillationTrainer(
        model=str(testbed.student_path()),
        teacher_model=str(testbed.teacher_path()),
        args=DistillationConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=16, max_completion_length=8, bf16=False,
            report_to="none",
        ),
        train_dataset=task.to_dataset(),
    )  # fmt: skip
    run(python_blocks(README)[0], {"trainer": trainer})
    trainer.train()
    assert searched_steps(search_of(trainer)) == [2, 3]


def test_the_lines_for_a_plain_loop():
    """The README's block, put into a script that has a model, an optimizer, batches and a
    scorer.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(64, 4)

    def loss(model):
        return (model(x)[:, 0] - x.sum(1)).square().mean()

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    before = loss(model).item()
    names = run(
        python_blocks(README)[1],
        {"model": model, "optimizer": optimizer, "scorer": lambda model: -loss(model), "batches": range(8),
         "train_step": train_step},
    )  # fmt: skip
    assert searched_steps(names["search"])[:2] == [1, 2] and loss(model).item() < before


@pytest.mark.slow
@pytest.mark.parametrize("page", ["trl", "pytorch", "python"])
def test_the_scripts_of_the_tutorials_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(python_blocks((TUTORIALS / f"{page}.md").read_text())[0])
    look_ahead = names["search"] if page == "pytorch" else search_of(names["trainer" if page == "trl" else "run"])
    assert searched_steps(look_ahead) == ([1, 2, 4, 8, 16, 32, 64] if page == "pytorch" else [2, 3, 4])
    if page == "python":
        assert names["answers"].accuracy.mean > 0 and names["update"].summary["runs"]


@pytest.mark.slow
def test_generated_blocks_are_those_of_the_json_files():
    for page, content in readme_results.blocks(readme_results.published()).items():
        text = page.read_text()
        assert pages.with_blocks(text, content) == text, f"{page.name}: run benchmarks/readme_results.py"
    text = (pages.DOCS / "search.md").read_text()
    assert pages.with_blocks(text, first_step.blocks()) == text, "run benchmarks/first_step.py"


@pytest.mark.slow
def test_every_speed_up_in_a_sentence_is_one_of_the_tables():
    content = readme_results.blocks(readme_results.published())
    computed = {number for blocks in content.values() for table in blocks.values() for number in FACTOR.findall(table)}
    for page in (ROOT / "README.md", ROOT / "docs" / "findings.md", ROOT / "docs" / "batch_size.md"):
        assert set(FACTOR.findall(page.read_text())) <= computed, page.name


@pytest.mark.slow
def test_the_tables_follow_the_results():
    """One seed less in the JSON changes the tables that hold it."""
    docs = readme_results.published()
    changed = docs | {"results": {**docs["results"], "runs": [r for r in docs["results"]["runs"] if r["seed"]]}}
    assert readme_results.same_rate(readme_results.Figures(changed["results"])) != readme_results.same_rate(
        readme_results.Figures(docs["results"])
    )
    halved = [row | {"median": row["median"] and row["median"] / 2} for row in docs["results"]["speedups"]]
    changed = docs | {"results": {**docs["results"], "speedups": halved}}
    before, after = (
        FACTOR.findall(readme_results.speed(readme_results.Figures(d["results"]))) for d in (docs, changed)
    )
    assert float(after[0]) == pytest.approx(float(before[0]) / 2, abs=0.01)


def test_a_block_must_be_there_once():
    page = "<!-- a -->\nold\n<!-- end of a -->\nmine\n"
    assert pages.with_blocks(page, {"a": "new"}) == "<!-- a -->\n\nnew\n\n<!-- end of a -->\nmine\n"
    for wrong in ("mine\n", page * 2):
        with pytest.raises(ValueError, match="'a'"):
            pages.with_blocks(wrong, {"a": "new"})


@pytest.mark.slow
def test_the_tree_of_the_architecture_page_is_the_tree_on_disk():
    text = architecture_tree.PAGE.read_text()
    assert pages.with_blocks(text, architecture_tree.blocks()) == text, "run benchmarks/architecture_tree.py --write"


@pytest.mark.parametrize("page", check_links.markdown_pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve_and_figures_are_described(page):
    assert not check_links.broken_links(page) and not check_links.nameless_figures(page)


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#b) [c](gone.md) [d](https://example.org) ![figure](x.png)")
    assert check_links.broken_links(page) == ["#b", "gone.md", "x.png"]
    assert check_links.nameless_figures(page) == ["x.png"]
