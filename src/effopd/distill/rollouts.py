"""The student's rollouts as `OPDTrainer` takes them from its host: from the vocabulary that is trained, exact for prompts of
unequal length, with the sampler's own log-probabilities.

    ids below `vocab_size` only  →  as many `generate` calls as exactness takes  →  log π_sampler(y)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from trl import DistillationTrainer

from effopd.distill.divergence import Head, token_logprobs
from effopd.distill.sampled_logps import padded, recording
from effopd.errors import CompatibilityError
from effopd.models.sampler_check import generate_groups
from effopd.tasks.generate import tokens_beyond

#: Rollouts of a batch whose sampler's log-probabilities are kept for `health/sampler_logp_gap`.
_RECORDED = 8

_Host: Any = DistillationTrainer if TYPE_CHECKING else object


class RolloutMixin(_Host):
    """Mixed into `OPDTrainer`, which sets `vocab_size`."""

    vocab_size: int

    def _open_rollouts(self) -> None:
        """Once, when `vocab_size` is known.

        Raises:
            CompatibilityError: vLLM would sample tokens that the teacher has no row for.
        """
        self._sampler_rows: list[Sequence[float | None] | None] | None = None
        self._gap = [0.0, 0.0]  # Σ |Δ log p| and tokens, of the present step
        unknown = tokens_beyond(self.accelerator.unwrap_model(self.model), self.vocab_size)
        if unknown and self.use_vllm:
            raise CompatibilityError(
                f"the student has {len(unknown)} vocabulary rows (from id {unknown[0]}) that the teacher or reference has not, and "
                "vLLM would sample them. Roll out without --use_vllm, which suppresses them, or cut the student's embedding "
                f"to {self.vocab_size} rows (resize_token_embeddings)."
            )
        if unknown:
            known = self.generation_config.suppress_tokens or []
            self.generation_config.suppress_tokens = sorted({*known, *unknown})
        if self.use_vllm and self.args.loss_type == "sampled":
            self._keep_engine_logps()

    def _keep_engine_logps(self) -> None:
        """Have the engine return the log-probability of every token that it samples; the host asks for none."""
        engine = self.vllm_generation
        engine.logprobs, generate = 0, engine.generate

        def kept(*args: Any, **kwargs: Any) -> Any:
            output = generate(*args, **kwargs)
            if output[2] is None:
                raise CompatibilityError(
                    "vLLM returned no log-probabilities of its samples, which the importance weights of loss_type='sampled' "
                    "need. Use a TRL whose engine returns them, or loss_type='full'."
                )
            self._sampler_rows = [[token[0] for token in row] for row in output[2]]
            return output

        engine.generate = kept

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        student = self.accelerator.unwrap_model(self.model)
        groups = [list(range(len(prompt_ids)))] if multimodal_fields else generate_groups(student, prompt_ids)
        completions: dict[int, list[int]] = {}
        logps: dict[int, Sequence[float | None]] = {}
        for group in groups:
            wanted = sum(i < _RECORDED for i in group) if self._records() else 0
            arguments = [prompt_ids[i] for i in group], images, multimodal_fields, has_tool_images
            if wanted:
                with recording(student, wanted) as recorder:
                    made = super()._generate_single_turn(*arguments)
                logps |= dict(zip(group, recorder.rows(made), strict=False))
            else:
                made = super()._generate_single_turn(*arguments)
            completions |= dict(zip(group, made, strict=True))
        if logps:
            self._sampler_rows = [logps.get(i) for i in range(len(prompt_ids))]
        return [completions[i] for i in range(len(prompt_ids))]

    def _records(self) -> bool:
        """Whether the present step's log-probabilities are wanted: it is logged, and answers are one turn long."""
        return bool(self.model.training and self._health_due() and not self.tools)

    def _health_due(self) -> bool:
        every = max(int(self.state.logging_steps or 1), 1)
        return bool(self.args.health_tokens) and (self.state.global_step + 1) % every == 0

    def _generate_and_score_completions(self, inputs):
        self._sampler_rows = None
        output = super()._generate_and_score_completions(inputs)
        if self._sampler_rows is not None:
            output["sampler_logps"] = padded(self._sampler_rows, output["completion_ids"])
        self._sampler_rows = None
        if self.args.loss_weighting == "answer":  # what the host divides the summed loss by
            answers = (self._learned(output).sum(1) > 0).sum()
            output["num_items_in_batch"] = self.accelerator.gather(answers).sum()
        return output

    @staticmethod
    def _learned(inputs: dict[str, Any]) -> torch.Tensor:
        """[B, T], 1 at the tokens that are learned from: the student's own."""
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    @torch.no_grad()
    def _measure_sampler_gap(self, sampler_BT, h_student, head: Head, completion_ids, mask) -> None:
        """Add |log π_sampler(y) − log π_train(y)| of the recorded rollouts of a micro-batch."""
        known = (mask != 0) & ~sampler_BT.isnan()
        if not bool(known.any()):
            return
        train, _ = token_logprobs(h_student.detach()[known], head, completion_ids[known], self.temperature)
        self._gap[0] += float((sampler_BT[known] - train).abs().sum())
        self._gap[1] += float(known.sum())

    def _log_sampler_gap(self) -> None:
        """`health/sampler_logp_gap`: mean |log π_sampler(y) − log π_train(y)|, nats, over a step's recorded tokens."""
        total, tokens = self._gap
        self._gap = [0.0, 0.0]
        if tokens:
            self._metrics["train"]["health/sampler_logp_gap"].append(total / tokens)
