"""One padded batch: every sequence keeps what it has alone."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model

from effopd.models.token_batch import TokenBatch

PROMPTS, ANSWERS = [[5, 6, 7], [8], [9, 10]], [[11], [12, 13, 14], [15, 16]]


def test_rows_tokens_and_lengths():
    batch = TokenBatch.of(PROMPTS, ANSWERS, pad_token_id=0)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 11, 0, 0], [0, 0, 8, 12, 13, 14], [0, 9, 10, 15, 16, 0]]
    assert batch.mask_BL.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
    assert batch.lengths == [1, 3, 2] and batch.tokens == 12
    assert batch.sums(torch.arange(6.0)) == [0.0, 1.0 + 2 + 3, 4.0 + 5]
    first = batch.first(2)
    assert first.lengths == [1, 3] and torch.equal(first.ids_BL, batch.ids_BL[:2])
    assert batch.first(9).lengths == batch.lengths


def test_hidden_states_are_those_of_each_sequence_alone():
    model = make_model(0).eval()
    with torch.no_grad():
        together = TokenBatch.of(PROMPTS, ANSWERS, 0).hidden(model)
        alone = [TokenBatch.of([p], [a], 0).hidden(model) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_what_tools_wrote_is_read_but_not_scored():
    from effopd.distill.scoring import token_batch

    rollouts = {
        "prompt_ids": torch.tensor([[5, 6]]), "prompt_mask": torch.ones(1, 2, dtype=torch.long),
        "completion_ids": torch.tensor([[7, 8, 9, 0]]), "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
    }  # fmt: skip
    batch = token_batch(rollouts)
    assert batch.scored_BT.tolist() == [[True, False, True, False]] and batch.tokens == 5
    assert batch.sums(torch.tensor([2.0, 3.0])) == [pytest.approx(5.0)]
