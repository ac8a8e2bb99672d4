"""`InterventionOptions`: settings of the interventions for Python, command line and YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from effopd.errors import ConfigError

RANK_NORMS, RANK_ENDS, RESTS = ("own", "full", "shared"), ("top", "bottom"), ("trained", "base")
ANCHORS = ("previous", "base")
#: Largest scale of a line.
_LARGEST = 1e6


@dataclass
class InterventionOptions:
    """Settings of all interventions. Each help text starts with the intervention that reads it.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    _argument_group_name = "intervention"

    alphas: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(11)],
        metadata={"help": "alpha: scales α of W0 + αΔW. Default: 0 to 1 in steps of 0.1."},
    )
    half_width: int | None = field(
        default=None,
        metadata={
            "help": "window: half-width h of the trained window l−h … l+h, in layers. Default: the paper's 8 for 28 "
            "layers or more, in proportion below (4 layers: 1)."
        },
    )
    percents: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0],
        metadata={"help": "rank: number of components kept, in percent of min(M, N), rounded up."},
    )
    ends: list[str] = field(
        default_factory=lambda: list(RANK_ENDS),
        metadata={"help": "rank: 'top' keeps the leading components, 'bottom' the trailing ones at their own norm."},
    )
    rank_norm: str = field(
        default="own",
        metadata={
            "help": "rank: norm of the leading components. 'own': unchanged; 'full': the norm of the run's whole "
            "update of that matrix; 'shared': the mean of that norm over all given runs (the paper).",
            "choices": list(RANK_NORMS),
        },
    )
    rest: str = field(
        default="trained",
        metadata={
            "help": "rank: source of the parameters other than attention and MLP matrices. With 'trained', 100 %% of "
            "the components gives the trained model.",
            "choices": list(RESTS),
        },
    )
    betas: list[float] = field(
        default_factory=lambda: [i / 5 for i in range(9)],
        metadata={"help": "norm_scaling: scales β: 0 leaves ΔW_t unchanged, 1 gives it the final norm."},
    )
    early_steps: list[int] | None = field(
        default=None,
        metadata={"help": "norm_scaling: early steps t. Default: all saved steps after step 0 and before the last."},
    )
    random_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "random: seeds, one random direction each."}
    )

    scales: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        metadata={"help": "linearity: scales s of W_t + sΔ; 0 and the known scales are added."},
    )
    known_scales: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "linearity: scales whose hidden states are known; at least two."},
    )
    anchors: list[str] = field(
        default_factory=lambda: list(ANCHORS),
        metadata={
            "help": "linearity: start of Δ = W_t − anchor. 'previous': the saved step before t, or the base if there "
            "is none; 'base': W0."
        },
    )

    def __post_init__(self) -> None:
        lists = ("alphas", "percents", "betas", "scales", "known_scales")
        for name in (*lists, "ends", "random_seeds", "anchors"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"--{name}: expected at least one value, got none.")
            setattr(self, name, list(dict.fromkeys(values)))
        for name in lists:
            bad = [v for v in getattr(self, name) if not isinstance(v, int | float) or not math.isfinite(v)]
            if bad:
                raise ConfigError(f"--{name}: expected finite numbers, got {bad[0]!r}. Write e.g. --{name} 0.5 1.")
        bad = [p for p in self.percents if not 0 < p <= 100]
        if bad:
            raise ConfigError(f"--percents: expected percentages above 0 and at most 100, got {bad[0]:g}.")
        if self.half_width is not None and self.half_width < 0:
            raise ConfigError(f"--half_width: expected at least 0 layers, got {self.half_width}.")
        if any(seed < 0 for seed in self.random_seeds):
            raise ConfigError(f"--random_seeds: expected integers of at least 0, got {min(self.random_seeds)}.")
        for name in ("scales", "known_scales"):
            if bad := [value for value in getattr(self, name) if abs(value) > _LARGEST]:
                raise ConfigError(f"--{name}: expected numbers from -1e6 to 1e6, got {bad[0]:g}.")
        if len(self.known_scales) < 2:
            raise ConfigError(
                f"--known_scales: expected at least two different scales, got {self.known_scales[0]:g}. A line has "
                "two known points, for example --known_scales 0 1."
            )
        for name, known in (
            ("ends", RANK_ENDS),
            ("rank_norm", RANK_NORMS),
            ("rest", RESTS),
            ("anchors", ANCHORS),
        ):
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if item not in known:
                    raise ConfigError(f"--{name}: expected {' or '.join(known)}, got {item!r}.")
