"""log π_sampler(y) of sampled tokens, recorded during sampling by `generate` or vLLM.

`generate`: log-softmax of the student's final scores, after temperature, top_p and similar
settings, from the sampling forward itself; nothing is recomputed. vLLM: the engine's values, after
the same settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from effopd.distill.trl_host.models import last_logits_processor
from effopd.errors import CompatibilityError
from effopd.models.logit_path import core_of


class LogProbRecorder(LogitsProcessor):
    """Records log softmax(scores)(y) of the first `rows` rows; leaves the scores unchanged.

    Must come after all processors of the student's scores; a mixed sampler comes after it, so the
    values are the student's also there. The token of a score is known one call later, so one
    [rows, V] tensor is held.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._pending: Tensor | None = None
        self._taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self._pending = scores[: self._rows].float().log_softmax(-1)
        return scores

    def _take(self, tokens_B: Tensor) -> None:
        if self._pending is not None:
            self._taken.append(self._pending.gather(1, tokens_B[: self._rows, None])[:, 0])

    def rows(self, completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π_sampler of every recorded completion's tokens, in nats; call once, at the end."""
        if self._pending is not None:
            self._take(torch.tensor([ids[-1] for ids in completions], device=self._pending.device))
            self._pending = None
        recorded = completions[: self._rows]
        if not self._taken:
            return [[] for _ in recorded]
        return [row[: len(ids)] for row, ids in zip(torch.stack(self._taken, dim=1).tolist(), recorded, strict=True)]


@contextmanager
def recording(model: Any, rows: int) -> Iterator[LogProbRecorder]:
    """In this block, `generate` on `model` records the log-probabilities of its samples."""
    recorder = LogProbRecorder(rows)
    with last_logits_processor(core_of(model), recorder):
        yield recorder


@contextmanager
def engine_logps(engine: Any) -> Iterator[list[Sequence[float | None]]]:
    """A vLLM engine's log-probabilities in this block: one row per answer of its last call.

    Args:
        engine: TRL's `VLLMGeneration`, with `logprobs` set to 0.

    Raises:
        CompatibilityError: the engine returns no log-probabilities.
    """
    rows: list[Sequence[float | None]] = []
    generate, instance = engine.generate, vars(engine)
    before = instance.get("generate")

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        if output[2] is None:
            raise CompatibilityError(
                "vLLM returned no log-probabilities of its samples, but the importance weights of loss_type='sampled' "
                "need them. Use a TRL version whose engine returns them, or loss_type='full'."
            )
        rows[:] = [[token[0] for token in row] for row in output[2]]
        return output

    engine.generate = recorded
    try:
        yield rows
    finally:
        if before is None:
            del engine.generate
        else:
            engine.generate = before


def padded(rows: Sequence[Sequence[float | None] | None], like_BT: Tensor) -> Tensor:
    """Rows as a float32 tensor [B, T], padded on the right with NaN; a `None` row is all NaN."""
    out = torch.full(like_BT.shape, math.nan)
    for i, row in enumerate(rows):
        if row is not None:
            length = min(len(row), like_BT.shape[1])
            out[i, :length] = torch.tensor([math.nan if x is None else x for x in row[:length]], dtype=torch.float32)
    return out.to(like_BT.device)
