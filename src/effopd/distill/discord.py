"""DisCorD: cross-entropy on correct teacher answers, weighted by the student/teacher ratio.

    loss = −Σ_t w_t log π_θ(y_t) / count,   w_t = σ((log π_θ(y_t) − log q(y_t)) / τ) / mean σ

The weights are detached. The mean is over the tokens of an optimizer step, so their mean is 1 and
the rate keeps its meaning. A token that the student would not produce after this prefix has a small
weight; a sequence's weight does not depend on its length.

Our reading of arXiv 2605.14071, known to us from summaries only: a bounded (sigmoid) function of
the token's support ratio, on teacher answers that are correct. The expression inside the sigmoid,
its temperature τ and the normalization are our choice. The paper's weighted KL is left out, because
stored answers have no distribution of the teacher.

`effopd.distill.offline_loss.offline_loss` is the loss, with w in the place of the advantage.

Shapes: N valid tokens.
"""

from __future__ import annotations

from torch import Tensor


def support_weights(student_logp_N: Tensor, teacher_logp_N: Tensor, tau: float = 1.0) -> Tensor:
    """σ((log π_θ(y) − log q(y)) / τ) [N], in (0, 1), without gradient; 1/2 where both agree.

    Args:
        student_logp_N, teacher_logp_N: log-probabilities of the tokens, in nats.
        tau: temperature (> 0). As it grows, all weights tend to 1/2, and the normalized loss to
            plain cross-entropy.

    Example:
        >>> import torch
        >>> weight_N = support_weights(torch.tensor([-1.0, -4.0]), torch.tensor([-1.0, -1.0]))
        >>> [f"{weight:.3f}" for weight in weight_N]
        ['0.500', '0.047']
    """
    return ((student_logp_N.detach() - teacher_logp_N) / tau).float().sigmoid()


def normalized(weight_N: Tensor, mean: Tensor | float | None = None) -> Tensor:
    """Weights [N] divided by `mean`; default: their own mean. Empty weights stay empty."""
    if mean is None:
        mean = weight_N.mean() if len(weight_N) else 1.0
    return weight_N / mean
