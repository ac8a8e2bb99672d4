"""What the sampler itself gave the tokens that it drew: log π_sampler(y), taken while it samples.

Under `generate`: of its final scores, after temperature, top_p and the like, in the precision and
on the cached, padded forward of the sampling; nothing is recomputed. Under vLLM: what the engine
returns, after the same settings.
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
    """The last of a sampler's processors: passes the scores on, and keeps log softmax(scores)(y) of
    the first `rows` rows.

    A score's token is known one call later, so one [rows, V] tensor is held.
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
        """log π_sampler of every token of the first rows' completions, in nats. To be called once,
        after the sampling.
        """
        if self._pending is not None:
            self._take(torch.tensor([ids[-1] for ids in completions], device=self._pending.device))
            self._pending = None
        kept = completions[: self._rows]
        if not self._taken:
            return [[] for _ in kept]
        return [row[: len(ids)] for row, ids in zip(torch.stack(self._taken, dim=1).tolist(), kept, strict=True)]


@contextmanager
def recording(model: Any, rows: int) -> Iterator[LogProbRecorder]:
    """In this block, `generate` on `model` ends its list of processors with the recorder that is
    handed out.
    """
    recorder = LogProbRecorder(rows)
    with last_logits_processor(core_of(model), recorder):
        yield recorder


@contextmanager
def engine_logps(engine: Any) -> Iterator[list[Sequence[float | None]]]:
    """What a vLLM engine gives the tokens that it samples in this block: one row per answer of its
    last call.

    Args:
        engine: TRL's `VLLMGeneration`, with `logprobs` set to 0.

    Raises:
        CompatibilityError: it returns no log-probabilities.
    """
    rows: list[Sequence[float | None]] = []
    generate, instance = engine.generate, vars(engine)
    before = instance.get("generate")

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        if output[2] is None:
            raise CompatibilityError(
                "vLLM returned no log-probabilities of its samples, which the importance "
                "weights of loss_type='sampled' "
                "need. Use a TRL whose engine returns them, or loss_type='full'."
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
    """[B, T] in float32: each row's log-probabilities from the left, NaN after them and in rows
    that have none.
    """
    out = torch.full(like_BT.shape, math.nan)
    for i, row in enumerate(rows):
        if row is not None:
            length = min(len(row), like_BT.shape[1])
            out[i, :length] = torch.tensor([math.nan if x is None else x for x in row[:length]], dtype=torch.float32)
    return out.to(like_BT.device)
