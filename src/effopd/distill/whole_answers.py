"""Cut rollouts with an unbiased gradient: a random share of the answers is sampled whole.

Rollouts cut after H tokens train on the first H positions only, and nothing keeps the rest. With
`horizon_whole_share` p, a random share p of a step's answers continues to its end, and the tokens
beyond H weigh 1/p. The expected gradient is then that of whole answers:

    E[Σ_{t≤H} ∇D_t + (1/p) 1{whole} Σ_{t>H} ∇D_t] = Σ_t ∇D_t

It costs p of the sampled, teacher and student tokens beyond H. The variance of the terms beyond H
grows by 1/p, so it pays where most of the divergence is in the first H tokens. A search scores the
whole answers only.

Source: randomized truncation of a sum, arXiv 1905.07006, with two lengths; ours for rollouts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import all_gather_object, rank
from effopd.common.statistics import share_of
from effopd.distill.horizon import set_length
from effopd.distill.scoring import WHOLE, token_batch
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.errors import ConfigError

#: Column of a batch of rollouts: factors of the tokens' losses [B, T].
TOKEN_WEIGHT = "token_weight"


class WholeAnswersMixin(DistillationHooks):
    """Mixed into `OPDTrainer`; does nothing at `horizon_whole_share` 0."""

    sampler_rows: list[Sequence[float | None] | None] | None

    def _open_whole_answers(self) -> None:
        """Check the run.

        Raises:
            ConfigError: it has tools or images.
        """
        self._whole: tuple[list[int], int] | None = None  # rows of a batch, and the horizon of the others
        if self.args.horizon_whole_share and (self.tools or self.reads_images):
            raise ConfigError(
                f"horizon_whole_share={self.args.horizon_whole_share:g} supports neither tools nor images. Leave it "
                "out."
            )

    def around_turn(self, generate, prompt_ids, *, multimodal):
        args, horizon, full = self.args, self.max_completion_length, self.args.max_completion_length
        answers = super().around_turn(generate, prompt_ids, multimodal=multimodal)
        if not args.horizon_whole_share or not self.model.training or horizon >= full:
            return answers
        chosen = random.Random(f"{args.seed} {self.state.global_step} {rank()}")
        rows = sorted(chosen.sample(range(len(answers)), share_of(len(answers), args.horizon_whole_share)))
        self._whole = rows, horizon
        ends = self.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        cut = [i for i in rows if len(answers[i]) == horizon and answers[i][-1] not in ends]
        needed = max(all_gather_object(len(cut)))  # engines want as many prompts from every process
        if not needed:
            return answers
        logps, begun = self.sampler_rows, [prompt_ids[i] + answers[i] for i in (cut or rows[:1])]
        set_length(self, full - horizon)
        try:
            rest = super().around_turn(generate, begun + begun[:1] * (needed - len(begun)), multimodal=multimodal)
        finally:
            set_length(self, horizon)
        answers = list(answers)
        for i, more in zip(cut, rest, strict=False):
            answers[i] = answers[i] + more
        if logps is not None:
            for i, more in zip(cut, self.sampler_rows or [None] * len(cut), strict=False):
                if (first := logps[i]) is not None:
                    logps[i] = [*first, *([] if more is None else more)]
        self.sampler_rows = logps
        return answers

    def around_rollouts(self, sample):
        self._whole = None
        output = super().around_rollouts(sample)
        if self._whole is None:
            return output
        rows, horizon = self._whole
        scored_BT = token_batch(output).scored_BT
        whole_B = torch.zeros(len(scored_BT), dtype=torch.bool, device=scored_BT.device)
        whole_B[rows] = True
        late_T = torch.arange(scored_BT.shape[1], device=scored_BT.device) >= horizon
        weight_BT = torch.ones(scored_BT.shape, device=scored_BT.device)
        output[WHOLE] = whole_B
        output[TOKEN_WEIGHT] = weight_BT.masked_fill(whole_B[:, None] & late_T, len(scored_BT) / len(rows))
        trained_BT = output.get("train_mask", scored_BT)
        # an estimate of the tokens of the whole answers, by which the host divides the summed loss
        output["num_items_in_batch"] = self.accelerator.gather((output[TOKEN_WEIGHT] * trained_BT).sum()).sum()
        return output

    def rollouts_sampled(self, rollouts):
        """Put the whole answers of each micro-batch first, where a search reads them."""
        for micro_batch in rollouts:
            whole_first(micro_batch)
        super().rollouts_sampled(rollouts)


def whole_first(batch: dict[str, Any]) -> None:
    """Sort the rows of a micro-batch in place: whole answers first, each kind in its order."""
    if WHOLE not in batch:
        return
    order_B = (~batch[WHOLE]).long().argsort(stable=True)
    if bool((order_B[1:] > order_B[:-1]).all()):
        return
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == len(order_B):
            batch[name] = value[order_B.to(value.device)]
        elif isinstance(value, list) and len(value) == len(order_B):
            batch[name] = [value[i] for i in order_B.tolist()]
