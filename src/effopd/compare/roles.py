"""Roles of the strategies in a comparison: baseline, rivals, headline, controls, claims, variants.

    baseline: plain           # sets the targets; every strategy is compared with it
    baselines: [plain, topd]  # their best-tuned run is the opponent of the envelope; default: the
                              # baseline alone. Without `baseline`, the first one is the baseline
    rivals: [effopd]          # every strategy is compared with these too, at the reference rate
    headline: [line_search]   # shown first; default: all but baseline, controls and variants
    controls: [noop]          # strategies expected to gain nothing; shown together
    claims:                   # published speed-ups over the baseline at the reference rate, checked
      - {strategy: effopd, speedup: 3, axis: steps, text: "≈ 3× fewer steps"}
    strategies:
      line_search-no-gate:    # compared with line_search at the variant's own learning rate
        variant_of: line_search
        effopd: {…}

These are fields of a plan. results.json stores them in its settings, so the page needs no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from effopd.compare.grid_run import AXES, Arm
from effopd.errors import ConfigError

#: Field of a strategy that names the strategy it is a variant of.
VARIANT_OF = "variant_of"
#: Plan fields that name strategies.
LISTS = ("baselines", "rivals", "headline", "controls")


@dataclass(frozen=True)
class Claim:
    """A published speed-up over the baseline at the reference learning rate.

    Attributes:
        strategy: strategy that the claim is about.
        speedup: factor over the baseline; larger is faster.
        axis: cost axis, one of `AXES`.
        text: short wording of the claim, quoted on the page.
    """

    strategy: str
    speedup: float
    axis: str = "steps"
    text: str = ""


@dataclass(frozen=True)
class Roles:
    """Roles of the strategies; `variants` maps a variant to its parent strategy."""

    baseline: str
    reference_learning_rate: float
    rivals: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    variants: Mapping[str, str] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()

    @property
    def rivals_to_beat(self) -> tuple[str, ...]:
        """Strategies whose best-tuned run is the opponent of the envelope."""
        return self.baselines or (self.baseline,)

    @property
    def reference(self) -> Arm:
        """Arm that sets the targets: the baseline at the reference learning rate."""
        return self.baseline, self.reference_learning_rate

    def parent(self, arm: Arm, arms: Iterable[Arm]) -> Arm | None:
        """Parent of a variant at the variant's learning rate; `None` if it is not in `arms`.

        Example:
            >>> roles = Roles("plain", 0.1, variants={"effopd-strict": "effopd"})
            >>> roles.parent(("effopd-strict", 0.1), [("effopd", 0.1), ("effopd", 0.3)])
            ('effopd', 0.1)
        """
        parent = (self.variants.get(arm[0], ""), arm[1])
        return parent if parent in arms else None

    def opening(self, strategies: Iterable[str]) -> list[str]:
        """Members of `strategies` that the page shows first, in the plan's order."""
        others = {self.baseline, *self.baselines, *self.controls, *self.variants}
        wanted = self.headline or [strategy for strategy in strategies if strategy not in others]
        return [strategy for strategy in wanted if strategy in strategies]

    def to_settings(self) -> dict[str, Any]:
        """JSON-ready dictionary for the settings of results.json."""
        return asdict(self) | {name: list(getattr(self, name)) for name in LISTS} | {
            "claims": [asdict(claim) for claim in self.claims], "variants": dict(self.variants)
        }  # fmt: skip

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> Roles:
        """Inverse of `to_settings`; fields that another version's results.json lacks are empty."""
        return cls(
            settings["baseline"],
            settings["reference_learning_rate"],
            **{name: tuple(settings.get(name, ())) for name in LISTS},
            claims=tuple(Claim(**claim) for claim in settings.get("claims", ())),
            variants=settings.get("variants", {}),
        )


def read_claims(entries: Sequence[Mapping[str, Any]]) -> tuple[Claim, ...]:
    """Claims of a plan.

    Raises:
        ConfigError: a field is missing, unknown, of the wrong type or out of range.
    """
    claims = []
    for entry in entries:
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise ConfigError(
                f"plan: a claim has the fields strategy, speedup, axis and text; got {entry!r}. Write for example "
                '{strategy: effopd, speedup: 3, axis: steps, text: "3× fewer steps"}.'
            ) from error
        if not isinstance(claim.speedup, int | float) or claim.speedup <= 0 or claim.axis not in AXES:
            raise ConfigError(
                f"plan: a claim needs a positive speedup and an axis that is one of {', '.join(AXES)}; got {entry!r}."
            )
        claims.append(claim)
    return tuple(claims)


def check_names(roles: Roles, strategies: Iterable[str]) -> None:
    """Check that all roles name known strategies and no strategy is a variant of itself.

    Raises:
        ConfigError: a name is unknown, or a strategy is a variant of itself.
    """
    known = list(strategies)
    named = {name: getattr(roles, name) for name in LISTS}
    named |= {"claims": [claim.strategy for claim in roles.claims], VARIANT_OF: list(roles.variants.values())}
    for role, names in named.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"plan: {role} names '{name}', which is not one of the strategies ({', '.join(known)})."
                )
    for variant, parent in roles.variants.items():
        if variant == parent:
            raise ConfigError(f"plan: '{variant}' is declared a variant of itself. Name another strategy.")
