"""Which runs of a grid's folder enter its results."""

from __future__ import annotations

import json
import math

from helpers.grid_runs import LR, planted_run

from effopd.compare.collect import made_here
from effopd.compare.grid import Grid
from effopd.compare.imported_runs import key
from effopd.compare.runner import DONE, FAILED
from effopd.runs.records import EVALS


def test_a_non_finite_loss_is_a_result_and_other_failures_are_named(tmp_path):
    states = {
        "finished": {DONE: {"code": "abc"}},
        "diverged": {FAILED: {"error": "effopd train: NonFiniteLossError: the loss of step 3 is nan"}},
        "killed": {FAILED: {"error": "Killed"}},
        "running": {},
    }
    plan = Grid(str(tmp_path), LR, ["t"], [0], {}, {name: {} for name in states}, baseline="finished")
    rows = [json.dumps(evaluation.to_row()) + "\n" for evaluation in planted_run(steps=(0, 2, 4)).evaluations]
    for run in plan.runs():
        run.path.mkdir(parents=True)
        (run.path / EVALS).write_text("".join(rows))
        for file, content in states[run.strategy].items():
            (run.path / file).write_text(json.dumps(content))
    runs, failed = made_here(plan.runs())
    finished, diverged, killed, _ = plan.runs()
    assert list(map(key, runs)) == [key(finished), key(diverged)] and runs[0].code == "abc"
    assert len(runs[0].evaluations) == 3 and all(math.isfinite(e.kl) for e in runs[0].evaluations)
    assert math.isinf(runs[1].evaluations[-1].kl) and runs[1].cost(1.0, "kl", False).steps == 2
    assert failed == [f"{killed.name}: Killed"]
    (diverged.path / EVALS).unlink()  # it failed before the first evaluation
    assert made_here([diverged]) == ([], [f"{diverged.name}: {states['diverged'][FAILED]['error']}"])
