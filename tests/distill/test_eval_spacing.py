"""Log-spaced evaluations: their steps, and settings that contradict them."""

import itertools

import pytest
from helpers.tiny_run import make_trainer

from effopd.common.files import read_rows
from effopd.distill.eval_spacing import is_log_spaced
from effopd.errors import ConfigError

FAST = {"max_steps": 3, "save_strategy": "no", "eval_greedy": False}


def test_gaps_are_at_most_a_sixth_of_the_step():
    steps = [step for step in range(1, 2000) if is_log_spaced(step)]
    assert steps[:12] == list(range(1, 13))
    assert all(later - earlier <= max(1, earlier / 6) for earlier, later in itertools.pairwise(steps))
    assert steps[-3:] == [1408, 1536, 1792]


def test_a_run_evaluates_at_both_kinds_of_steps(tmp_path):
    spaced = FAST | {"eval_strategy": "steps", "eval_steps": 2, "eval_log_spacing": True}
    make_trainer(tmp_path, **spaced).train()
    rows = read_rows(tmp_path / "evals.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"eval_strategy": "no"}, "eval_strategy='no'"),
        ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
          "load_best_model_at_end": True}, "load_best_model_at_end"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path, flags, names):
    with pytest.raises(ConfigError, match=names):
        make_trainer(tmp_path, **FAST | flags | {"eval_log_spacing": True})
