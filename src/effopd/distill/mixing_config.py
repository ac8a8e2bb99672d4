"""Settings of steps on given answers (GKD) and of teacher-mixed sampling (MiniLLM), with checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effopd.errors import ConfigError


@dataclass
class MixingArguments:
    """Flags of the mixing; part of `OPDConfig`."""

    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "λ of GKD (arXiv 2306.13649): probability in [0, 1] that a step trains on rollouts of the "
            "student and not on given answers. Both kinds of steps have the same loss; 1: always on-policy."
        },
    )
    traces: str | None = field(
        default=None,
        metadata={
            "help": "With lmbda < 1: folder of stored answers, written by effopd cache --sampled_by teacher; only "
            "correct ones are used. Default: the column `completion` of the training dataset."
        },
    )

    teacher_mixed_alpha: float = field(
        default=0.0,
        metadata={
            "help": "α of MiniLLM (arXiv 2306.08543), in [0, 1): draw each token of a rollout from α·teacher + "
            "(1−α)·student. The paper uses 0.2; 0: the student samples alone. The teacher decodes along, so it must "
            "be in memory, and sampling unfiltered and without vLLM."
        },
    )

    @property
    def mixes(self) -> bool:
        """Whether some training steps have prefixes that are not the student's alone."""
        return self.lmbda < 1 or self.teacher_mixed_alpha > 0

    @property
    def decoding_roles(self) -> tuple[str, ...]:
        """Roles of the frozen models that decode rollouts token by token."""
        return ("teacher",) if self.teacher_mixed_alpha else ()

    def check_mixing(self) -> None:
        """Check the combination of settings; `effopd.distill.values` checks their ranges.

        Raises:
            ConfigError: `traces` is not read, or the loss needs rollouts of the present weights; or
                the sampler cannot be mixed with the teacher, or the loss cannot use it.
        """
        if self.teacher_mixed_alpha:
            self._check_teacher_mixed()
        host: Any = self
        if self.lmbda == 1:
            if self.traces is not None:
                raise ConfigError(
                    f"traces={self.traces!r} is read only with lmbda < 1. Leave it out, or set --lmbda (for example "
                    "0.5)."
                )
            return
        if host.on_sampled_tokens:
            raise ConfigError(
                f"lmbda={self.lmbda:g}: loss_type={host.loss_type!r} is an estimate for rollouts of the present "
                "weights, and given answers are not. Use --loss_type full or teacher_top_k, or --lmbda 1."
            )
        if host.rollout_horizon == "prune":
            raise ConfigError(
                f"lmbda={self.lmbda:g}: rollout_horizon='prune' adapts the length to the student's own rollouts, and "
                "given answers are not. Use another rollout_horizon, or --lmbda 1."
            )
        if host.teachers or host.curriculum != "none":
            name = "teachers" if host.teachers else "curriculum"
            raise ConfigError(
                f"lmbda={self.lmbda:g}: given answers belong to no row of the step, so they have neither a teacher "
                f"nor a stage of their own. Leave --{name} out, or use --lmbda 1."
            )
        if self.traces is not None and not str(self.traces).strip():
            raise ConfigError("--traces: expected a folder that effopd cache wrote, got nothing.")

    def _check_teacher_mixed(self) -> None:
        host: Any = self
        unfiltered = "tokens are drawn from the whole mixture"
        wrong = {
            "use_vllm": (host.use_vllm, "a vLLM engine cannot ask the teacher before it draws a token"),
            "top_p": (host.top_p < 1.0, unfiltered),
            "top_k": (host.top_k > 0, unfiltered),
            "min_p": (bool(host.min_p), unfiltered),
            "repetition_penalty": (host.repetition_penalty != 1.0, unfiltered),
            "generation_kwargs": (bool(host.generation_kwargs), unfiltered),
            "loss_type": (
                host.loss_type == "negative_advantage",
                "this loss has no teacher, and is an estimate for tokens of the student",
            ),
            "lmbda": (self.lmbda < 1, "both replace the student's own prefixes, so their shares would not add up"),
            "rollout_horizon": (
                host.rollout_horizon == "prune",
                "this horizon adapts the length to the student's own rollouts",
            ),
            "teachers": (bool(host.teachers), "one teacher samples along"),
            "teacher_shard": (host.teacher_shard, "each process decodes its own number of tokens"),
        }
        for name, (given, why) in wrong.items():
            if given:
                raise ConfigError(
                    f"teacher_mixed_alpha={self.teacher_mixed_alpha:g} does not work with {name}="
                    f"{getattr(host, name)!r}: {why}. Leave out --{name}, or --teacher_mixed_alpha."
                )
