"""Policy-gradient losses on sampled tokens, with control variates and several samples per prefix.

Shapes: B sequences, T completion tokens, N = valid tokens, H hidden width, V shared vocabulary, m
samples per prefix. p is the student, q the target (the teacher, or ExOPD's mixture), y ~ p a token.

    L = −(1/m) Σ_j A_j log p(y_j),   A_j = log q(y_j) − log p(y_j) − b   (detached)

A baseline b that does not depend on y leaves the expected gradient unchanged: that of KL(p ‖ q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from effopd.distill.divergence import Predictions, token_logprobs, weighted_mean
from effopd.distill.token_rows import row_logits, support_kl, tiles
from effopd.models.head import Head

#: Cap of π_θ(y) / π_sampler(y), the importance weight of the sampled loss.
_LARGEST_RATIO = 5.0

#: Names of the baselines; their formulas are in `baseline_of`.
BASELINES = ("none", "value", "optimal")


def baseline_of(logp_NV: Tensor, gap_NV: Tensor, kind: str, top_k: int = 0) -> Tensor:
    r"""Baseline b [N] of the advantage at N prefixes, from log p and the gap log q − log p.

    - `value`: $b = E_p[\log q − \log p] = −KL(p ‖ q)$. It is the value of one step, not of the rest
      of the answer. With `top_k`, both distributions are renormalized on the student's k likeliest
      tokens; k = 1 is no baseline.
    - `optimal`: $b = E_p[R n] / E_p[n]$ with R the gap and $n(y) = 1 − 2p(y) + \sum_v p(v)^2$, the
      squared norm of $∇_z \log p(y)$ in logit space. No other scalar baseline has a smaller
      variance of the logit gradient.

    Source: arXiv 2605.07865 (`value`); `optimal` is the standard result for score functions.
    """
    if kind == "value" and 0 < top_k < logp_NV.shape[-1]:
        top_NK, index_NK = logp_NV.topk(top_k)
        return -support_kl(top_NK, top_NK + gap_NV.gather(1, index_NK))
    p_NV = logp_NV.exp()
    if kind == "value":
        return (p_NV * gap_NV).sum(-1)
    square_N1 = (p_NV * p_NV).sum(-1, keepdim=True)
    norm_NV = p_NV * (1 - 2 * p_NV + square_N1)
    # E[n] = 1 − Σp² is 0 for a distribution on one token, whose gradient is 0 for every baseline
    return (norm_NV * gap_NV).sum(-1) / norm_NV.sum(-1).clamp(min=torch.finfo(p_NV.dtype).tiny)


def sampled_loss(
    h_student_BTH: Tensor,
    h_teacher_BTH: Tensor,
    student: Head,
    teacher: Head,
    completion_ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    num_items: Tensor | int | None,
    reference: tuple[Tensor, Head] | None = None,
    weight: float = 1.0,
    sampler_logps_BT: Tensor | None = None,
    by_answer: bool = False,
    *,
    baseline: str = "none",
    baseline_top_k: int = 0,
    samples: int = 1,
    weight_BT: Tensor | None = None,
    teacher_share_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The paper's policy-gradient form: $-\sum_t A_t \log π_θ(y_t)$, $A_t = \log π^*(y_t) − \log
    π_θ(y_t) − b$ detached.

    Its expectation over y_t ~ π_θ has the gradient of the reverse KL at every prefix. With one
    update per batch the PPO ratio is 1, so it and its clipping are left out.

    Args:
        num_items: as for `full_loss`.
        reference: hidden states and head of ExOPD's reference, which changes the advantage to $A_t
            = λ(\log π^*(y_t) − \log π_{ref}(y_t)) − (\log π_θ(y_t) − \log π_{ref}(y_t))$.
        weight: λ of ExOPD.
        sampler_logps_BT: log π_sampler(y_t) of answers that another engine sampled. Every sampled
            token is then weighted by $\min(π_θ(y_t) / π_{sampler}(y_t), 5)$, detached.
        by_answer: as for `full_loss`.
        baseline: one of `BASELINES`; "none": b = 0.
        baseline_top_k: number of the student's likeliest tokens for "value"; 0: all.
        samples: m, tokens per prefix: the answer's own, and m − 1 drawn here from π_θ with
            replacement. The loss is the mean over the m tokens.
        weight_BT: as for `full_loss`.
        teacher_share_B: α of answers whose tokens were drawn from $α π^* + (1−α) π_θ$, at the same
            weights. Every sampled token is then weighted by `mixture_weight`. `None`: 0.

    Returns:
        loss, Σ student entropy, number of valid tokens, like `full_loss`.

    Source: arXiv 2605.11739, section 2, and the cap 5 of its runs; ExOPD: 2602.12125; baseline:
    2605.07865; several samples: 2606.24143; mixed sampling: 2306.08543.
    """
    valid = mask_BT != 0
    targets_N = completion_ids_BT[valid]
    logp_student, entropy = token_logprobs(h_student_BTH[valid], student, targets_N, temperature)
    with torch.no_grad():
        logp_teacher, _ = token_logprobs(h_teacher_BTH[valid], teacher, targets_N, temperature)
        goal = logp_teacher
        if reference is not None:
            logp_reference, _ = token_logprobs(reference[0][valid], reference[1], targets_N, temperature)
            goal = weight * logp_teacher + (1 - weight) * logp_reference
    advantage = goal - logp_student.detach()
    drawn_NM = gap_NM = None
    if baseline != "none" or samples > 1:
        parts = [(1.0, Predictions(h_teacher_BTH[valid], teacher))]
        if reference is not None:
            parts = [(weight, parts[0][1]), (1 - weight, Predictions(reference[0][valid], reference[1]))]
        own = Predictions(h_student_BTH[valid].detach(), student)
        b_N, drawn_NM, gap_NM = _statistics(own, parts, temperature, baseline, baseline_top_k, samples - 1)
        advantage, gap_NM = advantage - b_N, gap_NM - b_N[:, None]
    if sampler_logps_BT is not None:
        advantage = advantage * importance(logp_student, sampler_logps_BT[valid])
    if teacher_share_B is not None:
        share_N = teacher_share_B[:, None].expand_as(valid)[valid]
        advantage = advantage * mixture_weight(logp_student, logp_teacher, share_N)
    value_N = -advantage * logp_student
    if samples > 1:
        assert drawn_NM is not None and gap_NM is not None
        ids_NM = torch.cat([targets_N[:, None], drawn_NM], dim=1)
        z_NM = row_logits(h_student_BTH[valid], student, ids_NM, temperature)
        logp_NM = logp_student[:, None] + z_NM[:, 1:] - z_NM[:, :1]  # one normalizer per prefix
        value_N = (value_N - (gap_NM * logp_NM).sum(1)) / samples
    return weighted_mean(value_N, valid, num_items, by_answer, weight_BT), entropy.sum(), valid.sum()


