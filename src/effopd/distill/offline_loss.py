"""Offline objective and drift statistics of Lightning OPD, as functions of log-probabilities.

    loss = −Σ_t A_t log π_θ(y_t) / count,   A_t = clip(log q(y_t) − log π_θ(y_t), −c, c), detached

The answers y are stored samples of π_ref, the student at the start, and log q(y) is stored with
them. Differs from the release of arXiv 2604.13010, which does not clip; the clip is the paper's.

The raw objective E_ref[log q(y) − log π_θ(y)] is a surrogate: only its gradient, with A detached,
leads toward the teacher. Its value must not decide anything, and nothing here reports it as a
score.

Shapes: B answers, T tokens, N valid tokens, K teacher tokens per position, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from effopd.distill.divergence import weighted_mean
from effopd.distill.token_rows import row_logits, support_kl
from effopd.models.head import Head


def clipped_advantage(teacher_logp_N: Tensor, student_logp_N: Tensor, clip: float) -> Tensor:
    """A = clip(log q(y) − log π_θ(y), −c, c) [N], in nats, without gradient.

    Example:
        >>> import torch
        >>> clipped_advantage(torch.tensor([-1.0, -30]), torch.tensor([-3.0, -1]), 10).tolist()
        [2.0, -10.0]
    """
    return (teacher_logp_N - student_logp_N.detach()).clamp(-clip, clip)


def offline_loss(
    student_logp_N: Tensor,
    factor_N: Tensor,
    valid_BT: Tensor,
    num_items: Tensor | int | None,
    by_answer: bool = False,
) -> Tensor:
    """−Σ A log π_θ(y) / `num_items`; by answer, every token also counts 1 / length of its answer.

    Args:
        student_logp_N: log π_θ(y) at the valid positions, row by row, with gradient.
        factor_N: A, detached: the clipped advantage, or DisCorD's weight.
        num_items: divisor over all processes; `None`: the tokens (or answers) of this batch.
    """
    return weighted_mean(-factor_N * student_logp_N, valid_BT, num_items, by_answer)


@dataclass(frozen=True)
class DriftSums:
    """Sums over tokens of the ratio r = π_θ(y) / π_ref(y) and its square; they add up.

    For fresh samples of π_ref, E[r] = 1 and E[(r − 1)²] is the mean χ²(π_θ ‖ π_ref) per token. A
    mean away from 1 therefore shows that the weights fit these stored samples in particular.

    Attributes:
        tokens: number of tokens.
        ratio, square: Σ r and Σ r².
        clipped: number of tokens whose advantage was clipped.
        advantage: Σ A, in nats.
        weight: Σ of DisCorD's weights before normalization; `None`: the loss has advantages.
    """

    tokens: float = 0.0
    ratio: float = 0.0
    square: float = 0.0
    clipped: float = 0.0
    advantage: float = 0.0
    weight: float | None = None

    @classmethod
    def of(
        cls,
        student_logp_N: Tensor,
        reference_logp_N: Tensor,
        gap_N: Tensor | None = None,
        clip: float = 0.0,
        weight_N: Tensor | None = None,
    ) -> DriftSums:
        """Sums of a batch.

        Args:
            gap_N: the advantage before clipping at ±`clip`.
            weight_N: DisCorD's weights.
        """
        ratio_N = (student_logp_N.detach() - reference_logp_N).double().exp()
        advantage = clipped = 0.0
        if gap_N is not None:
            advantage = float(gap_N.clamp(-clip, clip).double().sum())
            clipped = float((gap_N.abs() > clip).sum())
        weight = None if weight_N is None else float(weight_N.double().sum())
        return cls(
            float(len(ratio_N)), float(ratio_N.sum()), float(ratio_N.square().sum()), clipped, advantage, weight
        )

    def __add__(self, other: DriftSums) -> DriftSums:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "weight"}
        weights = [each.weight for each in (self, other) if each.weight is not None]
        return DriftSums(**sums, weight=sum(weights) if weights else None)

    @property
    def mean(self) -> float:
        """Mean of r over tokens; NaN without tokens."""
        return self.ratio / self.tokens if self.tokens else float("nan")

    @property
    def std(self) -> float:
        """Standard deviation of r over tokens."""
        return max(self.square / self.tokens - self.mean**2, 0.0) ** 0.5 if self.tokens else float("nan")

    def inside(self, band: float) -> bool:
        """Whether the mean is in [1 − band, 1 + band]; false if it is NaN."""
        return abs(self.mean - 1) <= band + 1e-12

    def metrics(self) -> dict[str, float]:
        """The statistics of a step by their names in its row; empty without tokens."""
        if not self.tokens:
            return {}
        ratio = {"offline/ratio_mean": self.mean, "offline/ratio_std": self.std}
        if self.weight is not None:
            return {**ratio, "offline/weight_mean": self.weight / self.tokens}
        return {
            **ratio,
            "offline/advantage_mean": self.advantage / self.tokens,
            "offline/clipped_share": self.clipped / self.tokens,
        }


def top_k_kl(hidden_NH: Tensor, head: Head, top_ids_NK: Tensor, top_logp_NK: Tensor, temperature: float) -> Tensor:
    """KL(π̂_θ ‖ q̂) [N] in nats, both renormalized on the teacher's K stored tokens.

    It projects the student's hidden states on K rows of the head only. It is 0 if both agree on the
    stored tokens, whatever the student's mass on other tokens.
    """
    return support_kl(row_logits(hidden_NH, head, top_ids_NK, temperature), top_logp_NK)
