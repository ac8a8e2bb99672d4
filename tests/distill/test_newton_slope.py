"""newton_search in a real trainer: its slope is that of the scored divergence, and is used."""

from __future__ import annotations

import math

import pytest
from helpers.tiny_models import make_model
from helpers.tiny_run import make_trainer

from effopd import EffOPDConfig
from effopd.common.files import read_rows
from effopd.extrapolate.strategies import newton_search as strategy

CONFIG = EffOPDConfig("newton_search", score_rollouts=8)
SETTINGS = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}


def watched(monkeypatch):
    """What every search saw: slope, curvature, and D(1) − D(0)."""
    seen = []
    real = strategy.newton_search

    def search(score, slope, gate, z, **way):
        def both():
            known = slope()
            seen.append((known, score(0.0).mean - score(1.0).mean))
            return known

        return real(score, both, gate, z, **way)

    monkeypatch.setattr(strategy, "newton_search", search)
    return seen


@pytest.mark.parametrize("tied", [False, True])
def test_the_slope_is_the_change_of_the_score_for_a_short_update(tied, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    student = make_model(0)
    if tied:
        student.config.tie_word_embeddings = True
        student.tie_weights()
    trainer = make_trainer(tmp_path, student=student, effopd=CONFIG, learning_rate=1e-4, **SETTINGS)
    trainer.train()
    known, change = seen[0]
    assert known is not None and known[0] < 0 < known[1]
    assert known[0] + 0.5 * known[1] == pytest.approx(change, rel=0.05)
    first = next(iter(read_rows(tmp_path / "searches.jsonl")))
    scales = [trial["scale"] for trial in first["trials"]]
    assert scales[2] == pytest.approx(-known[0] / known[1]) and not math.log2(scales[2]).is_integer()


def test_another_divergence_than_the_reverse_kl_is_searched_by_doubling(tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    trainer = make_trainer(tmp_path, effopd=CONFIG, learning_rate=1e-4, beta=0.5, **SETTINGS)
    trainer.train()
    assert seen and all(known is None for known, _ in seen)
    first = next(iter(read_rows(tmp_path / "searches.jsonl")))
    assert [trial["scale"] for trial in first["trials"]][:3] == [0.0, 1.0, 2.0]
