"""Builds a look-ahead's scorer from a trainer's prompts, tokenizer, models and rollouts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer

from effopd.common.distributed import rank, world_size
from effopd.common.statistics import share_of
from effopd.distill.divergence import MULTIMODAL_KEYS, divergences, shared_vocab_size
from effopd.distill.search_kl import Target, in_float32_on_cpu
from effopd.distill.teachers.divergence import DivergenceByTeacher
from effopd.distill.teachers.offload import in_use
from effopd.distill.teachers.several import TEACHER_INDEX, Part
from effopd.distill.trl_host.state import has_trls_loss
from effopd.errors import CompatibilityError, ConfigError, TaskError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.movable import MovableWeights
from effopd.extrapolate.moving_head import line_head
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.extrapolate.scorers.teacher_kl import RolloutScorer
from effopd.models.checks import check_models
from effopd.models.head import Head
from effopd.models.logit_path import core_of, is_whole, logit_path
from effopd.models.ray import MovingHead, RayKL
from effopd.models.token_batch import TokenBatch
from effopd.tasks.base import Task
from effopd.tasks.sampling import Sampling

logger = logging.getLogger(__name__)

#: Bounds on the number of scored rollouts if `score_rollouts` is a share of the step's rollouts.
FEWEST, MOST = 4, 32
#: Up to this number, the share is at least a half: a quarter of a small batch decides nothing.
_HALF_UP_TO = 8
#: Column of a batch of rollouts [B], if some are cut at a horizon: whether a row is whole.
WHOLE = "whole_answer"


# -- accuracy --------------------------------------------------------------------------------------


def check_validation_size(size: int, task: Task) -> None:
    """Check that `task` has at least `size` prompts.

    Raises:
        TaskError: it has fewer.
    """
    if size > len(task):
        raise TaskError(
            f"{size} validation prompts are drawn from the training prompts but there are {len(task)}. Lower "
            "EffOPDConfig.validation_size or add prompts."
        )


def accuracy_scorer(trainer: Any, config: EffOPDConfig, task: Task) -> AccuracyScorer:
    """The scorer `accuracy` on validation prompts drawn from `task`.

    Raises:
        ConfigError: neither the trainer nor `config` has a length limit for answers.
        TaskError: too few prompts, or prompts without answers.
    """
    args, size = config.scorer_args, config.validation_size
    assert size is not None
    limit = args.max_completion_length or getattr(trainer.args, "max_completion_length", None)
    if limit is None:
        raise ConfigError(
            f"{type(trainer).__name__} has no max_completion_length, which limits validation answers. Set "
            "EffOPDConfig(args={'max_completion_length': …}), or pass a scorer."
        )
    check_validation_size(size, task)
    return AccuracyScorer(
        task.sample(size, config.seed),
        _tokenizer(trainer),
        Sampling(
            max_new_tokens=limit,
            temperature=args.temperature,
            batch_size=args.batch_size,
            chat_template_kwargs=getattr(trainer, "chat_template_kwargs", None),
        ),
        progress=not trainer.args.disable_tqdm,
        vocab_size=getattr(trainer, "vocab_size", None),
    )


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


# -- teacher_kl ------------------------------------------------------------------------------------


def rollouts_per_step(args: Any) -> int:
    """Number of rollouts that are sampled at once, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def rollouts_per_update(args: Any) -> int:
    """Number of rollouts that an optimizer step trains on, over all processes."""
    return rollouts_per_step(args) // getattr(args, "num_mini_batches", 1)


