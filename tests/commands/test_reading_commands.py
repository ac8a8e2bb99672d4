"""`effopd report` and `effopd compare --report` read and draw without torch and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from effopd.common.files import append_row
from effopd.runs.records import (
    EVALS,
    METRICS,
    SEARCHES,
    Costs,
    EvaluationRecord,
    SearchRecord,
    StepRecord,
    TrialRecord,
)

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "docs" / "ablation" / "results.json"
HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "pandas", "scipy")
CODE = f"""
import sys
from effopd.commands.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print("status", status, [name for name in {HEAVY} if name in sys.modules])
"""


def run(*argv: str) -> str:
    """The last line that a command prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", CODE, *argv], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture
def a_run(tmp_path) -> Path:
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text("# effopd 0\nlearning_rate: 3.0e-05\n")
    for step in (1, 2):
        costs = Costs(net_seconds=1.5 * step, net_generated_tokens=10 * step, net_forward_tokens=20 * step)
        append_row(root / METRICS, StepRecord(step, loss=1 / step, costs=costs).to_row())
        evaluation = EvaluationRecord(step, kl=0.5 / step, kl_se=0.01, accuracy=0.5, costs=costs)
        append_row(root / EVALS, evaluation.to_row())
    trials = (TrialRecord(0.0, "start", -1.0, (-2.0, 0.0), 0.5), TrialRecord(2.0, "accepted", -0.5, (-1.0, 0.0), 0.5))
    append_row(root / SEARCHES, SearchRecord(1, 0, 0.25, 2.0, 2.0, 1.0, trials=trials).to_row())
    return root


@pytest.mark.parametrize("command", ["report", "compare"])
def test_help(command):
    assert run(command, "--help") == "status 0 []"


def test_a_page_of_a_run(a_run):
    assert run("report", str(a_run)) == "status 0 []"
    assert (a_run / "report.html").read_text().count('data-alt="') == 4


def test_a_page_of_a_comparison(tmp_path):
    assert run("compare", "--report", str(RESULTS), "--out", str(tmp_path)) == "status 0 []"
    assert (tmp_path / "results.md").is_file() and list((tmp_path / "results").glob("*.png"))
