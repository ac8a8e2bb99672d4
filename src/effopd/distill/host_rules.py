"""Trainers without the scorer `next_batch_loss`, with the reason and the fix.

The loss of most of them cannot rank weights. The others have a cheaper scorer of the same quantity.

Trainers are known by the names of their classes, so that TRL's experimental trainers need not be
imported. A trainer without a rule is accepted. docs/hosts.md has the table for users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effopd.errors import ConfigError

_SURROGATE = (
    "is a policy-gradient surrogate: its gradient is right at the current weights, but its value does not rank other "
    "weights"
)
_BY_ANSWERS = "Score by answers (EffOPDConfig('effopd', validation_size=…)), or pass a callable scorer"

#: Reason and fix, or `None`: the loss of this trainer with these settings ranks weights.
Rule = Callable[[Any], tuple[str, str] | None]


def _policy_gradient(trainer: Any) -> tuple[str, str]:
    return f"its loss {_SURROGATE}", _BY_ANSWERS


def _self_distillation(trainer: Any) -> tuple[str, str] | None:
    args = trainer.args
    if args.distillation_mode == "sampled_token":
        return (
            f"distillation_mode='sampled_token' {_SURROGATE}",
            "Set distillation_mode='full_logits', or 'topk_logits' with distillation_topk",
        )
    if getattr(args, "distillation_weight", 1.0) != 1.0:
        return (
            f"distillation_weight={args.distillation_weight} adds a policy loss, which {_SURROGATE}",
            "Set distillation_weight=1.0",
        )
    if args.teacher_model_kind == "live":
        return (
            "with teacher_model_kind='live' the teacher moves with the candidate, so the loss has no fixed target",
            "Set teacher_model_kind='base' or 'ema'",
        )
    return None


def _iw_opd(trainer: Any) -> tuple[str, str] | None:
    if trainer.args.distillation_objective != "iw_opd":
        return None
    return f"distillation_objective='iw_opd' {_SURROGATE}", "Set distillation_objective='jsd'"


def _asynchronous(trainer: Any) -> tuple[str, str]:
    return (
        "its rollouts are sampled in another process, which would go on with the weights before a jump, and a resumed "
        "run is not the uninterrupted one",
        "Use DistillationTrainer or OPDTrainer",
    )


def _own_step(trainer: Any) -> tuple[str, str]:
    return "it computes its loss inside training_step, not in compute_loss", "Pass a callable scorer"


def _by_teacher(trainer: Any) -> tuple[str, str]:
    """Trainers that have the scorer `teacher_kl`, for any loss and wherever their teacher is."""
    if (factor := getattr(trainer.args, "lambda_extrapolation", 1)) != 1:
        return (
            f"its scores on new rollouts are divergences from the teacher, and lambda_extrapolation={factor} trains "
            "toward another target",
            _BY_ANSWERS,
        )
    return (
        "its default scorer 'teacher_kl' measures the divergence from the teacher on the same rollouts and asks the "
        "teacher at most once per search",
        "Leave out scorer=…; a strategy that scores answers also needs EffOPDConfig(score_rollouts=…)",
    )


def _local_teacher(trainer: Any) -> tuple[str, str] | None:
    return None if getattr(trainer, "teacher_model", None) is None else _by_teacher(trainer)


def _stored(trainer: Any) -> tuple[str, str]:
    return (
        "its loss multiplies the log-probabilities of stored tokens by factors that depend on the student, so its "
        "value does not rank other weights",
        "Leave out scorer=… and score by answers: EffOPDConfig('effopd', validation_size=…)",
    )


#: Name of a trainer class → its rule; a class inherits the rules of its bases.
RULES: dict[str, Rule] = {
    "AsyncDistillationTrainer": _asynchronous,
    "AsyncGRPOTrainer": _asynchronous,
    "DistillationTrainer": _local_teacher,
    "GRPOTrainer": _policy_gradient,
    "IWOPDTrainer": _iw_opd,
    "OPDTrainer": _by_teacher,
    "OfflineOPDTrainer": _stored,
    "OnlineDPOTrainer": _own_step,
    "RLOOTrainer": _policy_gradient,
    "SDFTTrainer": _self_distillation,
    "SDPOTrainer": _self_distillation,
}


def is_a(trainer: Any, *names: str) -> bool:
    """Whether the trainer's class or one of its bases has one of the names."""
    return any(kind.__name__ in names for kind in type(trainer).__mro__)


def check_next_batch(trainer: Any) -> None:
    """Check that the trainer's loss on the next batch can rank weights.

    Raises:
        ConfigError: it cannot; another scorer measures the same; or several optimizer steps train
            on the same batch.
    """
    for name, rule in RULES.items():
        found = rule(trainer) if is_a(trainer, name) else None
        if found is not None:
            raise _refused(trainer, *found)
    args = trainer.args
    if getattr(args, "on_sampled_tokens", False):  # subclasses and other trainers with an `OPDConfig`
        raise _refused(trainer, f"loss_type={args.loss_type!r} {_SURROGATE}", _BY_ANSWERS)
    for name in ("num_iterations", "updates_per_rollouts"):
        if (steps := getattr(args, name, 1)) > 1:
            raise _refused(
                trainer,
                f"{name}={steps} trains several steps on the same rollouts",
                f"Set {name}=1. {_BY_ANSWERS}",
            )


def _refused(trainer: Any, why: str, fix: str) -> ConfigError:
    return ConfigError(f"scorer='next_batch_loss' does not work on {type(trainer).__name__}: {why}. {fix}.")
