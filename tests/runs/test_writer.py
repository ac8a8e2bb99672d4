"""What the trainer's events leave in the run directory: records, with everything that the host
adds.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from effopd.common.files import read_rows
from effopd.runs.records import EVALS, METRICS, read_evaluations, read_steps
from effopd.runs.run_dir import RunDir
from effopd.runs.writer import RunDirCallback

LOGS = {"loss": 0.5, "learning_rate": 1e-4, "cost/net_seconds": 2.0, "num_tokens": 64.0, "entropy": 0.25, "epoch": 0.5}
METRICS_OF_HOST = {"eval_loss": 0.25, "eval_num_tokens": 64.0, "eval_runtime": 1.0}


@pytest.fixture
def writer(tmp_path) -> RunDirCallback:
    return RunDirCallback(RunDir(tmp_path))


def state(step: int, first: bool = True):
    return SimpleNamespace(global_step=step, max_steps=4, is_world_process_zero=first)


def begin(writer, step: int = 0, eval_on_start: bool = False) -> None:
    writer.on_train_begin(SimpleNamespace(eval_on_start=eval_on_start), state(step), None)


def test_a_step_is_written_with_what_the_host_logged(writer, tmp_path):
    begin(writer)
    writer.on_log(None, state(1), None, logs=LOGS)
    writer.on_log(None, state(1), None, logs={"eval_loss": 1.0})  # no training log
    writer.on_log(None, state(1, first=False), None, logs=LOGS)  # another process
    (row,) = read_rows(tmp_path / METRICS)
    assert row == {"step": 1, **LOGS}
    (record,) = read_steps(tmp_path)
    assert (record.loss, record.costs.net_seconds, record.extra) == (0.5, 2.0, {"num_tokens": 64.0, "epoch": 0.5})


def test_an_evaluation_before_training_is_of_the_run_that_starts_there(writer, tmp_path):
    writer.on_evaluate(None, state(0), None, metrics=METRICS_OF_HOST)
    assert read_evaluations(tmp_path) == []
    begin(writer)
    assert [*read_rows(tmp_path / EVALS)] == [{"step": 0, **METRICS_OF_HOST}]
    writer.on_evaluate(None, state(2), None, metrics=METRICS_OF_HOST)
    assert [record.step for record in read_evaluations(tmp_path)] == [0, 2]


def test_one_that_the_run_repeats_or_has_passed_is_not_written(tmp_path):
    for step, again in ((0, True), (2, False)):
        writer = RunDirCallback(RunDir(tmp_path))
        writer.on_evaluate(None, state(0), None, metrics=METRICS_OF_HOST)
        begin(writer, step, eval_on_start=again)
        assert read_evaluations(tmp_path) == []
