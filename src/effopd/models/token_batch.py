"""`TokenBatch`: prompts and answers as one padded batch, with the answer tokens that are scored.

Shapes: B sequences, L prompt and answer tokens, T answer tokens, N scored positions, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effopd.common.float64 import for_float64
from effopd.models.logit_path import completion_hidden_states


@dataclass(frozen=True)
class TokenBatch:
    """B sequences whose answers fill the last T columns.

    Attributes:
        ids_BL: token ids.
        mask_BL: 1 at tokens, 0 at padding.
        scored_BT: whether an answer token is scored.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    scored_BT: Tensor

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_token_id: int) -> TokenBatch:
        """Left-padded prompts with right-padded answers; every answer token is scored."""
        width, length = max(map(len, prompts)), max(map(len, answers))
        ids_BL = torch.full((len(prompts), width + length), pad_token_id)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids_BL[row, width - len(prompt) : width + len(answer)] = torch.tensor(prompt + answer)
            mask_BL[row, width - len(prompt) : width + len(answer)] = 1
        return cls(ids_BL, mask_BL, mask_BL[:, width:].bool())

    def first(self, sequences: int) -> TokenBatch:
        """The first `sequences` rows, or all if there are fewer."""
        return TokenBatch(self.ids_BL[:sequences], self.mask_BL[:sequences], self.scored_BT[:sequences])

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass, without padding."""
        return int(self.mask_BL.sum())

    @property
    def lengths(self) -> list[int]:
        """Scored tokens per sequence."""
        return self.scored_BT.sum(1).tolist()

    def hidden(self, model: Any) -> Tensor:
        """Hidden states [N, H] that predict the scored tokens, sequence by sequence."""
        ids_BL, mask_BL = self.ids_BL.to(model.device), self.mask_BL.to(model.device)
        hidden_BTH = completion_hidden_states(model, ids_BL, mask_BL, self.scored_BT.shape[1])
        return hidden_BTH[self.scored_BT.to(hidden_BTH.device)]

    def sums(self, value_N: Tensor) -> list[float]:
        """Sums per sequence of values at the scored positions, in float64."""
        return [float(value_T.sum()) for value_T in for_float64(value_N).double().split(self.lengths)]
