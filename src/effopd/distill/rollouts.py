"""Rollouts of `OPDTrainer`: shared vocabulary only, exact under padding, with sampler log-probs.

ids below `vocab_size` only  →  one `generate` call per exact group  →  log π_sampler(y)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from effopd.distill.health import HealthProbe
from effopd.distill.policy_gradient import share_sizes
from effopd.distill.replay import ReplayBuffer
from effopd.distill.sampled_logps import engine_logps, padded, recording
from effopd.distill.scoring import token_batch
from effopd.distill.teachers.kept import from_checkpoint, share, share_with
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.state import log_metrics, split_rollouts
from effopd.errors import CompatibilityError, ConfigError
from effopd.models.sampler_check import generate_groups
from effopd.tasks.generate import tokens_beyond

#: Rollouts per batch whose sampler log-probabilities are kept for `health/sampler_logp_gap`.
_RECORDED = 8


class RolloutMixin(DistillationHooks):
    """Mixed into `OPDTrainer`, which sets `vocab_size` and `health`."""

    vocab_size: int
    health: HealthProbe
    replay: ReplayBuffer | None

    def _open_rollouts(self) -> None:
        """Suppress tokens outside the shared vocabulary; called once `vocab_size` is known.

        Raises:
            CompatibilityError: vLLM is used and the student has rows that the teacher or reference
                lacks.
        """
        self.sampler_rows: list[Sequence[float | None] | None] | None = None
        size = self.args.replay_batches
        self.replay = ReplayBuffer(size, self.args.seed, self.accelerator.device) if size else None
        if self.args.token_mask != "none":
            _ = self._special_groups  # raises
        unknown = tokens_beyond(self.accelerator.unwrap_model(self.model), self.vocab_size)
        if unknown and self.use_vllm:
            raise CompatibilityError(
                f"the student has {len(unknown)} vocabulary rows (from id {unknown[0]}) that the teacher or reference "
                "lacks, and vLLM samples them. Roll out without --use_vllm, or cut the student's embedding to "
                f"{self.vocab_size} rows (resize_token_embeddings)."
            )
        if unknown:
            known = self.generation_config.suppress_tokens or []
            self.generation_config.suppress_tokens = sorted({*known, *unknown})
        if self._reads_engine:
            self.vllm_generation.logprobs = 0  # 0: of the sampled tokens only; the host requests none

    @property
    def _reads_engine(self) -> bool:
        """Whether the loss needs the engine's log-probability of every sampled token."""
        return self.use_vllm and self.args.loss_type == "sampled"

    @property
    def _place_in_cycle(self) -> int:
        """Completed optimizer steps on the present rollouts."""
        return self.state.global_step % self.args.updates_per_rollouts

    def reuses_rollouts(self) -> bool:
        return self._place_in_cycle != 0

    def repeats_rollouts(self) -> bool:
        """Whether an earlier optimizer step trained on the rollouts of this one."""
        return self._place_in_cycle >= self.args.num_mini_batches

    def divided_rollouts(self, rollouts):
        """The rows of all micro-batches in `num_mini_batches` parts, the first part first."""
        parts = self.args.num_mini_batches
        if parts == 1:
            return super().divided_rollouts(rollouts)
        by_part = list(zip(*(split_rollouts(micro_batch, parts) for micro_batch in rollouts), strict=True))
        counts = torch.stack([torch.stack([self._item_count(each) for each in part]).sum() for part in by_part])
        counts = self.accelerator.gather(counts.unsqueeze(0)).sum(0)
        for part, count in zip(by_part, counts, strict=True):
            for micro_batch in part:
                micro_batch["num_items_in_batch"] = count
        return [micro_batch for part in by_part for micro_batch in part]

    def rollouts_sampled(self, rollouts):
        """Let the steps that share these rollouts share the teacher's predictions."""
        super().rollouts_sampled(rollouts)
        passes = self.args.updates_per_rollouts // self.args.num_mini_batches
        if self.replay is not None:
            self.replay.add(rollouts)
        elif passes > 1:
            for micro_batch in rollouts:
                share(micro_batch, passes)

    def rollouts_restored(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rollouts of a checkpoint, which share the teacher's predictions as before it."""
        if self.replay is not None:  # they are the buffer's newest batch
            rollouts = [dict(each) for each in saved]
            for micro_batch, same in zip(rollouts, self.replay.batches[-1], strict=True):
                share_with(micro_batch, same)
            return rollouts
        parts = self.args.num_mini_batches
        passes, (whole, begun) = self.args.updates_per_rollouts // parts, divmod(self._place_in_cycle, parts)
        size = len(saved) // parts  # micro-batches of a part
        return [from_checkpoint(each, passes - whole - (i // size < begun)) for i, each in enumerate(saved)]

    def reused_rollouts(self, rollouts, index):
        """This step's part; with replay, the last step of a cycle draws one of the last batches."""
        size = self.args.gradient_accumulation_steps
        if self.replay is None or self._place_in_cycle + 1 < self.args.updates_per_rollouts:
            return super().reused_rollouts(rollouts, self._place_in_cycle % self.args.num_mini_batches * size + index)
        age, drawn = self.replay.draw(self.state.global_step, index, size)
        log_metrics(self, {"replay/age": age})
        return drawn

    def upcoming_rollouts(self, rollouts):
        """In the first pass over the parts, those that no step has trained on yet."""
        done = 0 if self.repeats_rollouts() else self._place_in_cycle
        return rollouts[done * self.args.gradient_accumulation_steps :]

    def around_turn(self, generate, prompt_ids, *, multimodal):
        if self._reads_engine:
            with engine_logps(self.vllm_generation) as rows:
                answers = generate(prompt_ids)
            self.sampler_rows = list(rows)
            return answers
        if self.use_vllm:
            return generate(prompt_ids)
        student = self.accelerator.unwrap_model(self.model)
        groups = [list(range(len(prompt_ids)))]
        if not multimodal:  # of all prompts, of those of one length, or of one: the smallest groups fit all models
            groups = max((generate_groups(model, prompt_ids) for model in self.decoding_models()), key=len)
        completions: dict[int, list[int]] = {}
        logps: dict[int, Sequence[float | None]] = {}
        for group in groups:
            wanted = sum(i < _RECORDED for i in group) if self._records() else 0
            prompts = [prompt_ids[i] for i in group]
            if wanted:
                with recording(student, wanted) as recorder:
                    answers = generate(prompts)
                logps |= dict(zip(group, recorder.rows(answers), strict=False))
            else:
                answers = generate(prompts)
            completions |= dict(zip(group, answers, strict=True))
        if logps:
            self.sampler_rows = [logps.get(i) for i in range(len(prompt_ids))]
        return [completions[i] for i in range(len(prompt_ids))]

    def decoding_models(self) -> list[Any]:
        """Models that decode the rollouts token by token."""
        return [self.accelerator.unwrap_model(self.model)]

    def _records(self) -> bool:
        """Whether this step's log-probabilities are recorded: logged, and one turn per answer."""
        return bool(self.model.training and self.health.due(self.state) and not self.tools)

    def around_rollouts(self, sample):
        self.sampler_rows = None
        output = sample()
        if self.sampler_rows is not None:
            output["sampler_logps"] = padded(self.sampler_rows, output["completion_ids"])
        self.sampler_rows = None
        if self.args.token_mask == "first_special" and self.model.training:
            ids_BT, trained_BT = output["completion_ids"], token_batch(output).scored_BT
            output["train_mask"] = trained_BT & ~first_occurrences(ids_BT, trained_BT, self._special_groups)
        by_answer, share = self.args.loss_weighting == "answer", self.args.highest_entropy_share
        if by_answer or "train_mask" in output or share < 1:  # otherwise the host counts the same
            output["num_items_in_batch"] = self.accelerator.gather(self._item_count(output)).sum()
        return output

    def _item_count(self, rollouts: Mapping[str, Any]) -> Tensor:
        """Tokens or answers that the loss sums over; the host divides by their number."""
        trained_BT = rollouts["train_mask"] if "train_mask" in rollouts else token_batch(rollouts).scored_BT
        count_B = trained_BT.sum(1)
        if self.args.highest_entropy_share < 1 and self.model.training:
            count_B = share_sizes(trained_BT, self.args.highest_entropy_share)
        return (count_B > 0).sum() if self.args.loss_weighting == "answer" else count_B.sum()

    @cached_property
    def _special_groups(self) -> list[list[int]]:
        """Ids of '<', of 'think' and of the end tokens; pieces that are no token are left out.

        Raises:
            ConfigError: the tokenizer has none of them.
        """
        tokenizer = self.text_tokenizer
        known = tokenizer.get_vocab()
        groups = [[known[piece]] for piece in ("<", "think") if piece in known]
        ends = self.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        groups.append(sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}))
        if groups == [[]]:
            raise ConfigError(
                "token_mask='first_special': the tokenizer has no token '<', no token 'think' and no end token. Use "
                "token_mask='none'."
            )
        return groups


def first_occurrences(ids_BT: Tensor, valid_BT: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Mask [B, T] of the first valid token of each row that is in a group, for every group.

    Example:
        >>> ids = torch.tensor([[7, 5, 7, 6]])
        >>> first_occurrences(ids, ids > 0, [[7], [6]]).tolist()
        [[True, False, False, True]]
    """
    first_BT = torch.zeros_like(valid_BT)
    for group in groups:
        hit_BT = valid_BT & torch.isin(ids_BT, torch.tensor(group, device=ids_BT.device, dtype=ids_BT.dtype))
        first_BT |= hit_BT & (hit_BT.cumsum(1) == 1)
    return first_BT
