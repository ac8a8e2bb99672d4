"""Rows of a run: what is written reads back as it was, and old or foreign rows read as far as they
go.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from effopd.common.files import append_row
from effopd.runs.columns import columns_of
from effopd.runs.records import (
    EVALS,
    METRICS,
    SEARCHES,
    Costs,
    EvaluationRecord,
    Health,
    SearchMetrics,
    SearchRecord,
    StepRecord,
    TrialRecord,
    read_evaluations,
    read_searches,
    read_steps,
)

COSTS = Costs(net_seconds=14.2, search_seconds=1.0, net_generated_tokens=12345)
TRIALS = (
    TrialRecord(0.0, "start", -0.5, (-0.25, -0.75), 0.1, 0, 64),
    TrialRecord(1.0, "non-finite", None, (), 0.1, 0, 64),
    TrialRecord(2.0, "non-finite"),
)
STEP = StepRecord(
    3, 0.5, 1.5, 1e-4, COSTS, mean_length=11.0, tied_groups_share=0.25, health=Health(reverse_kl=0.25),
    search=SearchMetrics(accepted_scale=2.0), extra={"epoch": 0.125},
)  # fmt: skip
SEARCH = SearchRecord(3, 2, 0.027, 2.0, 2.0, 0.3, 0, 192, TRIALS, 4096, 1.4, 2.0, fit={"q2": None})
EVALUATION = EvaluationRecord(0, 0.003, 0.0004, 0.003, 0.75, 0.7, 0.8, runtime=1.0, costs=COSTS)


@pytest.mark.parametrize("record", [STEP, SEARCH, EVALUATION, SearchRecord(1), *TRIALS])
def test_a_row_reads_back_as_the_record_it_was_written_from(record):
    row = json.loads(json.dumps(record.to_row()))
    assert type(record).from_row(row) == record
    assert type(record).from_row(row).to_row() == row


def test_keys_on_disk():
    assert list(SEARCH.to_row()) == [
        "step",
        "anchor_step",
        "delta_norm",
        "accepted_scale",
        "best_scale",
        "seconds",
        "generated_tokens",
        "forward_tokens",
        "trials",
        "memory_bytes",
        "learning_rate_factor",
        "learning_rate_factor_total",
        "fit",
    ]
    scored, infinite, unscored = SEARCH.to_row()["trials"]
    assert list(scored) == [
        "scale",
        "verdict",
        "score",
        "per_example",
        "seconds",
        "generated_tokens",
        "forward_tokens",
    ]
    assert (
        infinite["score"] is None
        and infinite["per_example"] == []
        and unscored == {"scale": 2.0, "verdict": "non-finite"}
    )
    assert STEP.to_row() == {
        "step": 3,
        "loss": 0.5,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "cost/search_seconds": 1.0,
        "cost/net_seconds": 14.2,
        "cost/net_generated_tokens": 12345,
        "completions/mean_length": 11.0,
        "frac_reward_zero_std": 0.25,
        "health/reverse_kl": 0.25,
        "effopd/accepted_scale": 2.0,
        "epoch": 0.125,
    }
    assert list(EVALUATION.to_row())[:5] == ["step", "eval_kl", "eval_kl_se", "eval_loss", "eval_accuracy"]


def test_a_displacement_that_is_not_finite_is_null_and_not_missing():
    assert SearchRecord(1, 0, None).to_row()["delta_norm"] is None


def test_rows_of_earlier_versions_read_as_far_as_they_go():
    search = SearchRecord.from_row(
        {"step": 1, "accepted_scale": 4.0, "preferred_scale": 4.0, "trials": [{"scale": 0, "verdict": "start"}]}
    )
    assert (search.accepted_scale, search.best_scale, search.searched) == (4.0, None, False)
    assert EvaluationRecord.from_row({"step": 2, "eval_kl": 0.5}).costs == Costs()
    assert StepRecord.from_row({"step": 2}).health.reverse_kl is None


def test_what_a_host_adds_is_kept():
    row = {"step": 2, "loss": 1.0, "reward": 0.5, "rewards/correct/std": 0.25, "note": None}
    assert StepRecord.from_row(row).extra == {"rewards/correct/std": 0.25, "note": None}
    row = {"step": 2, "eval_second_loss": 1.0, "eval_second_entropy": 2.0, "eval_second_runtime": 0.5}
    evaluation = EvaluationRecord.from_row(row)
    assert (evaluation.name, evaluation.loss, evaluation.extra) == ("eval_second", 1.0, {"eval_entropy": 2.0})
    assert evaluation.to_row() == row


def test_a_search_as_its_step_reports_it():
    scored = TrialRecord(1.5, "accepted", -0.25, (-0.25, -0.25), 0.1, 0, 64)
    metrics = replace(SEARCH, trials=(*TRIALS, scored)).metrics()
    assert (metrics.accepted_scale, metrics.candidates, metrics.start_score) == (2.0, 3, -0.5)
    assert (metrics.best_scale, metrics.best_gain, metrics.learning_rate_factor) == (2.0, 0.25, 2.0)
    assert set(metrics.to_row()) == {f"effopd/{name}" for name in vars(metrics)}
    assert SEARCH.metrics().best_gain is None  # no candidate has a score


def test_readers_leave_out_a_torn_line_and_a_missing_file_has_no_rows(tmp_path):
    readers = {METRICS: (read_steps, STEP), SEARCHES: (read_searches, SEARCH), EVALS: (read_evaluations, EVALUATION)}
    for name, (read, record) in readers.items():
        assert read(tmp_path) == []
        append_row(tmp_path / name, record.to_row())
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 4, "lo')
        assert read(tmp_path) == [record]


@pytest.mark.parametrize("record", [StepRecord, SearchRecord, TrialRecord, EvaluationRecord])
def test_every_field_says_what_it_is_and_keys_are_unique(record):
    columns = list(columns_of(record))
    assert all(column.text for _, column in columns)
    assert len({key for key, _ in columns}) == len(columns)


def imported(modules: str, among: tuple[str, ...]) -> str:
    """Which packages `import modules` brings along."""
    code = f"import sys, {modules}; print(*(name for name in {among} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_reading_records_takes_the_standard_library_only():
    assert imported("effopd.runs.records", ("torch", "transformers", "numpy", "yaml")) == ""


def test_a_run_directory_is_read_without_the_hosts():
    modules = "effopd.runs.run_dir, effopd.runs.lines, effopd.runs.best_model, effopd.runs.run_prompts"
    assert imported(modules, ("torch", "transformers", "trl", "numpy")) == ""
