"""Builds the scorer `next_batch_loss`: a trainer's own loss, example by example, on its next step.

The host has already fetched the micro-batches of the next step when it starts that step. The scorer
reads them at that moment, before the first is trained on. Nothing is fetched twice, so the order of
the data and a resumed run are unchanged.

The loss is `compute_loss` of the trainer, as in training but without dropout and without gradients.
Its normalization over the step is kept: with all examples scored, the score is minus the loss that
the trainer logs for that step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import all_gather_object, world_size
from effopd.distill.batch_examples import scored_tokens, split_examples
from effopd.distill.host_rules import check_next_batch, is_a
from effopd.distill.scoring import rollouts_per_step, wanted_rollouts
from effopd.distill.trl_host.state import loss_undisturbed
from effopd.errors import ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.scorers.next_batch import ExampleLosses, NextBatchLoss

#: Name of the scorer, for `EffOPDCallback(scorer=…)`.
NEXT_BATCH_LOSS = "next_batch_loss"
#: `score_rollouts` of strategies that do not set it.
_SHARE = 0.25
#: Preference losses that compare the pairs of a batch with each other.
_ACROSS_PAIRS = {"aot", "aot_unpaired"}


@dataclass(frozen=True)
class Example:
    """A part of a micro-batch, and its factor: Σ factor · loss = loss of the step."""

    batch: Mapping[str, Any]
    factor: float


@dataclass
class Selected:
    """Scored examples of the next step.

    Attributes:
        examples: in the order of training.
        total: number of examples in the step, scored or not.
        num_items: tokens of the step by which the trainer divides its loss; `None`: it does not.
        teacher_answers: answers of a teacher server, asked once per batch.
    """

    examples: list[Example]
    total: int
    num_items: Any
    teacher_answers: dict[str, Any]


def wanted_examples(trainer: Any, config: EffOPDConfig) -> int:
    """Number of examples to score per search, over all processes; see `wanted_rollouts`."""
    return wanted_rollouts(trainer.args, config.score_rollouts or _SHARE)


def next_batch_scorer(trainer: Any, config: EffOPDConfig) -> NextBatchLoss:
    """The scorer `next_batch_loss` for any `transformers.Trainer`.

    Raises:
        ConfigError: the strategy does not score or predicts from accuracies; the trainer's loss
            cannot rank weights (see `check_next_batch`); or a step has fewer than two examples.
    """
    if config.scorer is None or config.rules.fit is not None:
        what = "does not score" if config.scorer is None else "predicts from accuracies"
        raise ConfigError(
            f"strategy '{config.strategy}' {what}, so scorer='{NEXT_BATCH_LOSS}' would be ignored. Leave it out, or "
            "choose 'line_search', 'newton_search' or 'effopd'."
        )
    check_next_batch(trainer)
    sampled, wanted = rollouts_per_step(trainer.args), wanted_examples(trainer, config)
    packed = getattr(trainer, "padding_free", False)  # one row holds several examples
    if min(sampled, wanted) < 2 and not packed and config.gate == "significant":
        raise ConfigError(
            f"scorer='{NEXT_BATCH_LOSS}' needs at least 2 examples per step to estimate a standard error; this run "
            f"has {sampled} and scores {min(sampled, wanted)}. Raise per_device_train_batch_size, "
            "gradient_accumulation_steps or EffOPDConfig.score_rollouts, or set gate='better'."
        )
    return NextBatchLoss(TrainerLoss(trainer, wanted))


class TrainerLoss:
    """The loss of a trainer at the current weights, one value per example of the next step.

    Args:
        wanted: number of examples to score by all processes; a step with fewer has all scored.
    """

    def __init__(self, trainer: Any, wanted: int):
        self.trainer, self._wanted = trainer, wanted

    def select(self, micro_batches: Sequence[Mapping[str, Any]], num_items: Any) -> Selected:
        """The first examples of the step's micro-batches.

        Args:
            micro_batches: those of the next step, prepared and not yet trained on.
            num_items: as the trainer passes it to `compute_loss`.
        """
        parts = [self._examples_of(batch) for batch in micro_batches]
        examples = [
            Example(part, factor / len(parts) if self._averages_micro_batches(num_items) else factor)
            for batch, split in zip(micro_batches, parts, strict=True)
            for part, factor in zip(split, self._factors(batch, split, num_items), strict=True)
        ]
        # GKD samples each micro-batch when it is trained on, so only the first is known
        known = len(parts[0]) if is_a(self.trainer, "GKDTrainer") else len(examples)
        share = -(-self._wanted // world_size())
        scored = min(all_gather_object(min(known, share)))  # the same number of collectives on all ranks
        return Selected(examples[:scored], len(examples), num_items, {})

    def _examples_of(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        trainer = self.trainer
        if is_a(trainer, "KTOTrainer") or _ACROSS_PAIRS & set(getattr(trainer, "loss_types", ())):
            return [dict(batch)]
        return split_examples(batch, pairs=is_a(trainer, "DPOTrainer", "RewardTrainer"))

    def _averages_micro_batches(self, num_items: Any) -> bool:
        """Whether `training_step` divides the loss by the number of micro-batches."""
        trainer = self.trainer
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and num_items is not None) or bool(trainer.compute_loss_func)
        return not scaled

    def _factors(self, batch: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], num_items: Any) -> list[float]:
        """Factors of the parts' losses in the loss of their micro-batch.

        1 if the loss is divided by the tokens of the step. Otherwise the loss is a mean: over
        tokens if the batch has labels per token, over examples if not.
        """
        server = is_a(self.trainer, "ServerDistillationTrainer")  # its loss is a mean over the micro-batch's tokens
        if num_items is not None and not self._averages_micro_batches(num_items):
            return [1.0] * len(parts)
        labels = batch.get("labels")
        if not server and not (isinstance(labels, Tensor) and labels.dim() == 2):
            return [1 / len(parts)] * len(parts)
        tokens = [scored_tokens(part) for part in parts]
        return [count / max(1, sum(tokens)) for count in tokens]

    @torch.no_grad()
    def __call__(self, model: Any, selected: Selected) -> ExampleLosses:
        trainer, losses = self.trainer, []
        frozen = [getattr(trainer, name, None) for name in ("teacher_model", "ref_model")]
        others = [trainer.accelerator.unwrap_model(other) for other in frozen if other is not None]
        with (
            loss_undisturbed(trainer, model),
            _counted([model]) as own,
            _counted([other for other in others if other is not model]) as teachers,
            _asked_once(getattr(trainer, "teacher_client", None), selected.teacher_answers) as served,
        ):
            for example in selected.examples:
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, dict(example.batch), num_items_in_batch=selected.num_items)
                losses.append(float(loss.detach().float().mean()) * example.factor * selected.total)
        by_teachers = sum(map(int, teachers)) + sum(served)
        return ExampleLosses(tuple(losses), sum(map(int, own)) + by_teachers, by_teachers)


@contextmanager
def _counted(models: Sequence[Any]) -> Iterator[list[Any]]:
    """Tokens of every forward pass of the models in this block."""
    counts: list[Any] = []

    def count(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            counts.append(mask.sum())
        elif isinstance(ids, Tensor):
            counts.append(ids.numel())

    hooks = [model.register_forward_pre_hook(count, with_kwargs=True) for model in models]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _asked_once(client: Any, answers: dict[str, Any]) -> Iterator[list[int]]:
    """Answer repeated requests to a teacher server from `answers`; yield tokens requested."""
    tokens: list[int] = []
    if client is None:
        yield tokens
        return
    ask: Callable[..., Any] = client.get_sequence_logprobs

    def cached(*args: Any, **kwargs: Any) -> Any:
        key = json.dumps([args, kwargs], default=str)
        if key not in answers:
            answers[key] = ask(*args, **kwargs)
            tokens.append(sum(map(len, kwargs.get("sequences", ()))))
        return answers[key]

    client.get_sequence_logprobs = cached
    try:
        yield tokens
    finally:
        del client.get_sequence_logprobs
