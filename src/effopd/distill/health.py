"""Token-level health metrics of distillation, on a bounded number of tokens per step.

Shapes: N tokens, V vocabulary, K = top-k. p is the student, q the teacher, y the sampled token; all
logs are natural (nats). Metrics that arXiv 2604.13016 names follow its METHOD section. The overlap
advantage renormalizes both distributions on the intersection; another definition in use does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import is_sharded
from effopd.common.zero import is_zero
from effopd.distill.divergence import Answers, Head, Predictions, token_logprobs
from effopd.distill.token_rows import tiles

TOP_K = 16

#: Logits [N, V], or a function that returns those of a slice of the N positions.
Logits = Tensor | Callable[[slice], Tensor]


class HealthProbe:
    """Health metrics of logged steps.

    `after_loss` keeps hidden states during a forward; `after_step` measures them once no forward is
    running.

    Args:
        tokens: maximum number of positions measured per logged step; 0: none.
        temperature: temperature of both distributions.
    """

    def __init__(self, tokens: int, temperature: float):
        self._tokens, self._temperature = tokens, temperature
        self._rows: dict[str, Any] | None = None
        self._gap = [0.0, 0.0]  # Σ |Δ log p| and number of tokens in the current step

    def due(self, state: Any) -> bool:
        """Whether the current step will be logged and measured.

        Args:
            state: a `TrainerState`.
        """
        every = max(int(state.logging_steps or 1), 1)
        return bool(self._tokens) and (state.global_step + 1) % every == 0

    def after_loss(
        self,
        model: Any,
        student: Predictions,
        teacher: Predictions | Callable[[Tensor], Tensor] | None,
        answers: Answers,
        *,
        due: bool,
    ) -> None:
        """Keep positions of a micro-batch; called inside the forward that computes its loss.

        Args:
            model: the student.
            teacher: required if `due`. A function returns its float32 logits [N, V] at flat indices
                into the B·T positions; it is called at most once per step.
            due: whether the step is measured (`HealthProbe.due`). Recorded sampler
                log-probabilities are compared in any case.
        """
        if due and teacher is not None and self._rows is None and bool(answers.mask_BT.any()):
            index_N, position_N = spread_subset(answers.mask_BT, self._tokens)
            self._rows = {
                "student": student.hidden_BTH.detach().flatten(0, 1)[index_N],
                "teacher": self._kept(teacher, index_N),
                "targets": answers.ids_BT.reshape(-1)[index_N],
                "position": position_N,
            }
            # shards are whole only inside the forward; DeepSpeed takes the step before `after_step`
            if is_sharded(model) or any(map(is_zero, model.parameters())):
                with torch.no_grad(), torch.autocast(index_N.device.type, enabled=False):
                    self._rows["logits"] = student.head.logits(self._rows["student"], self._temperature)
                    if isinstance(teacher, Predictions):
                        self._rows["teacher"] = teacher.head.logits(self._rows["teacher"], self._temperature)
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
    def after_step(self, heads: Callable[[], tuple[Head, Head | None]]) -> dict[str, float]:
        """Metrics of the step that just ended, keyed as in its row; empty if nothing was kept.

        `health/sampler_logp_gap` is the mean |log π_sampler(y) − log π_train(y)|, in nats, over the
        recorded tokens.

        Args:
            heads: returns the student's and the teacher's head; called only if needed. The second
                can be `None` if `after_loss` was given the teacher's logits.
        """
        metrics: dict[str, float] = {}
        rows, self._rows = self._rows, None
        if rows is not None:
            student, teacher = (None, None) if "logits" in rows else heads()
            own = rows["logits"] if student is None else self._logits(student, rows["student"])
            metrics = self._rows_measured(own, teacher, rows)
        (total, tokens), self._gap = self._gap, [0.0, 0.0]
        if tokens:
            metrics["sampler_logp_gap"] = total / tokens
        return {f"health/{name}": value for name, value in metrics.items()}

    def _kept(self, teacher: Any, index_N: Tensor) -> Any:
        """What the metrics need of the teacher, at positions with these indices into B·T."""
        return teacher.hidden_BTH.flatten(0, 1)[index_N] if isinstance(teacher, Predictions) else teacher(index_N)

    def _rows_measured(self, student: Logits, teacher: Head | None, rows: dict[str, Any]) -> dict[str, float]:
        """`health_metrics` of the kept rows; without a head, `rows['teacher']` are logits."""
        other = rows["teacher"] if teacher is None else self._logits(teacher, rows["teacher"])
        return health_metrics(student, other, rows["targets"], rows["position"])

    def _logits(self, head: Head, hidden_NH: Tensor) -> Logits:
        """The head's logits of a slice of the positions."""
        whole = head.whole()  # collective: once, not per tile
        return lambda rows: whole.logits(hidden_NH[rows], self._temperature)


