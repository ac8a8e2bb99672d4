"""Local support matching: the reverse KL on the teacher's top K tokens, arXiv 2603.25562.

Shapes: B sequences, T completion tokens, N = valid tokens, H hidden width, V shared vocabulary, K
tokens per prefix. S is the set of the K tokens that the teacher finds likeliest at a prefix.

    p̂, q̂ = softmax of the student's and the teacher's logits, restricted to S
    L_t = KL(p̂ ‖ q̂) = Σ_{v∈S} p̂(v)(log p̂(v) − log q̂(v))

The gradient flows through p̂ alone. The student's logits are computed on S only. The same sum as a
detached advantage of the sampled token, a second path in the authors' code, does not depend on that
token, so its expected gradient is 0; it is not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effopd.distill.divergence import token_logprobs, weighted_mean
from effopd.distill.health import spread_subset
from effopd.distill.policy_gradient import lowest_share
from effopd.distill.token_rows import row_logits, support_kl, tiles
from effopd.models.head import Head

#: Number of positions, evenly spread, at which entropy and support are measured.
MEASURED = 256


@torch.no_grad()
def teacher_support(hidden_NH: Tensor, head: Head, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and logits [N, K] of the teacher's K likeliest tokens, the likeliest first."""
    head = head.whole()
    width = head.weight.shape[0]
    tops = [head.logits(hidden_NH[rows], temperature).topk(min(top_k, width)) for rows in tiles(len(hidden_NH), width)]
    if not tops:
        none = hidden_NH.new_zeros(0, min(top_k, width), dtype=torch.float32)
        return none.long(), none
    return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])


def top_k_loss(
    h_student_BTH: Tensor,
    h_teacher_BTH: Tensor,
    student: Head,
    teacher: Head,
    completion_ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    num_items: Tensor | int | None,
    *,
    top_k: int,
    entropy_share: float = 1.0,
    by_answer: bool = False,
    weight_BT: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, float]]:
    """KL(p̂ ‖ q̂) on the teacher's top K, mean over tokens, in nats.

    Args:
        num_items: as for `full_loss`.
        top_k: K ≥ 2; more than V means V, which is the full reverse KL.
        entropy_share: share of the tokens of each answer that are trained on, those at which the
            student's entropy is largest. Below 1 it costs a forward pass over V at every position.
        by_answer, weight_BT: as for `full_loss`.

    Returns:
        (loss, Σ student entropy, number of trained tokens) like `full_loss`, and metrics:
        `support_mass`, the student's probability of S, and `outside_support`, the share of sampled
        tokens that are not in S. Entropy and metrics are means over at most 256 positions.
    """
    student, teacher = student.whole(), teacher.whole()  # collective: before anything that a rank can skip
    count = int((mask_BT != 0).sum())
    if entropy_share < 1 and count:
        mask_BT = highest_entropy(h_student_BTH, student, completion_ids_BT, mask_BT, temperature, entropy_share)
    valid = mask_BT != 0
    ids_NK, teacher_NK = teacher_support(h_teacher_BTH[valid], teacher, top_k, temperature)
    student_NK = row_logits(h_student_BTH[valid], student, ids_NK, temperature)
    loss = weighted_mean(support_kl(student_NK, teacher_NK), valid, num_items, by_answer, weight_BT)
    if not count:
        return (loss, student_NK.detach().sum(), valid.sum()), {}
    flat_N, _ = spread_subset(mask_BT, MEASURED)
    place_N = (valid.reshape(-1).cumsum(0) - 1)[flat_N]  # index among the valid positions
    entropy_N, metrics = _measured(
        h_student_BTH.flatten(0, 1)[flat_N], student, completion_ids_BT.reshape(-1)[flat_N], ids_NK[place_N],
        student_NK[place_N], temperature,
    )  # fmt: skip
    return (loss, entropy_N.mean() * valid.sum(), valid.sum()), metrics


@torch.no_grad()
def highest_entropy(
    h_student_BTH: Tensor, student: Head, ids_BT: Tensor, mask_BT: Tensor, temperature: float, share: float
) -> Tensor:
    """Mask [B, T] of the ⌈share · n⌉ tokens of each answer with the largest student entropy."""
    valid = mask_BT != 0
    _, entropy_N = token_logprobs(h_student_BTH[valid], student, ids_BT[valid], temperature)
    entropy_BT = torch.zeros(valid.shape, device=entropy_N.device, dtype=entropy_N.dtype)
    entropy_BT[valid] = entropy_N
    return lowest_share(-entropy_BT, mask_BT, share)


@torch.no_grad()
def _measured(
    hidden_NH: Tensor, student: Head, targets_N: Tensor, ids_NK: Tensor, z_NK: Tensor, temperature: float
) -> tuple[Tensor, dict[str, float]]:
    """Student entropy [N], and how S covers the student."""
    logp_N, entropy_N = token_logprobs(hidden_NH, student, targets_N, temperature)
    normalizer_N = row_logits(hidden_NH, student, targets_N[:, None], temperature)[:, 0] - logp_N
    mass_N = (z_NK.float() - normalizer_N[:, None]).exp().sum(-1)
    outside_N = (ids_NK != targets_N[:, None]).all(-1)
    return entropy_N, {"support_mass": float(mass_N.mean()), "outside_support": float(outside_N.float().mean())}
