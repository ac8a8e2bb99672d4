"""Teacher-mixed sampling (MiniLLM): each token of a rollout is drawn from α q + (1−α) p.

    student's scores            →  log p ┐
    teacher with its own cache  →  log q ┴→  log(α q + (1−α) p)  →  `generate` draws the token

q is the teacher and p the student, both at the run's temperature and on the shared vocabulary. The
teacher decodes one token after another beside the student; its cache lives as long as one call of
`generate`.

Source: arXiv 2306.08543 (MiniLLM), section 2.2.

Shapes: B answers, L tokens so far, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from effopd.distill.trl_host.models import Decoder, last_logits_processor
from effopd.models.logit_path import core_of


def mixed_logps(logp_BV: Tensor, logq_BV: Tensor, alpha: float) -> Tensor:
    """log(α q + (1−α) p) [B, V], in nats.

    Args:
        logp_BV: log p.
        logq_BV: log q; with fewer columns than `logp_BV`, q is 0 on the others.
        alpha: α in (0, 1).
    """
    logq_BV = nn.functional.pad(logq_BV, (0, logp_BV.shape[-1] - logq_BV.shape[-1]), value=-math.inf)
    return torch.logaddexp(logq_BV + math.log(alpha), logp_BV + math.log1p(-alpha))


class TeacherMixing(LogitsProcessor):
    """Maps the student's final scores to log(α q + (1−α) p); for one call of `generate`.

    Must be the last logits processor: it reads the scores as log p up to a constant per row.

    Args:
        teacher: causal LM in eval mode, possibly wrapped.
        lengths: tokens of each prompt; `generate` gets them left-padded.
        alpha: α in (0, 1).
        temperature: of q. The scores already have it.
        vocab_size: size of the shared vocabulary, on which q is normalized.
        teaching: opened around each forward pass of the teacher.
    """

    def __init__(
        self,
        teacher: Any,
        lengths: Sequence[int],
        alpha: float,
        temperature: float,
        vocab_size: int,
        teaching: Callable[[], AbstractContextManager[None]],
    ):
        self._teacher, self._lengths, self._alpha = core_of(teacher), lengths, alpha
        self._temperature, self._vocab_size, self._teaching = temperature, vocab_size, teaching
        self._decoder: Decoder | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with self._teaching():
            if self._decoder is None:
                self._decoder = Decoder(self._teacher, left_padding_mask(self._lengths, input_ids))
            logits_BV = self._decoder.next_logits(input_ids)[:, : self._vocab_size].to(scores.device).float()
        return mixed_logps(scores.log_softmax(-1), (logits_BV / self._temperature).log_softmax(-1), self._alpha)


def left_padding_mask(lengths: Sequence[int], ids_BL: Tensor) -> Tensor:
    """Mask [B, L] with 1 at the last `lengths[i]` columns of row i.

    Example:
        >>> left_padding_mask([1, 3], torch.zeros(2, 3)).tolist()
        [[0, 0, 1], [1, 1, 1]]
    """
    width = ids_BL.shape[1]
    first_B = width - torch.tensor(lengths, device=ids_BL.device)
    return (torch.arange(width, device=ids_BL.device) >= first_B[:, None]).long()


@contextmanager
def mixing(student: Any, processor: TeacherMixing) -> Iterator[None]:
    """In this block, `generate` on `student` draws from the mixture of `processor`."""
    with last_logits_processor(core_of(student), processor):
        yield


def teacher_tokens(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> int:
    """Tokens that the teacher reads while it samples along: all but the last of each answer."""
    return sum(map(len, prompts)) + sum(max(0, len(answer) - 1) for answer in answers)
