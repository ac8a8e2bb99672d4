"""`ServedTeacher`: a teacher's top k at the answer tokens of a batch, from concurrent requests."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from effopd.distill.served.client import TeacherClient
from effopd.distill.served.protocol import COMPLETIONS, Scored, completion_request, read_completions
from effopd.distill.served.support import Support
from effopd.models.token_batch import TokenBatch


class ServedTeacher:
    """A teacher behind a server, with a fixed vocabulary and number of tokens per position.

    Args:
        client: client of the server.
        model: name of the model at the server.
        vocab_size: V, rows of the student's vocabulary that the teacher has, too.
        top_k: K, number of tokens per position; more than V means V.
        workers: number of concurrent requests. The sequences of a batch are divided among them.
    """

    def __init__(self, client: TeacherClient, model: str, *, vocab_size: int, top_k: int, workers: int = 8):
        self.client, self.model, self.vocab_size = client, model, vocab_size
        self.top_k, self._workers = min(top_k, vocab_size), workers

    def score(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[Scored]:
        """The top k at the tokens of each sequence from its start on.

        Raises:
            TeacherServerError: the server gave no usable reply.
            CompatibilityError: the server refused a request for its content.
        """
        if not sequences:
            return []
        size = -(-len(sequences) // min(len(sequences), self._workers))
        parts = [slice(first, first + size) for first in range(0, len(sequences), size)]

        def ask(part: slice) -> list[Scored]:
            asked, begun = sequences[part], starts[part]
            return self.client.call(
                COMPLETIONS,
                completion_request(self.model, asked, self.top_k),
                lambda reply: read_completions(reply, asked, begun, self.top_k, self.vocab_size),
            )

        with ThreadPoolExecutor(len(parts)) as pool:
            return [each for scored in pool.map(ask, parts) for each in scored]

    def support(self, batch: TokenBatch) -> Support:
        """The teacher's top k at the T answer tokens of a batch, [B, T, K]; on the CPU.

        Columns of padding hold no token. Raises as `score`.
        """
        ids_BL, mask_BL = batch.ids_BL.cpu(), batch.mask_BL.cpu().bool()
        length = batch.scored_BT.shape[1]
        sequences = [ids[mask].tolist() for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        starts = mask_BL[:, : mask_BL.shape[1] - length].sum(1).tolist()
        asked = [row for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)) if sequence[start:]]
        scored = self.score([sequences[row] for row in asked], [starts[row] for row in asked])
        return _padded(dict(zip(asked, scored, strict=True)), len(sequences), length, self.top_k)


def _padded(rows: dict[int, Scored], count: int, length: int, top_k: int) -> Support:
    ids = np.zeros((count, length, top_k), np.int64)
    logq = np.full((count, length, top_k), -np.inf, np.float32)
    sampled = np.zeros((count, length), np.float32)
    for row, scored in rows.items():
        width = len(scored.sampled)
        ids[row, :width], logq[row, :width], sampled[row, :width] = scored
    return Support(torch.from_numpy(ids), torch.from_numpy(logq), torch.from_numpy(sampled))


def scored_support(teacher: ServedTeacher, batch: TokenBatch) -> tuple[Support, Tensor]:
    """The teacher's top k at the N scored tokens of a batch, and these tokens [N]; on the CPU."""
    return scored_part(teacher.support(batch), batch)


def scored_part(support_BT: Support, batch: TokenBatch) -> tuple[Support, Tensor]:
    """`scored_support` from the top k of a micro-batch, of which `batch` is the first rows."""
    length, count = batch.scored_BT.shape[1], len(batch.ids_BL)
    scored_BT = batch.scored_BT.cpu()
    first = Support(*(each[:count] for each in support_BT))
    return first.where(scored_BT), batch.ids_BL.cpu()[:, -length:][scored_BT]
