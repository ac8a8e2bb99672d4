"""`DivergenceByTeacher`: the look-ahead's divergence of each rollout from its own teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effopd.distill.teachers.several import (
    Answered,
    Part,
    TeacherSet,
    answered,
    answered_in,
    divergences_by_teacher,
)
from effopd.extrapolate.movable import MovableWeights
from effopd.extrapolate.moving_head import line_head
from effopd.models.ray import MovingHead, RayKL
from effopd.models.token_batch import TokenBatch


class DivergenceByTeacher:
    """The divergence that an `OPDTrainer` with several teachers minimizes.

    Every teacher is asked at most once per search, for its own rollouts.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._teachers: TeacherSet = trainer.teachers

    @torch.no_grad()
    def teacher_hidden(self, batches: Sequence[TokenBatch]) -> list[list[Answered]]:
        """Each teacher's hidden states at the positions of its own rows, per batch."""
        trainer = self._trainer
        with trainer.accelerator.autocast():
            return answered(self._teachers, trainer.accelerator.unwrap_model, batches, trainer.vocab_size)

    def from_predictions(
        self, batches: Sequence[TokenBatch], predictions: Sequence[Sequence[Part]]
    ) -> list[list[Answered]]:
        """`teacher_hidden` from the predictions that the loss reads, one part per teacher."""
        return [
            [made for part in parts if (made := answered_in(part, batch, self._teachers.labels.index(part.label)))]
            for batch, parts in zip(batches, predictions, strict=True)
        ]

    def __call__(
        self,
        model: Any,
        batches: Sequence[TokenBatch],
        teacher_hidden: Sequence[Sequence[Answered]],
        keep: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """D(model, own teacher) [N], in nats, at the scored positions of each batch."""
        trainer = self._trainer
        with trainer.accelerator.autocast():
            return divergences_by_teacher(
                model, batches, teacher_hidden, vocab_size=trainer.vocab_size, beta=trainer.beta,
                temperature=trainer.temperature, keep=keep,
            )  # fmt: skip

    def moving_head(self, model: Any, weights: MovableWeights) -> MovingHead | None:
        """The output layer along W + s·Δ; `None` unless D is the reverse KL of unsharded models."""
        return line_head(model, weights, self._trainer.vocab_size, self._trainer.beta)

    def slope(
        self, head: MovingHead, teacher_hidden: Sequence[Sequence[Answered]], hidden: Mapping[float, Sequence[Tensor]]
    ) -> tuple[float, float]:
        """Σ over positions of D′(0) and of E var_π(δz), with z interpolated between 0 and 1."""
        first = second = 0.0
        for label in self._teachers.labels:
            mine = [(b, part) for b, parts in enumerate(teacher_hidden) for part in parts if part.label == label]
            if not sum(len(part.index_N) for _, part in mine):
                continue
            target_NH = torch.cat([part.hidden_NH for _, part in mine])
            ray = RayKL(head, mine[0][1].head, target_NH, temperature=self._trainer.temperature)
            for scale, states in hidden.items():
                ray.add(scale, torch.cat([states[b][part.index_N.to(states[b].device)] for b, part in mine]))
            slope, curvature = ray.slope_sums()
            first, second = first + slope, second + curvature
        return first, second