@torch.no_grad()
def health_metrics(
    student: Logits, teacher: Logits, targets_N: Tensor, position_N: Tensor, top_k: int = TOP_K
) -> dict[str, float]:
    """Health of N student-visited positions, a tile of them at a time.

    Args:
        student, teacher: float32 logits [N, V] at the sampling temperature, or a function that
            returns the rows of a slice.
        position_N: relative position in the completion, in [0, 1); selects the quarter.
        top_k: size of the two top-k sets, at most V.

    Returns:
        - `sampled_reverse_kl` and `_p95`: mean and 95th percentile of log p(y) − log q(y);
        - `reverse_kl`, `reverse_kl_q1` … `_q4`: exact KL(p ‖ q), overall and by position quarter
            (NaN: no token in that quarter);
        - `overlap_ratio`: |top-k(p) ∩ top-k(q)| / k; `student_overlap_mass`,
          `teacher_overlap_mass`: probability of the intersection under p and under q;
        - `overlap_advantage`: Σ p̂ (log q̂ − log p̂) with p̂, q̂ renormalized on the intersection,
          mean over tokens with a nonempty intersection (NaN: none);
        - `student_entropy`, `teacher_entropy`, and `entropy_gap`, the mean |difference| per token.
    """
    width = _rows(student, slice(0, 1)).shape[-1]
    parts = [
        _health_of_rows(_rows(student, rows), _rows(teacher, rows), targets_N[rows], min(top_k, width))
        for rows in tiles(len(targets_N), width)
    ]
    of = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    metrics = {
        "sampled_reverse_kl": of["sampled"].mean(),
        "sampled_reverse_kl_p95": of["sampled"].quantile(0.95),
        "reverse_kl": of["exact"].mean(),
        "overlap_ratio": of["overlap"].mean(),
        "student_overlap_mass": of["student_mass"].mean(),
        "teacher_overlap_mass": of["teacher_mass"].mean(),
        "overlap_advantage": of["advantage"][of["overlap"] > 0].mean(),
        "student_entropy": of["student_entropy"].mean(),
        "teacher_entropy": of["teacher_entropy"].mean(),
        "entropy_gap": (of["student_entropy"] - of["teacher_entropy"]).abs().mean(),
    }
    quarter = (position_N * 4).long().clamp(0, 3)
    for index in range(4):
        metrics[f"reverse_kl_q{index + 1}"] = of["exact"][quarter == index].mean()
    return {name: float(value) for name, value in metrics.items()}


def _rows(logits: Logits, rows: slice) -> Tensor:
    """The logits of these rows."""
    return logits[rows] if isinstance(logits, Tensor) else logits(rows)


def _health_of_rows(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, k: int) -> dict[str, Tensor]:
    """The values [N] that `health_metrics` averages; without overlap `advantage` is NaN."""
    logp, logq = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    gap, p = logp - logq, logp.exp()
    entropy_p = -(p * logp).sum(-1)
    sampled, exact = gap.gather(1, targets_N[:, None])[:, 0], (p * gap).sum(-1)
    del gap, p
    top_NK, other_NK = logp.topk(k).indices, logq.topk(k).indices
    both_NK = (top_NK[:, :, None] == other_NK[:, None, :]).any(-1)
    logp_NK, logq_NK = (logs.gather(1, top_NK).masked_fill(~both_NK, -torch.inf) for logs in (logp, logq))
    hat_NK = logp_NK.log_softmax(-1)
    advantage_NK = hat_NK.exp() * (logq_NK.log_softmax(-1) - hat_NK)
    return {
        "sampled": sampled,
        "exact": exact,
        "overlap": both_NK.sum(-1) / k,
        "student_mass": logp_NK.exp().sum(-1),
        "teacher_mass": logq_NK.exp().sum(-1),
        "advantage": advantage_NK.where(both_NK, 0.0).sum(-1).where(both_NK.any(-1), torch.nan),
        "student_entropy": entropy_p,
        "teacher_entropy": -(logq.exp() * logq).sum(-1),
    }


def spread_subset(mask_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` valid positions, evenly spread over the batch, and their relative positions.

    Deterministic: measuring draws no random numbers.

    Returns:
        flat indices into B·T [N], and relative positions among the valid tokens of their rows [N],
        in [0, 1).
    """
    valid = mask_BT.reshape(-1).nonzero()[:, 0]
    chosen = valid[torch.linspace(0, len(valid) - 1, min(count, len(valid)), device=valid.device).round().long()]
    order_BT = mask_BT.long().cumsum(1) - 1
    length_B = mask_BT.long().sum(1).clamp(min=1)
    relative_BT = order_BT / length_B[:, None]
    return chosen, relative_BT.reshape(-1)[chosen]
