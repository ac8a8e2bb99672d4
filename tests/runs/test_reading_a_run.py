"""The page that explains a run's files has every field of the records, and only fields that
exist.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from transformers.integrations.integration_utils import rewrite_logs

from effopd.runs.columns import columns_of
from effopd.runs.records import EvaluationRecord, SearchRecord, StepRecord, TrialRecord

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "run_files.md").read_text()
PROSE = [DOCS / "reading-a-run.md", *(DOCS / "howto").glob("*.md")]
spec = importlib.util.spec_from_file_location("run_tables", ROOT / "benchmarks" / "run_tables.py")
assert spec is not None and spec.loader is not None
run_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_tables)


def test_the_tables_are_up_to_date():
    assert run_tables.page(PAGE) == PAGE, "run benchmarks/run_tables.py"


def test_every_column_of_every_file_is_in_a_table():
    fields = re.findall(r"^\| `([^`]+)` \|", PAGE.partition(run_tables.MARK)[2], re.MULTILINE)
    records = (StepRecord, EvaluationRecord, SearchRecord, TrialRecord)
    assert {key for record in records for key, _ in columns_of(record)} == set(fields)


def logged_keys() -> set[str]:
    """Keys of metrics in the trainers' source: literal ones, and `PREFIX/` of the others."""
    found = set()
    for path in (ROOT / "src" / "effopd" / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for key in node.keys if isinstance(node, ast.Dict) else ():
                if isinstance(key, ast.Constant) and "/" in str(key.value):
                    found.add(str(key.value))
            if isinstance(node, ast.DictComp) and isinstance(node.key, ast.JoinedStr):
                start = node.key.values[0]
                if isinstance(start, ast.Constant) and str(start.value).endswith("/"):
                    found.add(str(start.value))
    return found


def test_every_metric_that_the_trainers_log_is_a_column():
    keys = {key for key, _ in columns_of(StepRecord)}
    logged = logged_keys()
    assert {"replay/age", "rollouts/on_policy", "offline/top_k_kl", "health/", "prune/"} <= logged
    assert logged <= keys | {f"{key.partition('/')[0]}/" for key in keys if "/" in key}


def test_the_prose_names_fields_that_exist():
    prose = "\n".join(path.read_text() for path in PROSE)
    keys = {key for record in (StepRecord, EvaluationRecord) for key, _ in columns_of(record)}
    named = re.findall(r"`((?:eval_|health/|effopd/|cost/)[\w/]+)`", prose)
    assert named and set(named) <= keys | {"eval_steps", "eval_size", "eval_task"}


def test_trackers_sort_by_the_documented_prefixes():
    page = (DOCS / "howto" / "report.md").read_text()
    prefixes = re.findall(r"^\| `((?:eval|train)/[\w/]*)…` \|", page, re.MULTILINE)
    keys = [key for record in (StepRecord, EvaluationRecord) for key, _ in columns_of(record)]
    names = list(rewrite_logs(dict.fromkeys(keys, 0.0)))
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in names), prefix
    assert all(name.startswith(tuple(prefixes)) for name in names)
    (wanted,) = re.findall(r"^A useful filter is `([^`]+)`", page, re.MULTILINE)
    found = {name for name in names if re.search(wanted, name)}
    assert found == {
        "eval/kl", "eval/accuracy", "train/effopd/accepted_scale", "train/effopd/best_gain",
        "train/effopd/learning_rate_factor",
    }  # fmt: skip
