"""Settings of the look-ahead: the values of the strategy, replaced by those that the user gives."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effopd.errors import ConfigError
from effopd.extrapolate import strategies as strategies  # each adds itself to STRATEGIES
from effopd.extrapolate.anchored import named_device
from effopd.extrapolate.kinds import build, check_kind, hints, mapping, plain, without_numpy
from effopd.extrapolate.parameter_rules import compile_rule
from effopd.extrapolate.schedule import SCHEDULES
from effopd.extrapolate.scorers.base import SCORERS
from effopd.extrapolate.search import GATES
from effopd.extrapolate.setting_help import setting_help
from effopd.extrapolate.strategy import PAPER, STRATEGIES, Strategy

#: Plain training; reads no settings.
NONE = "none"
_CHOICES: dict[str, Collection[str]] = {"schedule": SCHEDULES, "gate": GATES}
_GIVEN = object()
#: The only gate that reads `min_z`.
_READS_MIN_Z = "significant"


@dataclass
class EffOPDConfig:
    r"""Settings of the look-ahead; the defaults are those of EffOPD (arXiv 2605.11739).

    At each trigger of `schedule`, the search scores candidates $W + s\,\Delta$ with the update
    $\Delta = W - W_\mathrm{anchor}$. It moves the model to a candidate that passes `gate`, or keeps
    W. The anchor is the weights after the previous search; at first, the initial weights.

    Each strategy defines values for the settings that it reads; a setting left at `None` takes that
    value. After construction, `None` marks the settings that the strategy does not read. Giving one
    of those a value is an error; the strategy's own value is always accepted. To change the
    strategy, build a new config: `dataclasses.replace` keeps the values of the previous strategy.

    Raises:
        ConfigError: a value is out of range, or the strategy does not read it.

    Example:
        >>> EffOPDConfig("line_search").gate, EffOPDConfig("line_search", gate="better").min_z
        ('significant', None)
        >>> EffOPDConfig("fixed", args={"k": 2}).args
        {'k': 2}
    """

    strategy: str = field(
        default="effopd",
        metadata={"help": setting_help("strategy"), "choices": [NONE, *STRATEGIES]},
    )
    args: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": setting_help("args")},
    )
    schedule: str | None = field(default=None, metadata={"help": setting_help("schedule"), "choices": list(SCHEDULES)})
    parameters: str | None = field(default=None, metadata={"help": setting_help("parameters")})
    validation_size: int | None = field(default=None, metadata={"help": setting_help("validation_size")})
    score_rollouts: float | None = field(default=None, metadata={"help": setting_help("score_rollouts")})
    gate: str | None = field(default=None, metadata={"help": setting_help("gate"), "choices": list(GATES)})
    min_z: float | None = field(default=None, metadata={"help": setting_help("min_z")})
    reset_moments: bool | None = field(default=None, metadata={"help": setting_help("reset_moments")})
    adapt_learning_rate: bool | None = field(default=None, metadata={"help": setting_help("adapt_learning_rate")})
    seed: int = field(
        default=0,
        metadata={
            "help": "Random seed of the validation prompts and of scoring; all candidates of a search share "
            "random numbers. Default: 0."
        },
    )
    anchor_device: str | None = field(
        default=None,
        metadata={"help": "Device of the fp32 anchor, e.g. 'cpu'. Default: the device of each parameter."},
    )

    def __post_init__(self) -> None:
        for name in hints(type(self)):
            setattr(self, name, without_numpy(getattr(self, name)))
        self._check("strategy", self.strategy, (NONE, *STRATEGIES))
        self.args = mapping("EffOPDConfig.args", self.args)
        for name, hint in hints(type(self)).items():
            if name != "args":
                check_kind(f"EffOPDConfig.{name}", getattr(self, name), hint)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) is not None:
                self._check(name, getattr(self, name), allowed)
        self._resolve()
        self._resolve_args()
        self._check_ranges()
        named_device(self.anchor_device)

    @staticmethod
    def _check(name: str, value: Any, allowed: Collection[str]) -> None:
        if value not in allowed:
            raise ConfigError(f"EffOPDConfig.{name} must be one of {', '.join(allowed)}; got {value!r}.")

    # -- the strategy's values ---------------------------------------------------------------------

    @property
    def changed(self) -> set[str]:
        """Names of settings, including those in `args`, that differ from the strategy's values."""
        differing = {name for name in PAPER if getattr(self, name) not in (None, self.rules.settings.get(name))}
        defaults = {name: value for cls in self._args_classes for name, value in plain(cls()).items()}
        return differing | {name for name, value in self.args.items() if value != defaults.get(name)}

    def _resolve(self) -> None:
        """Fill in every setting that the strategy reads; refuse the others."""
        preset = self.rules.settings
        # where a strategy never does something, false asks for nothing
        own = {name: preset.get(name, False if PAPER[name] is False else None) for name in PAPER}
        changed = {name for name in PAPER if getattr(self, name) not in (None, own[name])}
        for name in sorted(changed - set(preset)):
            raise ConfigError(f"EffOPDConfig.{name} {self._why_unread(name)}")
        scorers = [name for _, name in SCORERS.values()]
        if changed.issuperset(scorers):
            raise ConfigError(
                f"EffOPDConfig.{scorers[1]} and {scorers[0]} are two ways of scoring: expected one of them, got "
                f"{getattr(self, scorers[1])} and {getattr(self, scorers[0])}."
            )
        values = {name: getattr(self, name) if name in changed else preset.get(name) for name in PAPER}
        if chosen := changed.intersection(scorers):
            values |= {name: None for name in scorers if name not in chosen}
        if values["gate"] != _READS_MIN_Z:
            if "min_z" in changed:
                raise ConfigError(
                    f"EffOPDConfig.min_z is read by gate '{_READS_MIN_Z}' only, so with gate "
                    f"'{values['gate']}' it would be ignored. Leave it out, or choose that gate."
                )
            values["min_z"] = None
        for name, value in values.items():
            setattr(self, name, value)

    def _why_unread(self, name: str) -> str:
        if not self.enabled:
            return (
                f"is set, but strategy '{NONE}' is plain training and reads no settings. Leave it out, or choose "
                "another strategy."
            )
        readers = ", ".join(other for other, rules in STRATEGIES.items() if name in rules.settings)
        return (
            f"is read by the strategies {readers} only, so with strategy '{self.strategy}' it would be ignored. "
            "Leave it out, or choose another strategy."
        )

    @property
    def _args_classes(self) -> list[type]:
        scorer = [SCORERS[self.scorer][0]] if self.scorer else []
        return [self.rules.args, *scorer]

    def _resolve_args(self) -> None:
        """Complete `args` with the defaults of the strategy's and the scorer's own dataclass."""
        given, label = self.args, "EffOPDConfig.args"
        complete: dict[str, Any] = {}
        for cls in self._args_classes:
            complete |= plain(build(label, cls, {name: given[name] for name in hints(cls) if name in given}))
        # defaults of the scorer that was replaced are accepted
        others = [plain(cls()) for cls, _ in SCORERS.values()]
        idle = {name for values in others for name, value in values.items() if given.get(name, _GIVEN) == value}
        if unknown := sorted(set(given) - set(complete) - idle):
            scorer = f" and its scorer '{self.scorer}'" if self.scorer else ""
            raise ConfigError(
                f"{label}: strategy '{self.strategy}'{scorer} would ignore {', '.join(unknown)}; expected "
                f"{', '.join(complete) or 'none'}."
            )
        self.args = complete

    def _check_ranges(self) -> None:
        if self.parameters is not None:
            compile_rule(self.parameters)
        if self.score_rollouts is not None and not (
            0 < self.score_rollouts < 1 or (self.score_rollouts >= 1 and float(self.score_rollouts).is_integer())
        ):
            raise ConfigError(
                "EffOPDConfig.score_rollouts must be a whole number of at least 1, or a share of the step's "
                f"rollouts in (0, 1), got {self.score_rollouts}."
            )
        if self.score_rollouts is not None and self.score_rollouts >= 1:
            self.score_rollouts = int(self.score_rollouts)
        if self.validation_size is not None and self.validation_size < 1:
            raise ConfigError(
                f"EffOPDConfig.validation_size must be at least 1, got {self.validation_size}. The paper's is 50."
            )
        if self.validation_size == 1 and self.gate == _READS_MIN_Z:
            raise ConfigError(
                f"EffOPDConfig.validation_size=1 is too few for gate '{_READS_MIN_Z}': a standard error needs at "
                "least 2 examples."
            )
        if self.min_z is not None and not 0 <= self.min_z < math.inf:
            raise ConfigError(f"EffOPDConfig.min_z must be >= 0 and finite, got {self.min_z}.")
        if self.seed < 0:
            raise ConfigError(f"EffOPDConfig.seed must be at least 0, got {self.seed}.")

    # -- reading -----------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the strategy is not plain training."""
        return self.strategy != NONE

    @property
    def rules(self) -> Strategy:
        """The strategy."""
        return STRATEGIES[self.strategy] if self.enabled else _PLAIN_TRAINING

    @property
    def strategy_args(self) -> Any:
        """The strategy's entries of `args`, as its dataclass."""
        return self._built(self.rules.args)

    @property
    def scorer_args(self) -> Any:
        """The scorer's entries of `args`, as its dataclass; `None`: the strategy does not score."""
        return self._built(SCORERS[self.scorer][0]) if self.scorer else None

    def _built(self, cls: type) -> Any:
        return build("EffOPDConfig.args", cls, {name: self.args[name] for name in hints(cls)})

    @property
    def scorer(self) -> str | None:
        """Name of the scorer, 'accuracy' or 'teacher_kl'; `None` if the strategy does not score."""
        return next((scorer for scorer, (_, name) in SCORERS.items() if getattr(self, name) is not None), None)

    @property
    def scored(self) -> bool:
        """Whether the run needs validation prompts (training prompts with answers)."""
        return self.scorer == "accuracy"

    def triggers(self, step: int, history: Sequence[Any] = ()) -> bool:
        """Whether to search after optimizer step `step`, given the searches so far."""
        return self.schedule is not None and SCHEDULES[self.schedule](step, history)


def _never(*_: Any) -> Any:
    raise ConfigError(f"strategy '{NONE}' is plain training: leave the look-ahead out, or choose a strategy.")


_PLAIN_TRAINING = Strategy("plain training", _never, settings={})
