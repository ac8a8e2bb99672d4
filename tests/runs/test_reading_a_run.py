"""The page that explains a run's files has every field of the records, and only fields that
exist.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from effopd.runs.columns import columns_of
from effopd.runs.records import EvaluationRecord, SearchRecord, StepRecord, TrialRecord

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reading-a-run.md").read_text()
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


def test_the_prose_names_fields_that_exist():
    prose = PAGE.partition(run_tables.MARK)[0]
    keys = {key for record in (StepRecord, EvaluationRecord) for key, _ in columns_of(record)}
    named = re.findall(r"`((?:eval_|health/|effopd/|cost/)[\w/]+)`", prose)
    assert named and set(named) <= keys | {"eval_steps", "eval_size", "eval_task"}
