"""Is this distillation healthy? Token-level measures on a bounded number of tokens a step.

Shapes: N tokens, V vocabulary, K = top-k. p is the student, q the teacher, y the sampled token; all logs natural
(nats). Definitions follow METHOD of arXiv 2604.13016 where names coincide; the overlap-token advantage renormalises
both distributions on the intersection (another definition in use does not).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP_K = 16


@torch.no_grad()
def health_metrics(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, targets_N: Tensor, position_N: Tensor, top_k: int = TOP_K
) -> dict[str, float]:
    """Health of N student-visited positions.

    Args:
        position_N: relative position in its completion, in [0, 1); decides the quarter.
        top_k: size of the two top-k sets (cut to V).

    Returns:
        - `sampled_reverse_kl` and `_p95`: mean and 95th percentile of log p(y) − log q(y);
        - `reverse_kl`, `reverse_kl_q1` … `_q4`: exact KL(p ‖ q), overall and by position quarter (NaN: no token there);
        - `overlap_ratio`: |top-k(p) ∩ top-k(q)| / k; `student_overlap_mass`, `teacher_overlap_mass`: the probability
          each puts on the intersection;
        - `overlap_advantage`: Σ p̂ (log q̂ − log p̂) with p̂, q̂ renormalised on the intersection, mean over tokens
          whose intersection is not empty (NaN: none);
        - `student_entropy`, `teacher_entropy`, `entropy_gap` = |difference of the two per token|.
    """
    logp, logq = student_logits_NV.log_softmax(-1), teacher_logits_NV.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    sampled = (logp - logq).gather(1, targets_N[:, None])[:, 0]
    exact = (p * (logp - logq)).sum(-1)
    entropy_p, entropy_q = -(p * logp).sum(-1), -(q * logq).sum(-1)
    k = min(top_k, logp.shape[-1])
    in_p = torch.zeros_like(logp, dtype=torch.bool).scatter_(1, logp.topk(k).indices, True)
    in_q = torch.zeros_like(in_p).scatter_(1, logq.topk(k).indices, True)
    both = in_p & in_q
    nonempty = both.any(-1)
    logp_hat = logp.masked_fill(~both, -torch.inf).log_softmax(-1)[nonempty]
    logq_hat = logq.masked_fill(~both, -torch.inf).log_softmax(-1)[nonempty]
    advantage = torch.where(both[nonempty], logp_hat.exp() * (logq_hat - logp_hat), 0.0).sum(-1)
    metrics = {
        "sampled_reverse_kl": sampled.mean(),
        "sampled_reverse_kl_p95": sampled.quantile(0.95),
        "reverse_kl": exact.mean(),
        "overlap_ratio": both.sum(-1).float().mean() / k,
        "student_overlap_mass": (p * both).sum(-1).mean(),
        "teacher_overlap_mass": (q * both).sum(-1).mean(),
        "overlap_advantage": advantage.mean(),
        "student_entropy": entropy_p.mean(),
        "teacher_entropy": entropy_q.mean(),
        "entropy_gap": (entropy_p - entropy_q).abs().mean(),
    }
    quarter = (position_N * 4).long().clamp(0, 3)
    for index in range(4):
        metrics[f"reverse_kl_q{index + 1}"] = exact[quarter == index].mean()
    return {name: float(value) for name, value in metrics.items()}


def spread_subset(mask_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` valid positions, evenly spread over the batch, and their relative positions.

    Deterministic, so that measuring does not draw random numbers.

    Returns:
        (flat indices into B·T [N], relative position of each in its row's valid tokens, in [0, 1) [N])
    """
    valid = mask_BT.reshape(-1).nonzero()[:, 0]
    chosen = valid[torch.linspace(0, len(valid) - 1, min(count, len(valid)), device=valid.device).round().long()]
    order_BT = mask_BT.long().cumsum(1) - 1
    length_B = mask_BT.long().sum(1).clamp(min=1)
    relative_BT = order_BT / length_B[:, None]
    return chosen, relative_BT.reshape(-1)[chosen]
