"""Student and served teacher on whole batches, for evaluations, searches and health metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effopd.distill.divergence import AnswerKL, gathered
from effopd.distill.health import TOP_K, HealthProbe, Logits, health_metrics
from effopd.distill.served.support import FLOOR, Outcomes, Support, divergence, outcomes, tail_of, with_tails
from effopd.distill.served.teacher import ServedTeacher, scored_support
from effopd.models.head import Head
from effopd.models.token_batch import TokenBatch


@torch.no_grad()
def outcomes_of(
    student: Any,
    batches: Sequence[TokenBatch],
    asked: Sequence[tuple[Support, Tensor]],
    *,
    vocab_size: int,
    temperature: float,
    keep: list[Tensor] | None = None,
) -> list[Outcomes]:
    """Both models' outcomes at the N scored positions of each batch.

    Args:
        asked: `scored_support` of each batch.
        keep: the student's hidden states of each batch are appended to it, if it is a list.
    """

    def measure() -> list[Outcomes]:
        made = []
        for batch, (support, targets_N) in zip(batches, asked, strict=True):
            hidden_NH = batch.hidden(student)
            if keep is not None:
                keep.append(hidden_NH)
            head, device = Head.of(student, vocab_size), hidden_NH.device
            made.append(outcomes(hidden_NH, head, support.to(device), targets_N.to(device), temperature))
        return made

    return gathered(student, measure)


def kl_of_completions(
    student: Any,
    teacher: ServedTeacher,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    pad_token_id: int,
    temperature: float,
    batch_size: int,
    horizon: int = 0,
) -> list[AnswerKL]:
    """Reverse KL to a served teacher per answer; a lower bound of that over the vocabulary."""
    sums: list[AnswerKL] = []
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        batch = TokenBatch.of(prompts[rows], answers[rows], pad_token_id)
        asked = scored_support(teacher, batch)
        (at,) = outcomes_of(student, [batch], [asked], vocab_size=teacher.vocab_size, temperature=temperature)
        device = at.logp.device
        tail = tail_of(at, asked[0].to(device), asked[1].to(device))
        kl_N = divergence(at, 1.0)
        parts = batch.sums(kl_N), batch.sums(kl_N, horizon), batch.sums(tail.teacher), batch.sums(tail.kl)
        sums += [AnswerKL(*each) for each in zip(*parts, strict=True)]
    return sums


class ServedHealthProbe(HealthProbe):
    """Health metrics with a served teacher.

    `reverse_kl` and its quarters are those of the K + 1 outcomes, lower bounds. The overlap metrics
    need K ≥ 16, and the teacher's entropy needs K = V; otherwise they are left out.
    """

    def _kept(self, teacher: Any, index_N: Tensor) -> Support:
        return teacher.at(index_N)

    def _rows_measured(self, student: Logits, teacher: Any, rows: dict[str, Any]) -> dict[str, float]:
        support, targets_N, position_N = rows["teacher"], rows["targets"], rows["position"]
        logits_NV = student if isinstance(student, Tensor) else student(slice(None))
        logp_NV = logits_NV.log_softmax(-1)
        width = logits_NV.shape[1]
        sampled_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
        at = with_tails(logp_NV.gather(1, support.ids), support, width, sampled_N, -(logp_NV.exp() * logp_NV).sum(-1))
        metrics = health_metrics(logits_NV, dense(support, at, width), targets_N, position_N)
        kl_N, gap_N, quarter_N = divergence(at, 1.0), sampled_N - support.sampled, (position_N * 4).long().clamp(0, 3)
        metrics |= {
            "sampled_reverse_kl": float(gap_N.mean()),
            "sampled_reverse_kl_p95": float(gap_N.quantile(0.95)),
            "reverse_kl": float(kl_N.mean()),
        }
        metrics |= {f"reverse_kl_q{index + 1}": float(kl_N[quarter_N == index].mean()) for index in range(4)}
        unknown = [] if not bool(at.counted[:, -1].any()) else ["teacher_entropy", "entropy_gap"]
        if support.ids.shape[1] < min(TOP_K, width):
            unknown += [name for name in metrics if "overlap" in name]
        return {name: value for name, value in metrics.items() if name not in unknown}


def dense(support: Support, at: Outcomes, width: int) -> Tensor:
    """Log-probabilities [N, V] of the teacher; the tail's mass is spread evenly over its tokens."""
    known_NK = support.logq > -math.inf
    rest_N = (width - known_NK.sum(-1)).clamp(min=1)
    tail_N = torch.where(at.counted[:, -1], at.logq[:, -1], math.log(FLOOR)) - rest_N.log()
    out_NV = tail_N[:, None].repeat(1, width)
    row_M, column_M = known_NK.nonzero(as_tuple=True)
    out_NV[row_M, support.ids[row_M, column_M]] = support.logq[row_M, column_M].to(out_NV)
    return out_NV