def importance(logp_N: Tensor, sampler_logps_N: Tensor) -> Tensor:
    """min(π_θ(y) / π_sampler(y), 5) [N], without gradient."""
    return (logp_N.detach() - sampler_logps_N).exp().clamp(max=_LARGEST_RATIO)


def mixture_weight(logp_N: Tensor, logq_N: Tensor, share_N: Tensor) -> Tensor:
    """p(y) / (α q(y) + (1−α) p(y)) [N], without gradient; at most 1/(1−α).

    Its product with any f(y) has the mean E_p[f] over y ~ α q + (1−α) p.

    Args:
        share_N: α in [0, 1).
    """
    ratio_N = (logq_N - logp_N.detach()).clamp(max=80).exp()  # finite, so that α = 0 gives 1
    return 1 / (1 + share_N * (ratio_N - 1))


@torch.no_grad()
def _statistics(
    student: Predictions,
    target: list[tuple[float, Predictions]],
    temperature: float,
    kind: str,
    top_k: int,
    draws: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Baselines [N], `draws` tokens per prefix sampled from p, and their gaps log q − log p.

    Args:
        student: hidden states [N, H] and head.
        target: log q as a weighted sum of log-probabilities: weight, and hidden states with head.
    """
    head, others = student.head.whole(), [(weight, each.hidden_BTH, each.head.whole()) for weight, each in target]
    parts = []
    for rows in tiles(len(student.hidden_BTH), head.weight.shape[0]):
        logp = head.logits(student.hidden_BTH[rows], temperature).log_softmax(-1)
        gap = sum(w * h.logits(hidden[rows], temperature).log_softmax(-1) for w, hidden, h in others) - logp
        b = logp.new_zeros(len(logp)) if kind == "none" else baseline_of(logp, gap, kind, top_k)
        ids = logp.exp().multinomial(draws, replacement=True) if draws else logp.new_zeros(len(logp), 0).long()
        parts.append((b, ids, gap.gather(1, ids)))
    if not parts:
        none = student.hidden_BTH.new_zeros(0, draws, dtype=torch.float32)
        return none.sum(1), none.long(), none
    baselines, drawn, gaps = zip(*parts, strict=True)
    return torch.cat(baselines), torch.cat(drawn), torch.cat(gaps)


def lowest_share(value_BT: Tensor, mask_BT: Tensor, share: float) -> Tensor:
    """Mask [B, T] of the ⌈share · n⌉ smallest values among the n valid tokens of each answer.

    The number depends on the lengths alone, so it is the same for every split into micro-batches.
    """
    valid = mask_BT != 0
    order_BT = value_BT.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return valid & (order_BT < share_sizes(mask_BT, share)[:, None])


def share_sizes(mask_BT: Tensor, share: float) -> Tensor:
    """⌈share · n⌉ [B] for the n valid tokens of each answer."""
    length_B = (mask_BT != 0).sum(1)
    return (share * length_B.double()).round(decimals=9).ceil().long()


def entropy_factor(entropy_BT: Tensor, chosen_BT: Tensor) -> Tensor:
    """1 + (H − H_min) / (H_max − H_min) [B, T] at chosen tokens, 0 elsewhere; 2 if all H agree.

    Args:
        entropy_BT: the student's entropy H, in nats.
        chosen_BT: bool; H_min and H_max are over these tokens of the answer.
    """
    low_B1 = entropy_BT.masked_fill(~chosen_BT, torch.inf).amin(1, keepdim=True)
    high_B1 = entropy_BT.masked_fill(~chosen_BT, -torch.inf).amax(1, keepdim=True)
    width_B1 = high_B1 - low_B1
    rank_BT = torch.where(width_B1 > 1e-12, (entropy_BT - low_B1) / width_B1, 1.0)
    return torch.where(chosen_BT, 1 + rank_BT, 0.0)


def negative_advantage_loss(
    h_student_BTH: Tensor,
    student: Head,
    completion_ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    num_items: Tensor | int | None,
    *,
    size: float,
    share: float,
    by_entropy: bool = False,
    by_answer: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A fixed advantage −c at the least likely sampled tokens: $c \sum_{t ∈ S} \log π_θ(y_t)$.

    A control without a teacher. S holds the ⌈share · n⌉ tokens of each answer that the student
    found least likely. All other tokens have loss 0 and count in the mean. With share = 1 the
    expected gradient is 0.

    Args:
        size: c > 0.
        share: share of the tokens of each answer, in (0, 1].
        by_entropy: OPSA: c times `entropy_factor`, from c to 2c.
        num_items: as for `full_loss`.
        by_answer: as for `full_loss`.

    Returns:
        loss, Σ student entropy, number of valid tokens, like `full_loss`.

    Source: arXiv 2608.31046, section 3.2 (c = 0.5, the lowest 20 %) and 4.2 (OPSA). Its code
    chooses and scales over the batch of a device and leaves the other tokens out of the mean.
    """
    valid = mask_BT != 0
    logp_N, entropy_N = token_logprobs(h_student_BTH[valid], student, completion_ids_BT[valid], temperature)
    logp_BT = torch.zeros(valid.shape, device=logp_N.device, dtype=logp_N.dtype)
    logp_BT[valid] = logp_N.detach()
    chosen_BT = lowest_share(logp_BT, mask_BT, share)
    size_N = size * chosen_BT[valid]
    if by_entropy:
        entropy_BT = torch.zeros_like(logp_BT)
        entropy_BT[valid] = entropy_N.detach().to(logp_BT.dtype)
        size_N = size * entropy_factor(entropy_BT, chosen_BT)[valid]
    return weighted_mean(size_N * logp_N, valid, num_items, by_answer), entropy_N.sum(), valid.sum()