def wanted_rollouts(args: Any, rollouts: float) -> int:
    """Number of rollouts to score per search, over all processes.

    A step with fewer rollouts has all of them scored.

    Args:
        args: an `OPDConfig` or `trl.DistillationConfig`.
        rollouts: `EffOPDConfig.score_rollouts`; below 1: this share of the step's rollouts, at
            least min(half of them, 8), clamped to 4–32. At the default, a quarter, a search of
            about eight scores costs less than its step.

    Example:
        >>> from types import SimpleNamespace
        >>> def args(n):
        ...     return SimpleNamespace(
        ...         per_device_train_batch_size=n, gradient_accumulation_steps=1, world_size=1
        ...     )
        >>> [wanted_rollouts(args(n), 0.25) for n in (4, 8, 16, 64, 256)]
        [4, 4, 8, 16, 32]
    """
    if rollouts >= 1:
        return int(rollouts)
    sampled = rollouts_per_update(args)
    return min(max(int(sampled * rollouts), min(sampled // 2, _HALF_UP_TO), FEWEST), MOST)


def first_rollouts(args: Any, rollouts: float) -> int:
    """`wanted_rollouts` of the search that sets the rate, after one of several steps on them.

    Up to 32 if `rollouts` is a share, because the rate of the whole run depends on this search.
    """
    return wanted_rollouts(args, rollouts) if rollouts >= 1 else MOST


def comparable_rollouts(args: Any) -> int:
    """Number of rollouts per step that a search can score: the whole ones, if some are cut."""
    sampled, share = rollouts_per_update(args), getattr(args, "horizon_whole_share", 0.0)
    return args.world_size * share_of(sampled // args.world_size, share) if share else sampled


def check_rollouts(args: Any, rollouts: float) -> None:
    """Check that the settings allow the scorer `teacher_kl`; needs no model.

    Args:
        args: an `OPDConfig` or `trl.DistillationConfig`.
        rollouts: as for `wanted_rollouts`.

    Raises:
        ConfigError: fewer than two rollouts are scored, or the target is not the teacher (ExOPD).
    """
    if getattr(args, "lambda_extrapolation", 1) != 1:
        raise ConfigError(
            f"lambda_extrapolation={args.lambda_extrapolation} trains toward another target than the teacher, but the "
            "look-ahead's scorer 'teacher_kl' measures the divergence from the teacher. Score by answers, as "
            "strategy 'effopd' does (--effopd.validation_size), or use lambda_extrapolation=1."
        )
    scored = min(comparable_rollouts(args), wanted_rollouts(args, rollouts))
    if scored < 2:
        share = " --horizon_whole_share," if getattr(args, "horizon_whole_share", 0.0) else ""
        raise ConfigError(
            "the scorer 'teacher_kl' needs at least 2 rollouts per step to estimate a standard error; this run, on "
            f"{args.world_size} process(es), trains on {rollouts_per_update(args)} and scores {scored}. Raise{share} "
            "--per_device_train_batch_size, --gradient_accumulation_steps or --effopd.score_rollouts."
        )


def rollout_scorer(trainer: Any, rollouts: float = 0.25) -> RolloutScorer:
    """The scorer `teacher_kl`, which measures the divergence that the trainer minimizes.

    Args:
        trainer: an `OPDTrainer`, or any `trl.DistillationTrainer`.
        rollouts: as for `wanted_rollouts`.

    Raises:
        ConfigError: fewer than two rollouts are scored; the trainer does not distill or has no
            teacher model; or the target is not the teacher (ExOPD).
        CompatibilityError: a model has fewer vocabulary rows than the tokenizer has tokens, or its
            logits have a form that this package or the host's loss does not support.
    """
    own = getattr(trainer, "scored_divergence", None)  # a trainer whose teacher is no model in memory
    several = getattr(trainer, "teachers", None) is not None
    taught = several or getattr(trainer, "teacher_model", None) is not None
    if own is None and not (isinstance(trainer, DistillationTrainer) and taught):
        raise ConfigError(
            "the scorer 'teacher_kl' measures the divergence from the teacher on new rollouts: expected an OPDTrainer "
            f"or a trl.DistillationTrainer with a teacher model, got {type(trainer).__name__}. Use one of them, "
            "a strategy that scores answers (EffOPDConfig('effopd')), scorer='next_batch_loss' (the trainer's own "
            "loss), or a callable scorer."
        )
    check_rollouts(trainer.args, rollouts)
    wanted, first = wanted_rollouts(trainer.args, rollouts), first_rollouts(trainer.args, rollouts)
    _warn_of_few(trainer.args, wanted)
    if own is not None:
        divergence = own()
    else:
        divergence = DivergenceByTeacher(trainer) if several else TrainedDivergence(trainer)
    return RolloutScorer(divergence, *(-(-number // world_size()) for number in (wanted, first)))


def _warn_of_few(args: Any, wanted: int) -> None:
    sampled, parts = rollouts_per_update(args), getattr(args, "num_mini_batches", 1)
    if sampled < wanted and rank() == 0:
        logger.warning(
            "The look-ahead is set to score %d rollouts per step (--effopd.score_rollouts) but a step %s %d "
            "(--per_device_train_batch_size %d × --gradient_accumulation_steps %d × %d process(es)%s). All of them "
            "are scored, which makes decisions noisier. Raise one of the two, or lower --effopd.score_rollouts.",
            wanted,
            "trains on" if parts > 1 else "samples",
            sampled,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            world_size(),
            f" / --num_mini_batches {parts}" if parts > 1 else "",
        )


class TrainedDivergence:
    """The divergence that a `trl.DistillationTrainer` minimizes, in its training precision.

    Raises:
        CompatibilityError: as `rollout_scorer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        student = trainer.accelerator.unwrap_model(trainer.model)
        shared = shared_vocab_size(student, self._teacher, len(_tokenizer(trainer)))
        self._vocab_size = min(shared, getattr(trainer, "vocab_size", shared))  # less if a later teacher has less
        with in_use(self._teacher):
            check_models(student, {"teacher": self._teacher}, generates=False)
        _check_loss(trainer, {"student": student, "teacher": self._teacher})

    @property
    def _teacher(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.teacher_model)

    @torch.no_grad()
    def teacher_hidden(self, batches: Sequence[TokenBatch]) -> list[Target]:
        """The teacher at the N scored positions of each batch."""
        with self.trainer.accelerator.autocast(), in_use(self._teacher):
            return [Target(batch.hidden(self._teacher)) for batch in batches]

    def from_predictions(self, batches: Sequence[TokenBatch], predictions: Sequence[Sequence[Part]]) -> list[Target]:
        """`teacher_hidden` from the predictions that the loss reads, one part per micro-batch."""
        hidden = (part.teacher.hidden_BTH for (part,) in predictions)
        return [
            Target(h_BTH[: len(batch.ids_BL)][batch.scored_BT.to(h_BTH.device)])
            for batch, h_BTH in zip(batches, hidden, strict=True)
        ]

    def __call__(
        self,
        model: Any,
        batches: Sequence[TokenBatch],
        teacher_hidden: Sequence[Target],
        keep: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """D(model, teacher) [N], in nats, at the scored positions of each batch."""
        trainer = self.trainer
        with trainer.accelerator.autocast():
            logits = self._teacher_logits(teacher_hidden)
            return divergences(
                model, self._teacher, batches, vocab_size=self._vocab_size, beta=trainer.beta,
                temperature=trainer.temperature, teacher_hidden=[each.hidden_NH for each in teacher_hidden],
                teacher_logits=logits, keep=keep,
            )  # fmt: skip

    def _teacher_logits(self, targets: Sequence[Target]) -> list[tuple[Tensor, Tensor] | None] | None:
        """What is kept of the teacher's logits for each batch; `None`: not for this divergence."""
        if self.trainer.beta != 1 or not all(in_float32_on_cpu(each.hidden_NH) for each in targets):
            return None
        missing = [each for each in targets if each.logits is None]
        if missing and is_whole(self._teacher):
            head = Head.of(self._teacher, self._vocab_size)
            for each in missing:
                each.keep_logits(head, self.trainer.temperature)
        return [each.logits for each in targets]

    def moving_head(self, model: Any, weights: MovableWeights) -> MovingHead | None:
        """The output layer along W + s·Δ; `None` unless D is the reverse KL of unsharded models."""
        whole = is_whole(self._teacher)
        return line_head(model, weights, self._vocab_size, self.trainer.beta) if whole else None

    def slope(
        self, head: MovingHead, teacher_hidden: Sequence[Target], hidden: Mapping[float, Sequence[Tensor]]
    ) -> tuple[float, float]:
        """Σ over positions of D′(0) and of E var_π(δz), with z interpolated between 0 and 1."""
        if not sum(map(len, teacher_hidden)):
            return 0.0, 0.0
        ray = RayKL(
            head, Head.of(self._teacher, self._vocab_size), torch.cat([each.hidden_NH for each in teacher_hidden]),
            temperature=self.trainer.temperature,
        )  # fmt: skip
        for scale, parts in hidden.items():
            ray.add(scale, torch.cat(list(parts)))
        return ray.slope_sums()


def _check_loss(trainer: Any, models: Mapping[str, Any]) -> None:
    """Raise if TRL's own loss computes other logits than the model.

    It knows a soft cap under one name only, and ignores layers between backbone and output layer.
    """
    if not has_trls_loss(trainer) or not all(map(is_whole, models.values())):
        return
    for role, model in models.items():
        path, config = logit_path(model), core_of(model).config.get_text_config()
        layers = path.inner and getattr(config, "logits_scaling", None) is None
        if layers or path.softcap != getattr(config, "final_logit_softcapping", None):
            what = "layers between backbone and output layer" if layers else f"a soft cap of {path.softcap:g}"
            raise CompatibilityError(
                f"the {role}, {type(core_of(model)).__name__}, has {what}, which the loss of "
                f"{type(trainer).__name__} leaves out. It trains toward another distribution than the scored one. "
                "Use OPDTrainer, whose loss supports this model."
            )


def token_batch(rollouts: Mapping[str, Any]) -> TokenBatch:
    """A TRL micro-batch as a `TokenBatch`; tool output is part of the context but not scored."""
    scored_BT = rollouts["completion_mask"]
    if "tool_mask" in rollouts:
        scored_BT = scored_BT * rollouts["tool_mask"]
    return TokenBatch(
        torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1),
        torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1),
        scored_BT.bool(),
        rollouts.get(TEACHER_INDEX),
    )


def text_batch(rollouts: Mapping[str, Any]) -> TokenBatch:
    """`token_batch` of the rollouts that a search can score: the whole ones, if some are cut.

    Raises:
        ConfigError: the rollouts have images or other non-text inputs.
    """
    if seen := [key for key in MULTIMODAL_KEYS if rollouts.get(key) is not None]:
        raise ConfigError(
            f"the scorer 'teacher_kl' reads text only, but the rollouts have {', '.join(seen)}. Score by answers "
            "(--effopd.validation_size), as strategy 'effopd' does."
        )
    batch = token_batch(rollouts)
    return batch.first(int(rollouts[WHOLE].sum())) if WHOLE in rollouts else batch
