"""`ObjectiveArguments`: the flags of the training objectives, and which of them read which flag."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from effopd.distill.policy_gradient import BASELINES
from effopd.errors import ConfigError

logger = logging.getLogger(__name__)

LOSSES = ("full", "sampled", "teacher_top_k", "negative_advantage", "discord")
#: Losses of the sampled token's log-probability: their rollouts must come from the current weights.
ON_SAMPLED_TOKENS = ("sampled", "negative_advantage")
TOKEN_MASKS = ("none", "first_special")

#: Flag → the only value of `loss_type` that reads it.
ONLY_FOR = {
    "normalize_beta": "full",
    "baseline": "sampled", "baseline_top_k": "sampled", "samples_per_prefix": "sampled",
    "teacher_top_k": "teacher_top_k", "highest_entropy_share": "teacher_top_k",
    "negative_advantage": "negative_advantage", "lowest_logp_share": "negative_advantage",
    "entropy_advantage": "negative_advantage",
    "discord_temperature": "discord",
}  # fmt: skip


@dataclass
class ObjectiveArguments:
    """Flags of the training objectives; mixed into `OPDConfig`."""

    loss_type: str = field(
        default="full",
        metadata={
            "help": "Training loss. 'full': exact full-vocabulary divergence at every sampled token, selected by "
            "`beta`. 'sampled': the paper's policy gradient on the sampled token, always for the reverse KL. "
            "'teacher_top_k': reverse KL renormalized on the teacher's likeliest tokens (arXiv 2603.25562). "
            "'negative_advantage': a control without a teacher (arXiv 2608.31046). 'discord': cross-entropy on stored "
            "traces, with token weights (arXiv 2605.14071). `effopd methods` lists what each needs.",
            "choices": list(LOSSES),
        },
    )
    normalize_beta: bool = field(
        default=False,
        metadata={
            "help": "loss_type full with 0 < beta < 1: divide the loss by beta(1−beta), so that it does not vanish "
            "near 0 and 1 and a sweep of beta is no sweep of the learning rate."
        },
    )
    baseline: str = field(
        default="none",
        metadata={
            "help": "Baseline of loss_type sampled, subtracted from the advantage without bias. 'value': −KL(student "
            "‖ teacher) at the prefix (vOPD, arXiv 2605.07865). 'optimal': the scalar with the smallest variance of "
            "the logit gradient.",
            "choices": list(BASELINES),
        },
    )
    baseline_top_k: int = field(
        default=0,
        metadata={
            "help": "baseline value: number of the student's likeliest tokens on which the KL is renormalized. 0: the "
            "whole vocabulary. vOPD's cheaper variant uses 100."
        },
    )
    samples_per_prefix: int = field(
        default=1,
        metadata={
            "help": "loss_type sampled: tokens per prefix, the answer's own and others drawn from the student (arXiv "
            "2606.24143). The loss is their mean."
        },
    )
    teacher_top_k: int = field(
        default=32,
        metadata={
            "help": "Number of the teacher's likeliest tokens per prefix, for loss_type teacher_top_k and for "
            "teacher_server."
        },
    )
    highest_entropy_share: float = field(
        default=1.0,
        metadata={
            "help": "loss_type teacher_top_k: share of the tokens of each answer that are trained on, those with the "
            "largest student entropy. The example of the authors' code uses 0.2."
        },
    )
    negative_advantage: float = field(
        default=0.5, metadata={"help": "loss_type negative_advantage: size c of the advantage −c."}
    )
    lowest_logp_share: float = field(
        default=0.2,
        metadata={
            "help": "loss_type negative_advantage: share of the tokens of each answer that get the advantage, the "
            "least likely ones."
        },
    )
    entropy_advantage: bool = field(
        default=False,
        metadata={
            "help": "loss_type negative_advantage: OPSA, an advantage that grows from −c to −2c with the student's "
            "entropy among the chosen tokens of the answer."
        },
    )
    token_mask: str = field(
        default="none",
        metadata={
            "help": "Tokens left out of the training loss. 'first_special': the first '<', the first 'think' and the "
            "first end token of each answer, which student and teacher often spell differently (arXiv 2603.25562). "
            "Evaluations and scores use all tokens.",
            "choices": list(TOKEN_MASKS),
        },
    )

    @property
    def on_sampled_tokens(self) -> bool:
        """Whether the loss weights log π_θ of sampled tokens, so rollouts must be on-policy."""
        return self.loss_type in ON_SAMPLED_TOKENS

    def _check_objective(self) -> None:
        for name, names in (("loss_type", LOSSES), ("baseline", BASELINES), ("token_mask", TOKEN_MASKS)):
            if getattr(self, name) not in names:
                raise ConfigError(f"{name} must be one of {', '.join(names)}; got {getattr(self, name)!r}.")
        defaults = {f.name: f.default for f in fields(self)}
        for name, loss in ONLY_FOR.items():
            if name == "teacher_top_k" and getattr(self, "teacher_server", None) is not None:
                continue
            if getattr(self, name) != defaults[name] and self.loss_type != loss:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is read only with loss_type={loss!r}, got "
                    f"loss_type={self.loss_type!r}. Leave it out, or set --loss_type {loss}."
                )
        beta = self.beta  # type: ignore[attr-defined]  # a field of the host's config
        if self.normalize_beta and not 0 < beta < 1:
            raise ConfigError(
                f"normalize_beta=True has no effect with beta={beta}: expected 0 < beta < 1. Leave it out, or set "
                "--beta."
            )
        if self.baseline_top_k and self.baseline != "value":
            raise ConfigError(
                f"baseline_top_k={self.baseline_top_k} is read only with baseline='value', got "
                f"baseline={self.baseline!r}. Leave it out, or set --baseline value."
            )
        if self.loss_type == "sampled":
            self._check_sampled()
        elif self.loss_type != "full" and beta != 1.0:
            raise ConfigError(
                f"beta={beta} is not read by loss_type={self.loss_type!r}: expected its default, 1. Leave it out, or "
                "use loss_type='full'."
            )
        if self.loss_type == "discord" and getattr(self, "rollouts", None) is None:
            raise ConfigError(
                "loss_type='discord' trains on correct answers of the teacher. Collect them with effopd cache "
                "--sampled_by teacher and set --rollouts."
            )
        if self.loss_type == "negative_advantage" and self.lambda_extrapolation != 1:  # type: ignore[attr-defined]
            raise ConfigError(
                "lambda_extrapolation is not read by loss_type='negative_advantage', whose loss has no target: "
                "expected 1. Leave it out."
            )
        unfiltered = self.top_p == 1.0 and not getattr(self, "teacher_mixed_alpha", 0)  # type: ignore[attr-defined]
        if self.loss_type == "teacher_top_k" and unfiltered:
            logger.warning(
                "loss_type='teacher_top_k' leaves the student's probability outside the teacher's top k free. Its "
                "authors sample with --top_p 0.9 and report worse results without it (AIME24 17.7 instead of 23.6)."
            )

    def _check_sampled(self) -> None:
        """Require unfiltered samples: the sampled loss is a score-function estimate for y ~ π_θ."""
        host: Any = self
        wrong = {
            "beta": host.beta != 1.0,
            "top_p": host.top_p < 1.0,
            "top_k": host.top_k > 0,
            "min_p": bool(host.min_p),
            "repetition_penalty": host.repetition_penalty != 1.0,
            "generation_kwargs": bool(host.generation_kwargs),
        }
        if host.use_vllm and host.vllm_mode == "server" and host.temperature != 1:
            raise ConfigError(
                f"temperature={host.temperature}: loss_type='sampled' needs vLLM's log-probabilities, and a vLLM "
                "server returns them at temperature 1. Use temperature=1, vllm_mode='colocate' or loss_type='full'."
            )
        names = [name for name, is_wrong in wrong.items() if is_wrong]
        if names:
            raise ConfigError(
                f"loss_type='sampled' needs answers drawn from the student itself, unfiltered, but {', '.join(names)} "
                "change the sampler or the objective. Use the defaults of these flags, or loss_type='full'."
            )
