"""A reader adds a strategy by docs/add-a-strategy.md alone: its file is the page's first block,
registered as the page says.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers.processes import run_script
from helpers.tiny_run import make_trainer

import effopd
from effopd import EffOPDConfig
from effopd.common.files import read_rows
from effopd.errors import ConfigError
from effopd.extrapolate import strategies
from effopd.extrapolate.strategy import STRATEGIES

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-strategy.md").read_text()
FILE, LINE, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(NAME,) = re.findall(r"strategies/(\w+)\.py`, and add its line", PAGE)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The page's file in the folder of strategies, and its line run as part of that package."""
    (tmp_path / f"{NAME}.py").write_text(FILE)
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    exec(LINE, vars(strategies))
    yield
    del STRATEGIES[NAME]
    delattr(strategies, NAME)
    del sys.modules[f"{strategies.__name__}.{NAME}"]


def test_the_file_is_short_and_needs_no_other_edit():
    assert len(FILE.splitlines()) < 40 and len(LINE.splitlines()) == 1


def test_a_strategy_by_the_page_alone(added, tmp_path):
    config = eval(USE, {"EffOPDConfig": EffOPDConfig})
    assert config.strategy == NAME and config.args["share"] == 0.25 and config.schedule == "every_step"
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\], got 2"):
        EffOPDConfig(NAME, args={"share": 2})
    with pytest.raises(ConfigError, match="would ignore shape; expected share"):
        EffOPDConfig(NAME, args={"shape": 1})
    config = EffOPDConfig(NAME, args={"share": 0.25}, validation_size=12, gate="not_worse")
    trainer = make_trainer(tmp_path / "run", effopd=config, max_steps=4, eval_strategy="no", save_strategy="no")
    trainer.train()
    searches = list(read_rows(tmp_path / "run" / "searches.jsonl"))
    assert [search["step"] for search in searches] == [1, 2, 3, 4]
    for search in searches:
        start, candidate = search["trials"]
        assert candidate["scale"] == -0.25
        better = candidate["score"] >= start["score"]
        assert search["accepted_scale"] == (-0.25 if better else 0.0)


def test_the_page_runs_from_the_command_line(tmp_path):
    package = tmp_path / "effopd"
    shutil.copytree(Path(effopd.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = package / "extrapolate" / "strategies"
    (folder / f"{NAME}.py").write_text(FILE)
    with (folder / "__init__.py").open("a") as registration:
        registration.write(LINE)
    flags = re.search(r"`(--effopd\.strategy .*?)`\.", PAGE, re.DOTALL)[1]
    words = shlex.split(flags) + shlex.split(
        "--model_name_or_path testbed:student --teacher_model_name_or_path testbed:teacher "
        "--task testbed:chain_sum --use_cpu "
        "--max_steps 2 --per_device_train_batch_size 4 --max_completion_length 8 "
        "--train_size 16 --effopd.validation_size 4 "
        "--report_to none --save_strategy no --activation_checkpointing false --output_dir run"
    )
    status, said = run_script("effopd", "train", *words, cwd=tmp_path, package=tmp_path)
    assert status == 0, said
    searches = list(read_rows(tmp_path / "run" / "searches.jsonl"))
    assert [[trial["scale"] for trial in search["trials"]] for search in searches] == [[0.0, -0.25], [0.0, -0.25]]
