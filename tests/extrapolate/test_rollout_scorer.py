"""The scorer of rollouts needs a divergence and batches, and no trainer."""

from __future__ import annotations

import pytest
import torch

from effopd.extrapolate.scorers.teacher_kl import RolloutScorer
from effopd.models.token_batch import TokenBatch


class Divergence:
    """D at a position is the student's number plus the token's id."""

    def __init__(self):
        self.teacher_calls = 0

    def teacher_hidden(self, batches):
        self.teacher_calls += 1
        return [torch.zeros(sum(batch.lengths), 1) for batch in batches]

    def __call__(self, model, batches, teacher_hidden):
        assert [len(hidden) for hidden in teacher_hidden] == [sum(batch.lengths) for batch in batches]
        return [model + batch.ids_BL[:, -batch.scored_BT.shape[1] :][batch.scored_BT].float() for batch in batches]


def batches():
    yield TokenBatch.of([[9], [9]], [[1], [2, 3]], 0)
    yield TokenBatch.of([[9], [9, 9]], [[4, 5, 6], [7]], 0)
    raise AssertionError("no more rollouts are asked for than are scored")


def test_a_score_is_the_token_mean_over_the_first_rollouts():
    divergence = Divergence()
    scorer = RolloutScorer(divergence, 3)
    scorer.take(batches())
    score = scorer(10.0)
    sums, tokens = [11.0, 25.0, 45.0], 6
    assert score.mean == pytest.approx(-sum(sums) / tokens)
    assert score.per_example == pytest.approx([-each / (tokens / 3) for each in sums])
    assert sum(score.per_example) / 3 == pytest.approx(score.mean)
    assert score.generated_tokens == 0


def test_a_search_can_score_more_rollouts_than_the_others():
    scorer = RolloutScorer(Divergence(), 1, 3)
    for most, number in ((False, 1), (True, 3), (False, 1)):
        scorer.take(batches(), most=most)
        assert len(scorer(10.0).per_example) == number


def test_the_teacher_is_charged_and_asked_once_per_step():
    divergence = Divergence()
    scorer = RolloutScorer(divergence, 3)
    for step in (1, 2):
        scorer.take(batches())
        forward = 2 + 3 + 4  # prompts and answers of the three
        assert [scorer(float(scale)).forward_tokens for scale in range(3)] == [2 * forward, forward, forward]
        assert divergence.teacher_calls == step
        scorer.drop()
    with pytest.raises(AssertionError, match="before it searches"):
        scorer(0.0)
