"""The names of a checkpoint's files are those of transformers, whose constants are too slow to
import for reading a run.
"""

from __future__ import annotations

from transformers import trainer

from effopd.runs.checkpoints import OPTIMIZERS, SCHEDULER, TRAINER_STATE


def test_names_are_the_hosts():
    assert TRAINER_STATE == trainer.TRAINER_STATE_NAME and SCHEDULER == trainer.SCHEDULER_NAME
    assert OPTIMIZERS == (trainer.OPTIMIZER_NAME, trainer.OPTIMIZER_NAME_BIN)
