"""The look-ahead's divergence from a served teacher, asked once at most, and its slope."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effopd.distill.served.measure import outcomes_of
from effopd.distill.served.support import Support, divergence, outcomes
from effopd.distill.served.teacher import scored_part, scored_support
from effopd.distill.teachers.several import Part
from effopd.distill.token_rows import row_logits
from effopd.extrapolate.movable import MovableWeights
from effopd.extrapolate.moving_head import line_head
from effopd.models.ray import MovingHead, RayKL
from effopd.models.token_batch import TokenBatch

#: A batch's top k of the teacher and its tokens, at the scored positions.
Asked = tuple[Support, Tensor]


class ServedDivergence:
    """The divergence that a `ServedOPDTrainer` minimizes, on the teacher's support.

    The teacher's part is asked for at most once per search; all candidates are scored from it.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def teacher_hidden(self, batches: Sequence[TokenBatch]) -> list[Asked]:
        """The teacher's top k at the scored positions of each batch; one request per sequence."""
        whole = [scored_support(self._trainer.served, batch) for batch in batches]
        return self._placed(whole)

    def from_predictions(self, batches: Sequence[TokenBatch], predictions: Sequence[Sequence[Part]]) -> list[Asked]:
        """`teacher_hidden` from the replies that the loss reads, without a request."""
        return self._placed(
            scored_part(support_BT, batch) for batch, ((_, _, support_BT),) in zip(batches, predictions, strict=True)
        )

    def _placed(self, whole: Iterable[Asked]) -> list[Asked]:
        device = self._trainer.accelerator.device
        return [(support.to(device), targets_N.to(device)) for support, targets_N in whole]

    def __call__(
        self, model: Any, batches: Sequence[TokenBatch], asked: Sequence[Asked], keep: list[Tensor] | None = None
    ) -> list[Tensor]:
        """D(model, teacher) [N] on the support, in nats, at the scored positions of each batch."""
        trainer = self._trainer
        with trainer.accelerator.autocast():
            made = outcomes_of(
                model, batches, asked, vocab_size=trainer.vocab_size, temperature=trainer.temperature, keep=keep
            )
        return [divergence(at, trainer.beta) for at in made]

    def moving_head(self, model: Any, weights: MovableWeights) -> MovingHead | None:
        """The output layer along W + s·Δ; `None` unless D is the reverse KL of unsharded models."""
        return line_head(model, weights, self._trainer.vocab_size, self._trainer.beta)

    def slope(
        self, head: MovingHead, asked: Sequence[Asked], hidden: Mapping[float, Sequence[Tensor]]
    ) -> tuple[float, float]:
        """Σ over positions of D′(0) and of E var_π(δz), with z interpolated between 0 and 1."""
        if not sum(len(targets_N) for _, targets_N in asked):
            return 0.0, 0.0
        support = Support(*(torch.cat(parts) for parts in zip(*(support for support, _ in asked), strict=True)))
        targets_N, temperature = torch.cat([targets_N for _, targets_N in asked]), self._trainer.temperature
        at_start = torch.cat(list(hidden[0.0]))
        ray = SupportRay(head, support, at_start, targets_N, temperature)
        for scale, parts in hidden.items():
            ray.add(scale, torch.cat(list(parts)))
        return ray.slope_sums()


class SupportRay(RayKL):
    """`RayKL` to a teacher of which the top k is known; its slope is exact at scale 0 only.

    The teacher's tail gets the shape of the student's at scale 0: q̃(v) = p_0(v) q_T / p_T. Of all
    teachers with this support, q̃ has the smallest KL, which is D_S. So KL(p_s ‖ q̃) and D_S(s) have
    the same value and the same first derivative at s = 0. The Gauss–Newton curvature var_p(δz) is
    at least that of the k + 1 outcomes.

    Args:
        head: the student's output layer along the line.
        support: the teacher's top k, [N].
        h_start_NH: the student's hidden states at scale 0.
        targets_N: any token per position.
    """

    def __init__(self, head: MovingHead, support: Support, h_start_NH: Tensor, targets_N: Tensor, temperature: float):
        super().__init__(head, None, None, temperature=temperature)
        at = outcomes(h_start_NH, head.start, support, targets_N, temperature)
        z_N = row_logits(h_start_NH, head.start, targets_N[:, None], temperature)[:, 0]
        self._support, self._log_z, self._gap = support, z_N - at.sampled, (at.logq - at.logp)[:, -1]

    def target_logits(self, tile: Any, rows: slice, a: dict[float, Tensor]) -> Tensor:
        """log q̃ + log Z, with the student's normalizer Z at scale 0."""
        (start_NV,) = self._logits([a[0.0]], self._student.start)
        target_NV = start_NV + self._gap[rows, None].to(start_NV)
        ids_NK, logq_NK = self._support.ids[rows] - tile.first, self._support.logq[rows]
        inside_NK = (ids_NK >= 0) & (ids_NK < target_NV.shape[1]) & (logq_NK > -math.inf)
        row_M, column_M = inside_NK.nonzero(as_tuple=True)
        known_M = logq_NK[row_M, column_M] + self._log_z[rows][row_M]
        target_NV[row_M, ids_NK[row_M, column_M]] = known_M.to(target_NV)
        return target_NV
