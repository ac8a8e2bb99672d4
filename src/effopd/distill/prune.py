"""Prune-OPD: token weights that fall with top-k disagreement, and a rollout length that follows.

    o_t = |top-k(p) ∩ top-k(q)| / k      C_t = #{u ≤ t : o_u < γ}
    R_t = max(0, 1 − d · C_t)            L_t = R_t + w      E = #{t : R_t > 10⁻⁸}

p is the student and q the teacher at the student's prefix. L_t weights the loss of token t, and E
is the reliable length of an answer. If enough answers are reliable up to the maximum length M, the
next step's M grows; after several steps without, it shrinks. M never cuts an answer in progress.

Differs from the paper: weights are divided by 1 + w unless `normalize` is false, so that an answer
without disagreement is trained as in plain OPD; the paper's L is also a 1 + w times larger rate.
The weights multiply the loss of the run, the full KL by default; the paper's is a student-top-k
reward.

Shapes: B answers, T tokens, N valid tokens, H hidden width, K = top-k.

Source: arXiv 2605.07804, and `verl/utils/prune_opd.py` of its code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effopd.distill.token_rows import tiles
from effopd.models.head import Head

#: A token with a larger R counts as reliable (the code's `positive_eps`).
RELIABLE = 1e-8


@torch.no_grad()
def top_k_overlap(h_student_NH: Tensor, h_teacher_NH: Tensor, student: Head, teacher: Head, top_k: int) -> Tensor:
    """o [N] = |top-k(p) ∩ top-k(q)| / k, in [0, 1]. Cost: both heads over the whole vocabulary."""
    student, teacher = student.whole(), teacher.whole()  # collective: before anything that a rank can skip
    width = student.weight.shape[0]
    count, parts = min(top_k, width), [h_student_NH.new_zeros(0, dtype=torch.float32)]
    for rows in tiles(len(h_student_NH), width):
        own_NK = student.logits(h_student_NH[rows]).topk(count).indices
        other_NK = teacher.logits(h_teacher_NH[rows]).topk(count).indices
        parts.append((own_NK[:, :, None] == other_NK[:, None, :]).any(-1).sum(-1) / count)
    return torch.cat(parts)


def reliability(bad_BT: Tensor, drop: float) -> Tensor:
    """R [B, T] = max(0, 1 − d · number of bad tokens so far, the token included), in float32.

    Example:
        >>> bad = torch.tensor([[False, False, True, False, True]])
        >>> [round(r, 2) for r in reliability(bad, 0.01)[0].tolist()]
        [1.0, 1.0, 0.99, 0.99, 0.98]
    """
    return (1 - drop * bad_BT.long().cumsum(1).double()).clamp(min=0).float()


def token_weights(reliability_BT: Tensor, base: float, *, normalize: bool = True) -> Tensor:
    """L = R + w; with `normalize`, (R + w) / (1 + w), which is 1 without a bad token.

    Example:
        >>> token_weights(torch.tensor([1.0, 0.0]), 0.5, normalize=False).tolist()
        [1.5, 0.5]
    """
    weight = reliability_BT + base
    return weight / (1 + base) if normalize else weight


def reliable_lengths(reliability_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """E [B]: number of valid tokens with R > 10⁻⁸."""
    return ((reliability_BT > RELIABLE) & valid_BT).sum(1)


@dataclass(frozen=True)
class Limits:
    """Constants of the length controller.

    Attributes:
        low, high: bounds of M, in tokens.
        step: change of M, in tokens.
        margin: an answer with E ≥ max(low, M − margin) hits the limit, in tokens.
        share: share of answers that must hit it for M to grow, in [0, 1].
        patience: consecutive steps below `share` after which M shrinks.
    """

    low: int
    high: int
    step: int = 100
    margin: int = 100
    share: float = 0.1
    patience: int = 3

    def hit_length(self, length: int) -> int:
        """Reliable tokens at which an answer hits the limit M = `length`."""
        return max(self.low, length - self.margin)


@dataclass(frozen=True)
class Controller:
    """State of the length controller: M, and the steps since M last changed or was hit."""

    length: int
    misses: int = 0

    def next(self, hit_share: float, limits: Limits) -> Controller:
        """State after a step in which `hit_share` of the answers hit the limit.

        Example:
            >>> state, limits = Controller(2048), Limits(1024, 12288)
            >>> for share in (0.1, 0.0, 0.09, 0.05):
            ...     state = state.next(share, limits)
            ...     print(state.length, state.misses)
            2148 0
            2148 1
            2148 2
            2048 0
        """
        if hit_share >= limits.share:
            return Controller(min(limits.high, self.length + limits.step))
        if self.misses + 1 >= limits.patience:
            return Controller(max(limits.low, self.length - limits.step))
        return replace(self, misses=self.misses + 1)
