"""Every decision of the look-ahead search, explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from effopd.errors import ConfigError
from effopd.extrapolate.live_weights import named_device
from effopd.extrapolate.parameter_rules import compile_rule
from effopd.extrapolate.schedule import SCHEDULES
from effopd.extrapolate.search import GATES
from effopd.extrapolate.settings_in_use import OF_THE_STRATEGY, WELCOME_ANYWHERE, why_unread
from effopd.extrapolate.settings_in_use import ONLY_FOR as ONLY_FOR
from effopd.extrapolate.strategies import STRATEGIES, Strategy

SCORERS = ("accuracy", "teacher_kl")
OPTIMIZERS = ("keep", "reset")
#: Kinds of values by the annotation of a field.
_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
}


@dataclass
class EffOPDConfig:
    r"""Settings of EffOPD (arXiv 2605.11739); the defaults are the paper's.

    A setting that the strategy or its scorer does not read is refused, unless it has its default.

    After optimizer step $t \in \{1, 2, 4, 8, …\}$ the search tries $W + s\,\Delta$ for the scales $s$ in order, where
    $\Delta = W - W_\mathrm{anchor}$ and the anchor is the weights the previous trigger left (at first: the start). A
    candidate whose score passes the gate is accepted and becomes the score to beat; the first failure ends the search.

    Raises:
        ConfigError: a value is out of range or would be ignored; the message names the field, the value and the fix.
    """

    strategy: str = field(
        default="effopd",
        metadata={
            "help": "'none': plain OPD. "
            + " ".join(f"'{name}': {strategy.help}." for name, strategy in STRATEGIES.items()),
            "choices": ["none", *STRATEGIES],
        },
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "At which optimizer steps to search. 'adaptive': at every step while jumps pay, up to 8 steps apart "
            "when they do not, up to 4 while steps back do. Default: the strategy's own.",
            "choices": list(SCHEDULES),
        },
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "'accuracy': right answers on D_v (needs answers, generates). 'teacher_kl': the divergence "
            "from the teacher that is trained (by default the exact reverse KL) on the next step's rollouts, before they "
            "are trained on (no answers, no generation). Default: the strategy's own.",
            "choices": list(SCORERS),
        },
    )
    score_rollouts: int | None = field(
        default=None,
        metadata={
            "help": "How many rollouts 'teacher_kl' scores a candidate on. Default: a quarter of the step's, at least 8 and "
            "at most 32."
        },
    )
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "The optimizer's moments after a jump forwards: 'keep', or 'reset' (they belong to the gradients of "
            "the place that was left). Default: the strategy's own.",
            "choices": list(OPTIMIZERS),
        },
    )
    steer: bool | None = field(
        default=None,
        metadata={
            "help": "Let the scale s that scores best, accepted or not, steer the learning rate on top of its schedule: times "
            "√min(1+s, 4) if s > 1 twice in a row (½√s if that is more), times 1/√2 if s < 0, never below an eighth of the "
            "schedule. Default: the "
            "strategy's own."
        },
    )
    scales: list[float] = field(
        default_factory=lambda: [2.0, 4.0, 6.0, 8.0, 10.0],
        metadata={"help": "Candidate scales s of W + s·Δ, tried in this order (the paper: 2k for k = 1..5)."},
    )
    gate: str | None = field(
        default=None,
        metadata={
            "help": "'ge' accepts score >= best so far, 'gt' only score > best so far, 'margin' only what is better by "
            "gate_z standard errors, example by example. Default: the strategy's own.",
            "choices": list(GATES),
        },
    )
    gate_z: float = field(
        default=2.0,
        metadata={
            "help": "How many standard errors gate 'margin' asks for. 'line_search' asks for them forwards only: any gain will "
            "do for a step back towards the last search's weights."
        },
    )
    parameters: str | None = field(
        default=None,
        metadata={
            "help": "Which parameters move: 'attention+mlp', 'all', 'released-code', or a regular expression "
            "searched in parameter names. Default: the strategy's own."
        },
    )
    fixed_k: float = field(
        default=1.0, metadata={"help": "'fixed' jumps to W + 2kΔ with this k, at every trigger, unscored."}
    )
    fit_every: int = field(
        default=2, metadata={"help": "'alpha_opd' and 'relex' observe the weights every that many steps …"}
    )
    fit_until: int = field(default=16, metadata={"help": "… up to this step, where they predict and jump, once."})
    relex_factor: float = field(
        default=6.0,
        metadata={"help": "'relex' predicts the weights of step relex_factor * fit_until (its paper: 6 to 20 times)."},
    )
    alpha_target: float | None = field(
        default=None,
        metadata={
            "help": "'alpha_opd' predicts the weights whose accuracy on D_v is this. Default: the teacher's accuracy "
            "on D_v, measured once and charged."
        },
    )
    validation_size: int = field(
        default=50, metadata={"help": "Size of D_v: how many training prompts each candidate answers."}
    )
    validation_batch_size: int = field(
        default=64, metadata={"help": "How many of the D_v prompts are generated at once."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the validation answers (0 = greedy)."}
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Token limit of the validation answers. Default: the trainer's max_completion_length."},
    )
    score_timeout: float | None = field(
        default=None, metadata={"help": "Stop with an error if scoring one candidate takes longer, in seconds."}
    )
    seed: int = field(
        default=0, metadata={"help": "Draws D_v and seeds the sampling noise that all candidates of a search share."}
    )
    anchor_device: str | None = field(
        default=None, metadata={"help": "Where the fp32 anchor lives, e.g. 'cpu'. Default: with the parameters."}
    )

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_choice("strategy", ("none", *STRATEGIES))
        choices = {"schedule": SCHEDULES, "gate": GATES, "scorer": SCORERS, "optimizer": OPTIMIZERS}
        for name, allowed in choices.items():
            if getattr(self, name) is not None:
                self._check_choice(name, allowed)
        for name in self.given - {*WELCOME_ANYWHERE}:
            if reason := why_unread(name, self.strategy, self._resolved()):
                raise ConfigError(f"EffOPDConfig.{name} {reason}. Leave it out, or choose another strategy or scorer.")
        self._check_scoring()
        self._check_strategy_settings()
        compile_rule(self.resolved_parameters)
        named_device(self.anchor_device)

    def _check_kinds(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kind, _, optional = str(f.type).partition(" | ")
            if kind == "list[float]":
                many = isinstance(value, list | tuple) and all(_is(each, Real) for each in value)
                if not many:
                    raise ConfigError(f"EffOPDConfig.{f.name} must be a list of numbers, got {value!r}.")
                setattr(self, f.name, list(value))
            elif not (_is(value, _KINDS[kind][0]) or (optional and value is None)):
                raise ConfigError(
                    f"EffOPDConfig.{f.name} must be {_KINDS[kind][1]}{' or unset' if optional else ''}, got {value!r}."
                )

    def _check_scoring(self) -> None:
        if self.score_rollouts is not None and self.score_rollouts < 1:
            raise ConfigError(f"EffOPDConfig.score_rollouts must be at least 1 or unset, got {self.score_rollouts}.")
        if self.validation_size < 1 or self.validation_batch_size < 1:
            raise ConfigError(
                "EffOPDConfig.validation_size and validation_batch_size must be at least 1, got "
                f"{self.validation_size} and {self.validation_batch_size}. The paper's D_v has 50 prompts."
            )
        if self.validation_size == 1 and self.scored and self.resolved_gate == "margin" and self.plan.fit is None:
            raise ConfigError(
                "EffOPDConfig.validation_size=1 is too few for gate 'margin', which compares example by example: expected at least 2."
            )
        if self.score_timeout is not None and not 0 < self.score_timeout < float("inf"):
            raise ConfigError(
                f"EffOPDConfig.score_timeout must be positive and finite or unset, got {self.score_timeout}."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"EffOPDConfig.temperature must be >= 0, got {self.temperature}.")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ConfigError(
                f"EffOPDConfig.max_completion_length must be at least 1 or unset, got {self.max_completion_length}."
            )
        if self.seed < 0:
            raise ConfigError(f"EffOPDConfig.seed must be at least 0, got {self.seed}.")

    def _check_strategy_settings(self) -> None:
        if not self.scales or any(not 0 < scale < float("inf") for scale in self.scales):
            raise ConfigError(
                f"EffOPDConfig.scales must be a non-empty list of positive finite numbers, got {self.scales}. "
                "The paper's are [2, 4, 6, 8, 10]."
            )
        if not 0 <= self.gate_z < float("inf"):
            raise ConfigError(f"EffOPDConfig.gate_z must be >= 0 and finite, got {self.gate_z}.")
        if not 0 <= self.fixed_k < float("inf"):
            raise ConfigError(f"EffOPDConfig.fixed_k must be >= 0 and finite, got {self.fixed_k}.")
        if self.fit_every < 1 or self.fit_until < 4 * self.fit_every or self.fit_until % self.fit_every:
            raise ConfigError(
                "EffOPDConfig.fit_until must be a multiple of fit_every and at least 4 times as large (a line needs "
                f"points), got fit_every={self.fit_every}, fit_until={self.fit_until}."
            )
        if not 1 < self.relex_factor < float("inf"):
            raise ConfigError(f"EffOPDConfig.relex_factor must be above 1 and finite, got {self.relex_factor}.")
        if self.alpha_target is not None and not 0 < self.alpha_target <= 1:
            raise ConfigError(f"EffOPDConfig.alpha_target is an accuracy in (0, 1], got {self.alpha_target}.")

    def _check_choice(self, name: str, allowed) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"EffOPDConfig.{name} must be one of {', '.join(allowed)}; got {value!r}.")

    @property
    def enabled(self) -> bool:
        """Whether there is any look-ahead."""
        return self.strategy != "none"

    def default(self, name: str) -> Any:
        """What a setting is if it is left out: the strategy's own, or that of the field; `None` if the host decides."""
        if name in OF_THE_STRATEGY and self.enabled:
            return getattr(self.plan, name)
        field = next(f for f in fields(self) if f.name == name)
        return field.default if field.default_factory is MISSING else field.default_factory()

    @property
    def given(self) -> set[str]:
        """Names of the settings that differ from their defaults."""
        found = {f.name for f in fields(self) if getattr(self, f.name) != self.default(f.name)} - {"strategy"}
        return {name for name in found if getattr(self, name) is not None}

    def _resolved(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: self.default(name) if value is None else value for name, value in values.items()}

    def in_use(self) -> dict[str, Any]:
        """The settings that this strategy reads, by name; a `None` is left to the host."""
        resolved = self._resolved()
        return {name: value for name, value in resolved.items() if why_unread(name, self.strategy, resolved) is None}

    @property
    def plan(self) -> Strategy:
        """The strategy; for 'none' the paper's, which then never runs."""
        return STRATEGIES["effopd" if self.strategy == "none" else self.strategy]

    @property
    def scored(self) -> bool:
        """Whether the run needs D_v: training prompts with answers."""
        return self.enabled and self.resolved_scorer == "accuracy"

    @property
    def resolved_scorer(self) -> str | None:
        """`scorer`, or the strategy's; `None` if it does not score."""
        return self.scorer or self.plan.scorer

    @property
    def resolved_optimizer(self) -> str:
        """`optimizer`, or the strategy's."""
        return self.optimizer or self.plan.optimizer

    @property
    def resolved_steer(self) -> bool:
        """`steer`, or the strategy's."""
        return self.plan.steer if self.steer is None else self.steer

    @property
    def resolved_gate(self) -> str:
        """`gate`, or the strategy's."""
        return self.gate or self.plan.gate

    @property
    def resolved_parameters(self) -> str:
        """`parameters`, or the strategy's."""
        return self.parameters or self.plan.parameters

    def triggers(self, step: int, history: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the look-ahead may move the weights after optimizer step `step`, given the searches so far."""
        if self.plan.fit:
            return step == self.fit_until
        return SCHEDULES[self.schedule or self.plan.schedule](step, history)

    def observes(self, step: int) -> bool:
        """Whether a fitting strategy takes a look at the weights after optimizer step `step`."""
        return self.plan.fit is not None and 0 < step <= self.fit_until and step % self.fit_every == 0


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; truth values are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
