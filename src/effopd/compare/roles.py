"""Which strategy of a grid plays which part: what is compared with what, and what the page opens
with.

    baseline: plain                 # sets the targets; every strategy is compared with it
    rivals: [effopd]                # every strategy is compared with these too, at the reference learning rate
    headline: [line_search]         # strategies that the page opens with; default: all but baseline, controls and variants
    controls: [noop]                # strategies that should gain nothing; shown together
    claims:                         # published speed-ups over the baseline at the reference learning rate, to be judged
      - {strategy: effopd, speedup: 3, axis: steps, text: "≈ 3× fewer steps"}
    strategies:
      line_search-no-gate: {variant_of: line_search, effopd: {…}}   # compared with line_search at its own learning rate

These are fields of a plan; results.json keeps them in its settings, so that a page can be drawn
from it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from effopd.compare.grid_run import AXES, Arm
from effopd.errors import ConfigError

#: In a strategy's settings: the strategy that it is a variant of.
VARIANT_OF = "variant_of"
#: Plan fields that name strategies.
LISTS = ("rivals", "headline", "controls")


@dataclass(frozen=True)
class Claim:
    """A published speed-up over the baseline at the reference learning rate.

    Attributes:
        strategy: whose speed-up.
        speedup: the factor; larger is faster.
        axis: one of `AXES`.
        text: the claim in a few words, as the page quotes it.
    """

    strategy: str
    speedup: float
    axis: str = "steps"
    text: str = ""


@dataclass(frozen=True)
class Roles:
    """The parts that strategies play; `variants` maps a variant to what it is a variant of."""

    baseline: str
    reference_learning_rate: float
    rivals: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    variants: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> Arm:
        """The arm that sets the targets."""
        return self.baseline, self.reference_learning_rate

    def parent(self, arm: Arm, arms: Iterable[Arm]) -> Arm | None:
        """The arm that `arm` is a variant of, at its own learning rate, if it is among `arms`.

        Example:
            >>> roles = Roles("plain", 0.1, variants={"effopd-strict": "effopd"})
            >>> roles.parent(("effopd-strict", 0.1), [("effopd", 0.1), ("effopd", 0.3)])
            ('effopd', 0.1)
        """
        parent = (self.variants.get(arm[0], ""), arm[1])
        return parent if parent in arms else None

    def opening(self, strategies: Iterable[str]) -> list[str]:
        """The strategies of `strategies` that the page opens with, in the plan's order."""
        others = {self.baseline, *self.controls, *self.variants}
        wanted = self.headline or [strategy for strategy in strategies if strategy not in others]
        return [strategy for strategy in wanted if strategy in strategies]

    def to_settings(self) -> dict[str, Any]:
        """JSON-ready, for the settings of results.json."""
        return asdict(self) | {name: list(getattr(self, name)) for name in LISTS} | {
            "claims": [asdict(claim) for claim in self.claims], "variants": dict(self.variants)
        }  # fmt: skip

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> Roles:
        """The inverse of `to_settings`; what a results.json of another version lacks is empty."""
        return cls(
            settings["baseline"],
            settings["reference_learning_rate"],
            **{name: tuple(settings.get(name, ())) for name in LISTS},
            claims=tuple(Claim(**claim) for claim in settings.get("claims", ())),
            variants=settings.get("variants", {}),
        )


def read_claims(entries: Sequence[Mapping[str, Any]]) -> tuple[Claim, ...]:
    """The claims of a plan.

    Raises:
        ConfigError: an entry lacks a field, has an unknown one, or one of the wrong type.
    """
    claims = []
    for entry in entries:
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise ConfigError(
                f"plan: a claim has strategy, speedup, axis and text; got {entry!r}. Write for example "
                '{strategy: effopd, speedup: 3, axis: steps, text: "3× fewer steps"}.'
            ) from error
        if not isinstance(claim.speedup, int | float) or claim.speedup <= 0 or claim.axis not in AXES:
            raise ConfigError(
                "plan: a claim's speedup must be a positive number and its axis one of "
                f"{', '.join(AXES)}; got {entry!r}."
            )
        claims.append(claim)
    return tuple(claims)


def check_names(roles: Roles, strategies: Iterable[str]) -> None:
    """Every name must be one of the strategies, and no strategy a variant of itself.

    Raises:
        ConfigError: one is not.
    """
    known = list(strategies)
    named = {name: getattr(roles, name) for name in LISTS}
    named |= {"claims": [claim.strategy for claim in roles.claims], VARIANT_OF: list(roles.variants.values())}
    for role, names in named.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"plan: {role} names '{name}', which is none of the strategies ({', '.join(known)})."
                )
    for variant, parent in roles.variants.items():
        if variant == parent:
            raise ConfigError(f"plan: '{variant}' is declared a variant of itself. Name another strategy.")
