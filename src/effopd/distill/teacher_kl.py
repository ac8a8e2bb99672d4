"""`teacher_kl`: how good a candidate is, without answers and without generating anything.

Training has just sampled this step's rollouts from W and has not learned from them yet, so they are held out from the
displacement that is being judged, and exactly on-policy for W. A candidate is scored by the exact reverse KL to the
teacher on them: one student forward of a few rollouts; the teacher's hidden states are computed once a search. For a
candidate the rollouts are slightly off-policy: its KL is that at the positions W visits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from effopd.distill.divergence import Head, gathered
from effopd.extrapolate.ranks import pooled, world_size
from effopd.extrapolate.search import Score

_NAMES = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask", "tool_mask")


class RolloutScorer:
    """−KL(π_W+sD ‖ π*), nats per token, on the first rollouts of the present step.

    Several processes score a share each of their own rollouts; all of them get the whole score.

    Args:
        trainer: an `OPDTrainer`; the scorer uses its forward and its teacher.
        rollouts: how many rollouts are scored, over all processes.
    """

    def __init__(self, trainer: Any, rollouts: int):
        self._trainer, self._rollouts = trainer, -(-rollouts // world_size())
        self._batches: list[dict[str, Tensor]] = []
        self._teacher: Tensor | None = None

    def take(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """The rollouts of a new step: the trainer's micro-batches, before any of them is trained on. They are scored in
        pieces of that size, so a search needs no more memory than a training step."""
        self._batches, self._teacher, left = [], None, self._rollouts
        for batch in batches:
            rows = {name: value[:left] for name, value in batch.items() if name in _NAMES}
            left -= len(rows["completion_ids"])
            valid = rows["completion_mask"] * rows["tool_mask"] if "tool_mask" in rows else rows["completion_mask"]
            self._batches.append(
                {
                    "ids": torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
                    "attention": torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
                    "valid": valid.bool(),  # what tools wrote is read, but not scored
                }
            )
            if left <= 0:
                break

    def drop(self) -> None:
        """Let go of them."""
        self._batches, self._teacher = [], None

    def __call__(self, model: Any) -> Score:
        assert self._batches, "the trainer hands out rollouts before it searches"
        start, forwards = time.perf_counter(), 2 if self._teacher is None else 1
        parts = pooled(lambda: self._part(model))
        sums, lengths = [kl for part in parts for kl in part[0]], [n for part in parts for n in part[1]]
        tokens = sum(part[2] for part in parts)
        mean_length = max(1, sum(lengths)) / len(lengths)
        return Score(
            mean=-sum(sums) / max(1, sum(lengths)),
            per_example=tuple(
                -kl / mean_length for kl in sums
            ),  # their mean is `mean`, so that paired tests are about it
            seconds=time.perf_counter() - start,
            forward_tokens=forwards * tokens,
        )

    def _part(self, model: Any) -> tuple[list[float], list[int], int]:
        """This rank's rollouts: the summed KL and the number of scored tokens of each, and the tokens of a forward."""
        trainer = self._trainer
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        with trainer.accelerator.autocast(), torch.no_grad():
            if self._teacher is None:
                self._teacher = self._hidden(teacher)
            kl_N = gathered(model, lambda: self._kl(model, teacher))
        lengths = torch.cat([batch["valid"].sum(1) for batch in self._batches]).tolist()
        sums = [float(piece.sum()) for piece in kl_N.double().split(lengths)]
        return sums, lengths, sum(int(batch["attention"].sum()) for batch in self._batches)

    def _kl(self, model: Any, teacher: Any) -> Tensor:
        """KL(student ‖ teacher) [N] at the scored positions, in nats."""
        assert self._teacher is not None
        own_NH = self._hidden(model)
        student, target = (Head.of(m, self._trainer.vocab_size) for m in (model, teacher))
        kl_N, _ = ChunkedDivergenceFunction.apply(
            own_NH, student.weight, student.bias, self._teacher.to(own_NH.device), target.weight, target.bias, 1.0,
            self._trainer.temperature, student.scale, student.softcap, target.scale, target.softcap,
        )  # fmt: skip
        return kl_N

    def _hidden(self, model: Any) -> Tensor:
        """Last hidden states [N, H] at the N scored positions, rollout by rollout."""
        states = [
            self._trainer._get_last_hidden_state(model, batch["ids"], batch["attention"], batch["valid"].shape[1])
            for batch in self._batches
        ]
        return torch.cat([hidden[batch["valid"]] for hidden, batch in zip(states, self._batches, strict=True)])
