"""`TokenBatch`: prompts and answers as one padded batch, with the answer tokens that are scored.

Shapes: B sequences, L prompt and answer tokens, T answer tokens, N scored positions, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        teacher_B: index of each sequence's teacher; `None`: all sequences have the same.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    scored_BT: Tensor
    teacher_B: Tensor | None = None

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
        return self._rows(slice(sequences))

    def _rows(self, rows: Any) -> TokenBatch:
        teacher_B = None if self.teacher_B is None else self.teacher_B[rows]
        return TokenBatch(self.ids_BL[rows], self.mask_BL[rows], self.scored_BT[rows], teacher_B)

    def with_teachers(self, teacher_B: Tensor) -> TokenBatch:
        """The same batch with the index of each sequence's teacher."""
        return replace(self, teacher_B=teacher_B)

    def of_teacher(self, index: int) -> tuple[TokenBatch, Tensor] | None:
        """The rows of one teacher, and their positions [N] among the batch's scored positions.

        `None`: no row is its own.
        """
        assert self.teacher_B is not None, "the trainer sets the teachers of its rows"
        mine_B = self.teacher_B.to(self.scored_BT.device) == index
        if not bool(mine_B.any()):
            return None
        index_N = mine_B[self.scored_BT.nonzero()[:, 0]].nonzero()[:, 0]
        return (self, index_N) if bool(mine_B.all()) else (self._rows(mine_B), index_N)

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

    def sums(self, value_N: Tensor, start: int = 0) -> list[float]:
        """Sums per sequence of values at its scored positions from `start` on, in float64."""
        return [float(value_T[start:].sum()) for value_T in for_float64(value_N).double().split(self.lengths)]
