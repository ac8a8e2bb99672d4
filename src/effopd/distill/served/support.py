r"""Divergence from a teacher whose top k is known: exact on k tokens, one bucket for the rest.

Shapes: N positions, B sequences, T answer tokens, K tokens per position, H hidden width, V shared
vocabulary. p is the student, q the teacher, S the teacher's K likeliest tokens, T all others.

    p_T = 1 − Σ_{v∈S} p(v),   q_T = 1 − Σ_{v∈S} q(v)
    D_S = Σ_{v∈S} p(v) log(p(v)/q(v)) + p_T log(p_T/q_T)          reverse KL of K + 1 outcomes
    D   = D_S + p_T · KL(p(·|T) ‖ q(·|T))                         reverse KL over V

So D_S ≤ D, with equality for K = V. The same holds for the forward KL and the divergences between
(data processing inequality). The bias of the reverse KL is the second term. It vanishes with p_T
and has no other bound without the teacher's tail. Answers y ~ p estimate it without bias, because
the server returns log q(y) for every sampled token, in S or not:

    tail_kl = 1[y ∉ S] · (log p(y) − log p_T − log q(y) + log q_T),   E_p[tail_kl] = D − D_S
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from effopd.distill.divergence import token_logprobs
from effopd.distill.token_rows import row_logits
from effopd.models.head import Head

#: Smallest mass of the tail. Log-probabilities in float32 resolve no smaller difference from 1.
FLOOR = 2.0**-22


class Support(NamedTuple):
    """The teacher's K likeliest tokens at [B, T] or [N] positions.

    Attributes:
        ids: token ids, […, K].
        logq: their log-probabilities in nats, […, K]; −∞: no token.
        sampled: log-probability of the answer's own token, […].
    """

    ids: Tensor
    logq: Tensor
    sampled: Tensor

    def to(self, device: torch.device) -> Self:
        """Copy on `device`."""
        return type(self)(*(part.to(device) for part in self))

    def where(self, chosen: Tensor) -> Self:
        """The positions that a mask or an index over the positions selects, [N]."""
        return type(self)(*(part[chosen] for part in self))

    def finite(self) -> bool:
        """Whether the log-probabilities of the answers' tokens are finite."""
        return bool(torch.isfinite(self.sampled).all())

    def at(self, index_N: Tensor) -> Self:
        """The positions with these indices into B·T, [N]."""
        return type(self)(self.ids.flatten(0, 1), self.logq.flatten(0, 1), self.sampled.flatten()).where(index_N)


class Outcomes(NamedTuple):
    """Log-probabilities of the K + 1 outcomes under student and teacher, and their place.

    Attributes:
        logp, logq: [N, K + 1]; the tail comes last.
        counted: [N, K + 1], whether the outcome exists.
        sampled: [N], log p(y).
        entropy: [N], the student's entropy over V.
    """

    logp: Tensor
    logq: Tensor
    counted: Tensor
    sampled: Tensor
    entropy: Tensor


def outcomes(hidden_NH: Tensor, head: Head, support: Support, targets_N: Tensor, temperature: float = 1.0) -> Outcomes:
    """Both distributions on the support and its tail; the student's are differentiable.

    Cost: one pass over V per position for the normalizer, and K rows.

    Args:
        head: the student's whole output layer, cut to the vocabulary.
        targets_N: the answers' own tokens y.
    """
    sampled_N, entropy_N = token_logprobs(hidden_NH, head, targets_N, temperature)
    rows_NK = torch.cat([support.ids, targets_N[:, None]], dim=1)
    z_NK = row_logits(hidden_NH, head, rows_NK, temperature)
    logp_NK = sampled_N[:, None] + z_NK[:, :-1] - z_NK[:, -1:]  # one normalizer per position
    return with_tails(logp_NK, support, head.weight.shape[0], sampled_N, entropy_N)


def with_tails(logp_NK: Tensor, support: Support, width: int, sampled_N: Tensor, entropy_N: Tensor) -> Outcomes:
    """Outcomes from the student's log-probabilities on the support.

    Args:
        width: V.
        sampled_N, entropy_N: log p(y) and the student's entropy.
    """
    known_NK = support.logq > -math.inf
    whole_N1 = known_NK.sum(-1, keepdim=True) >= width
    counted = torch.cat([known_NK, ~whole_N1], dim=1)
    return Outcomes(
        _with_tail(logp_NK, known_NK), _with_tail(support.logq.to(logp_NK), known_NK), counted, sampled_N, entropy_N
    )


def _with_tail(logs_NK: Tensor, known_NK: Tensor) -> Tensor:
    """Log-probabilities with that of the tail appended; 0 for tokens that do not exist."""
    logs_NK = logs_NK.masked_fill(~known_NK, 0.0)
    mass_N1 = (logs_NK.exp() * known_NK).sum(-1, keepdim=True)
    return torch.cat([logs_NK, (1 - mass_N1).clamp(min=FLOOR).log()], dim=1)


def divergence(at: Outcomes, beta: float) -> Tensor:
    """Divergence [N] of the K + 1 outcomes, in nats; a lower bound of that over the vocabulary.

    β = 1 is KL(p ‖ q), β = 0 is KL(q ‖ p). Between them it is (1−β) KL(p ‖ m) + β KL(q ‖ m) with
    m = (1−β) p + β q.
    """
    logp, logq = at.logp, at.logq
    if beta == 1:
        terms = logp.exp() * (logp - logq)
    elif beta == 0:
        terms = logq.exp() * (logq - logp)
    else:
        logm = torch.logaddexp(logp + math.log1p(-beta), logq + math.log(beta))
        terms = (1 - beta) * logp.exp() * (logp - logm) + beta * logq.exp() * (logq - logm)
    return torch.where(at.counted, terms, 0.0).sum(-1)


def renormalized(at: Outcomes) -> Tensor:
    """KL(p̂ ‖ q̂) [N], both renormalized on the support, as `effopd.distill.top_k`; in nats."""
    known = at.counted[:, :-1]
    logp, logq = (
        logs[:, :-1].masked_fill(~known, -math.inf).log_softmax(-1).masked_fill(~known, 0.0)
        for logs in (at.logp, at.logq)
    )
    return torch.where(known, logp.exp() * (logp - logq), 0.0).sum(-1)


class Tail(NamedTuple):
    """What the support leaves out, [N].

    Attributes:
        teacher: q_T.
        student: p_T.
        kl: `tail_kl`, whose mean over answers y ~ p is the bias of the reverse KL, in nats.
        outside: whether y is in the tail.
    """

    teacher: Tensor
    student: Tensor
    kl: Tensor
    outside: Tensor


@torch.no_grad()
def tail_of(at: Outcomes, support: Support, targets_N: Tensor) -> Tail:
    """Mass of both models outside the support, and the sampled estimate of the bias."""
    open_N = at.counted[:, -1]
    inside_N = ((support.ids == targets_N[:, None]) & (support.logq > -math.inf)).any(-1)
    outside_N = open_N & ~inside_N
    kl_N = at.sampled - at.logp[:, -1] - support.sampled.to(at.sampled) + at.logq[:, -1]
    teacher_N, student_N = (torch.where(open_N, logs[:, -1].exp(), 0.0) for logs in (at.logq, at.logp))
    return Tail(teacher_N, student_N, torch.where(outside_N, kl_N, 0.0), outside_N)
