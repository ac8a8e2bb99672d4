"""`teacher_kl`: how good a candidate is, without answers and without generating anything.

Training has just sampled this step's rollouts from W and has not learned from them yet, so they are held out from the
displacement that is being judged, and exactly on-policy for W. A candidate is scored by the exact reverse KL to the
teacher on them: one student forward of a few rollouts; the teacher's hidden states are computed once a search. For a
candidate the rollouts are slightly off-policy: its KL is that at the positions W visits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from effopd.distill.divergence import Head
from effopd.extrapolate.search import Score

_NAMES = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask", "tool_mask")


class RolloutScorer:
    """−KL(π_W+sD ‖ π*), nats per token, on the first rollouts of the present step.

    Args:
        trainer: an `OPDTrainer`; the scorer uses its forward and its teacher.
        rollouts: how many rollouts are scored.
    """

    def __init__(self, trainer: Any, rollouts: int):
        self._trainer, self._rollouts = trainer, rollouts
        self._batch: dict[str, Tensor] | None = None
        self._teacher: Tensor | None = None

    def take(self, inputs: Mapping[str, Any]) -> None:
        """The rollouts of a new step: the trainer's micro-batch as it is about to be trained on."""
        rows = {name: value[: self._rollouts] for name, value in inputs.items() if name in _NAMES}
        valid = rows["completion_mask"] * rows["tool_mask"] if "tool_mask" in rows else rows["completion_mask"]
        self._batch, self._teacher = (
            {
                "ids": torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
                "attention": torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
                "valid": valid.bool(),  # what tools wrote is read, but not scored
            },
            None,
        )

    def drop(self) -> None:
        """Let go of them."""
        self._batch = self._teacher = None

    def __call__(self, model: Any) -> Score:
        assert self._batch is not None, "the trainer hands out rollouts before it searches"
        start, trainer = time.perf_counter(), self._trainer
        valid_BT, tokens = self._batch["valid"], int(self._batch["attention"].sum())
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        forwards = 1
        with trainer.accelerator.autocast(), torch.no_grad():
            if self._teacher is None:
                self._teacher = self._hidden(teacher)[valid_BT]
                forwards = 2
            own_NH = self._hidden(model)[valid_BT]
            student, target = (Head.of(m, trainer.vocab_size) for m in (model, teacher))
            kl_N, _ = ChunkedDivergenceFunction.apply(
                own_NH, student.weight, student.bias, self._teacher.to(own_NH.device), target.weight, target.bias, 1.0,
                trainer.temperature, student.scale, student.softcap, target.scale, target.softcap,
            )  # fmt: skip
        kl_BT = torch.zeros(valid_BT.shape, dtype=torch.float64, device=kl_N.device)
        kl_BT[valid_BT] = kl_N.double()
        lengths = valid_BT.sum(1).clamp(min=1)
        return Score(
            mean=-float(kl_BT.sum() / valid_BT.sum().clamp(min=1)),
            per_example=tuple((-kl_BT.sum(1) / lengths).tolist()),
            seconds=time.perf_counter() - start,
            forward_tokens=forwards * tokens,
        )

    def _hidden(self, model: Any) -> Tensor:
        """Last hidden states [B, T, H] at the completion's positions."""
        assert self._batch is not None
        ids, attention, length = self._batch["ids"], self._batch["attention"], self._batch["valid"].shape[1]
        return self._trainer._get_last_hidden_state(model, ids, attention, length)
