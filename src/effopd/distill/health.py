"""Is this distillation healthy? Token-level measures on a bounded number of tokens per step.

Shapes: N tokens, V vocabulary, K = top-k. p is the student, q the teacher, y the sampled token; all
logs natural (nats). Definitions follow METHOD of arXiv 2604.13016 where names coincide; the
overlap-token advantage renormalises both distributions on the intersection (another definition in
use does not).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from effopd.distill.divergence import Answers, Head, Predictions, token_logprobs

TOP_K = 16


class HealthProbe:
    """Health of the logged steps: `after_loss` keeps what `after_step` measures, when no forward is
    running.

    Args:
        tokens: positions that are measured per logged step; 0 measures none.
        temperature: of the distributions that are compared.
    """

    def __init__(self, tokens: int, temperature: float):
        self._tokens, self._temperature = tokens, temperature
        self._rows: dict[str, Tensor] | None = None
        self._gap = [0.0, 0.0]  # Σ |Δ log p| and tokens, of the present step

    def due(self, state: Any) -> bool:
        """Whether the step under way will be logged.

        Args:
            state: a `TrainerState`.
        """
        every = max(int(state.logging_steps or 1), 1)
        return bool(self._tokens) and (state.global_step + 1) % every == 0

    def after_loss(
        self, model: Any, student: Predictions, teacher: Predictions, answers: Answers, *, due: bool
    ) -> None:
        """A micro-batch, in the forward of its loss.

        Args:
            model: the student.
            due: see the method.
        """
        if due and self._rows is None and bool(answers.mask_BT.any()):
            index_N, position_N = spread_subset(answers.mask_BT, self._tokens)
            self._rows = {
                "student": student.hidden_BTH.detach().flatten(0, 1)[index_N],
                "teacher": teacher.hidden_BTH.flatten(0, 1)[index_N],
                "targets": answers.ids_BT.reshape(-1)[index_N],
                "position": position_N,
            }
            if isinstance(model, FSDPModule):  # its head is whole only now
                with torch.no_grad(), torch.autocast(index_N.device.type, enabled=False):
                    self._rows["logits"] = student.head.logits(self._rows["student"], self._temperature)
        if answers.sampler_logps_BT is not None:
            self._compare_sampler(student, answers, answers.sampler_logps_BT)

    @torch.no_grad()
    def _compare_sampler(self, student: Predictions, answers: Answers, sampler_BT: Tensor) -> None:
        """Add |log π_sampler(y) − log π_train(y)| of the recorded answers."""
        known = (answers.mask_BT != 0) & ~sampler_BT.isnan()
        if not bool(known.any()):
            return
        hidden_NH = student.hidden_BTH.detach()[known]
        logp_N, _ = token_logprobs(hidden_NH, student.head, answers.ids_BT[known], self._temperature)
        self._gap[0] += float((sampler_BT[known] - logp_N).abs().sum())
        self._gap[1] += float(known.sum())

    @torch.no_grad()
    def after_step(self, heads: Callable[[], tuple[Head, Head]]) -> dict[str, float]:
        """The metrics of the step that just ended, by their names in its row; none if it is not
        logged.

        `health/sampler_logp_gap` is the mean |log π_sampler(y) − log π_train(y)|, in nats, over the
        recorded tokens.

        Args:
            heads: the student's and the teacher's, asked for where they are needed.
        """
        metrics: dict[str, float] = {}
        rows, self._rows = self._rows, None
        if rows is not None:
            student, teacher = heads()
            logits_NV = rows["logits"] if "logits" in rows else student.logits(rows["student"], self._temperature)
            other_NV = teacher.logits(rows["teacher"], self._temperature)
            metrics = health_metrics(logits_NV, other_NV, rows["targets"], rows["position"])
        (total, tokens), self._gap = self._gap, [0.0, 0.0]
        if tokens:
            metrics["sampler_logp_gap"] = total / tokens
        return {f"health/{name}": value for name, value in metrics.items()}


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
        - `reverse_kl`, `reverse_kl_q1` … `_q4`: exact KL(p ‖ q), overall and by position quarter
            (NaN: no token there);
        - `overlap_ratio`: |top-k(p) ∩ top-k(q)| / k; `student_overlap_mass`,
          `teacher_overlap_mass`: the probability each puts on the intersection;
        - `overlap_advantage`: Σ p̂ (log q̂ − log p̂) with p̂, q̂ renormalised on the intersection,
          mean over tokens whose intersection is not empty (NaN: none);
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
        (flat indices into B·T [N], relative position of each in its row's valid tokens, in [0, 1)
        [N])
    """
    valid = mask_BT.reshape(-1).nonzero()[:, 0]
    chosen = valid[torch.linspace(0, len(valid) - 1, min(count, len(valid)), device=valid.device).round().long()]
    order_BT = mask_BT.long().cumsum(1) - 1
    length_B = mask_BT.long().sum(1).clamp(min=1)
    relative_BT = order_BT / length_B[:, None]
    return chosen, relative_BT.reshape(-1)[chosen]
