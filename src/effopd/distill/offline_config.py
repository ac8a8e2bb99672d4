"""Settings of offline distillation on stored rollouts, and those without effect there."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from effopd.distill.teachers.settings import LOADING, LOCAL_ONLY
from effopd.errors import ConfigError

#: Settings that only sampling or a live teacher reads.
_UNREAD = (
    "use_vllm", "rollout_horizon", "lambda_extrapolation", "reference_model_name_or_path", "log_completions",
    "teacher_model_init_kwargs", "teacher_model_revision", *LOCAL_ONLY,
    "top_p", "top_k", "min_p", "repetition_penalty",
    "generation_kwargs", "cache_implementation", "use_transformers_continuous_batching",
    "token_mask", "beta", "normalize_beta", "baseline", "samples_per_prefix", "updates_per_rollouts",
    "num_mini_batches", "replay_batches", "curriculum", "lmbda", "traces", "teacher_mixed_alpha",
)  # fmt: skip
#: Losses on stored answers: of the student, and of the teacher.
OFFLINE_LOSSES = ("sampled", "discord")


@dataclass
class OfflineArguments:
    """Flags of offline distillation; part of `OPDConfig`."""

    rollouts: str | None = field(
        default=None,
        metadata={
            "help": "Folder of stored answers, written by effopd cache (Lightning OPD, arXiv 2604.13010); training "
            "samples nothing and loads no teacher. loss_type is 'sampled', or 'discord' for traces of the teacher."
        },
    )
    evaluation_teacher: bool = field(
        default=False,
        metadata={"help": "With rollouts: load the teacher for evaluations only, which then report the exact KL."},
    )
    charge_rollouts: bool = field(
        default=False,
        metadata={
            "help": "With rollouts or traces: charge the seconds and tokens of collecting them to the run, from its "
            "start."
        },
    )
    discord_temperature: float = field(
        default=1.0,
        metadata={
            "help": "loss_type discord: τ of the token weights sigmoid((log π_θ(y) − log q(y))/τ). As it grows, the "
            "loss tends to cross-entropy."
        },
    )
    advantage_clip: float = field(
        default=10.0,
        metadata={"help": "With rollouts: bound of |log q(y) − log π_θ(y)| per token, in nats (> 0)."},
    )
    max_drift: float = field(
        default=0.1,
        metadata={
            "help": "With rollouts: allowed distance of the mean ratio π_θ(y)/π_ref(y) from 1, in (0, 1). Beyond it, "
            "training warns and the look-ahead refuses a jump."
        },
    )

    residualize: bool = field(
        default=False,
        metadata={
            "help": "With rollouts: subtract the teacher's mean bias by token and place, for a teacher that did not "
            "write the student's supervised data (Lightning OPD 2.0, arXiv 2607.28449)."
        },
    )

    @property
    def offline(self) -> bool:
        """Whether the run trains on stored rollouts."""
        return self.rollouts is not None

    @property
    def holds_teacher(self) -> bool:
        """Whether the run loads a teacher, for training or for evaluations."""
        return not self.offline or self.evaluation_teacher

    def imply_offline(self) -> None:
        """Set the defaults that stored rollouts imply; call it before the other checks."""
        if self.offline and getattr(self, "loss_type", "full") == "full":
            self.loss_type = "sampled"
        if self.offline:  # there is no loss without a teacher
            self.best_metric = "accuracy"  # shadows the class's default

    def check_offline(self) -> None:
        """Check the settings of this class; `effopd.distill.values` checks their ranges.

        Raises:
            ConfigError: a setting is not read, or needs sampling or a live teacher.
        """
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self)}  # of the whole config
        if not self.offline:
            for name in ("advantage_clip", "max_drift", "residualize", "evaluation_teacher", "charge_rollouts"):
                if name == "charge_rollouts" and getattr(self, "traces", None) is not None:
                    continue
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} is read only with stored rollouts. Leave it out, or set "
                        "--rollouts."
                    )
            return
        if not str(self.rollouts).strip():
            raise ConfigError("--rollouts: expected a folder that effopd cache wrote, got nothing.")
        loss = getattr(self, "loss_type", "sampled")
        if loss not in OFFLINE_LOSSES:
            raise ConfigError(
                f"loss_type={loss!r} needs a live teacher, but --rollouts stores log-probabilities of the sampled "
                f"tokens. Use --loss_type {' or '.join(OFFLINE_LOSSES)}, or leave --rollouts out."
            )
        if loss == "discord":
            self._check_discord(defaults)
        if self.evaluation_teacher and getattr(self, "teacher_model_name_or_path", None) is None:
            raise ConfigError("evaluation_teacher=True needs the teacher. Set --teacher_model_name_or_path.")
        loaded = ("teacher_model_init_kwargs", "teacher_model_revision", *LOADING) if self.evaluation_teacher else ()
        for name in _UNREAD:
            if name in loaded:
                continue
            value = getattr(self, name, None)
            if name in defaults and value not in (defaults[name], None):
                loads = "loads its teacher for evaluations only" if self.evaluation_teacher else "loads no teacher"
                raise ConfigError(
                    f"{name}={value!r} has no effect with --rollouts, which samples nothing and {loads}. "
                    f"Leave out --{name} or --rollouts."
                )

    def _check_discord(self, defaults: dict[str, Any]) -> None:
        """Refuse the settings of the policy gradient, which cross-entropy does not read."""
        for name in ("advantage_clip", "max_drift", "residualize"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not read by loss_type='discord', which has no advantage and "
                    "trains on answers of the teacher. Leave it out."
                )
