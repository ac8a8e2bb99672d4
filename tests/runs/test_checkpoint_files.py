"""Checkpoints: names of their files, which are transformers', and which of them are kept."""

from __future__ import annotations

import pytest
from transformers import trainer
from transformers.trainer_utils import rotate_checkpoints

from effopd.runs.checkpoints import OPTIMIZERS, SCHEDULER, TRAINER_STATE
from effopd.runs.run_dir import RunDir


def test_names_are_the_hosts():
    assert TRAINER_STATE == trainer.TRAINER_STATE_NAME and SCHEDULER == trainer.SCHEDULER_NAME
    assert OPTIMIZERS == (trainer.OPTIMIZER_NAME, trainer.OPTIMIZER_NAME_BIN)


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("best", [None, 1, 2, 4])
def test_the_checkpoints_that_are_kept_are_those_of_the_host(limit, best, tmp_path):
    ours, theirs = RunDir(tmp_path / "ours"), tmp_path / "theirs"
    for step in (1, 2, 3, 4):
        ours.checkpoint(step).mkdir(parents=True)
        (theirs / f"checkpoint-{step}").mkdir(parents=True)
    ours.rotate(limit, None if best is None else ours.checkpoint(best))
    rotate_checkpoints(
        str(theirs), limit, best_model_checkpoint=None if best is None else str(theirs / f"checkpoint-{best}")
    )
    kept = sorted(int(path.name.partition("-")[2]) for path in theirs.iterdir())
    assert [int(path.name.partition("-")[2]) for path in ours.checkpoints()] == kept
