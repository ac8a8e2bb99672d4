"""What to compare: a grid of runs, strategy × learning rate × seed × task, read from one YAML file.

    output_dir: runs/compare              # a run lands in TASK/STRATEGY/lr-RATE/seed-N below it
    reference_learning_rate: 3.0e-5
    baseline: plain                       # sets the targets; every strategy is compared with it
    tasks: [testbed:chain_sum]
    seeds: [0, 1, 2, 3, 4]
    base: {…}                             # settings of `effopd train` that every run shares
    strategies:                           # what each one changes; `learning_rate_factors` default to [1]
      plain: {learning_rate_factors: [0.333, 1, 3, 10]}
      effopd: {effopd: {strategy: effopd}}
      effopd-all: {variant_of: effopd, effopd: {strategy: effopd, parameters: all}}   # also compared with effopd
    rivals: [effopd]                      # optional: every strategy is compared with these too
    headline: [effopd]                    # optional: opens the page; default: all but baseline, controls and variants
    controls: [noop]                      # optional: strategies that should gain nothing, shown together
    claims:                               # optional: published speed-ups over the baseline, judged on the page
      - {strategy: effopd, speedup: 3, axis: steps, text: 3× fewer steps}
    workers: 2                            # runs at a time
    threads: 1                            # CPU threads of each; default: all of them, divided by `workers`
    devices: ["0", "1"]                   # optional: CUDA_VISIBLE_DEVICES of each worker
    launcher: [accelerate, launch]        # optional: put before `-m effopd.commands.main train …`

Seeds come first in the order of runs, so a grid that was stopped half-way holds complete seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from effopd.compare.roles import LISTS, VARIANT_OF, Roles, check_names, read_claims
from effopd.errors import ConfigError

#: What the grid itself sets in every run.
GRID_KEYS = ("task", "learning_rate", "seed", "task_seed", "output_dir", "resume_from_checkpoint")
FACTORS = "learning_rate_factors"
#: Fields of a strategy that are no settings of its runs.
GRID_FIELDS = (FACTORS, VARIANT_OF)


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid: where it stands in it, its folder, and its settings as `effopd train
    --config` takes them.
    """

    task: str
    strategy: str
    learning_rate: float
    seed: int
    path: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """A short label for bars and messages."""
        return f"{self.task} {self.strategy} lr {self.learning_rate:.3g} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """A checked plan; see the module's header for the fields.

    Raises:
        ConfigError: a field is missing, unknown or out of range; nothing has been run then.
    """

    output_dir: str
    reference_learning_rate: float
    tasks: list[str]
    seeds: list[int]
    base: dict[str, Any]
    strategies: dict[str, dict[str, Any]]
    baseline: str = "plain"
    rivals: list[str] = field(default_factory=list)
    headline: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None
    devices: list[str] | None = None
    launcher: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "strategies"):
            value = getattr(self, name)
            if not value or (isinstance(value, list) and len(set(value)) != len(value)):
                raise ConfigError(f"plan: '{name}' must not be empty and must not repeat itself, got {value!r}.")
        if self.baseline not in self.strategies:
            raise ConfigError(
                f"plan: the baseline '{self.baseline}' is none of the strategies ({', '.join(self.strategies)})."
            )
        if not isinstance(self.reference_learning_rate, int | float) or not 0 < self.reference_learning_rate < 1:
            raise ConfigError(
                "plan: reference_learning_rate must be a number in (0, 1), got "
                f"{self.reference_learning_rate!r}. YAML "
                "reads 3e-5 as text: write 3.0e-5."
            )
        if self.workers < 1 or (self.threads is not None and self.threads < 1):
            raise ConfigError(f"plan: workers and threads must be at least 1, got {self.workers} and {self.threads}.")
        if self.devices is not None and len(self.devices) < self.workers:
            raise ConfigError(
                f"plan: {self.workers} workers but {len(self.devices)} devices: name one "
                "CUDA_VISIBLE_DEVICES per worker."
            )
        for name, settings in {"base": self.base, **self.strategies}.items():
            self._check_settings(name, settings or {})
        check_names(self.roles, self.strategies)
        if 1.0 not in self.factors(self.baseline):
            raise ConfigError(
                f"plan: the baseline '{self.baseline}' needs factor 1 among its {FACTORS}: its run at the reference "
                "learning rate sets the target."
            )

        seen: dict[Path, PlannedRun] = {}
        for run in self.runs():
            other = seen.setdefault(run.path, run)
            if other is not run:
                raise ConfigError(
                    f"plan: two runs would share the folder {run.path}. Make tasks and {FACTORS} differ more."
                )

    def _check_settings(self, name: str, settings: Mapping[str, Any]) -> None:
        taken = [key for key in GRID_KEYS if key in settings]
        if taken:
            raise ConfigError(f"plan: '{name}' sets {', '.join(taken)}, which the grid sets itself. Leave it out.")
        factors = settings.get(FACTORS, [1.0])
        if name != "base" and (
            not isinstance(factors, list)
            or not factors
            or not all(isinstance(f, int | float) and f > 0 for f in factors)
        ):
            raise ConfigError(f"plan: '{name}.{FACTORS}' must be a list of positive numbers, got {factors!r}.")

    @property
    def roles(self) -> Roles:
        """Which strategy plays which part."""
        variants = {
            name: settings[VARIANT_OF] for name, settings in self.strategies.items() if VARIANT_OF in (settings or {})
        }
        return Roles(
            self.baseline, self.reference_learning_rate, **{name: tuple(getattr(self, name)) for name in LISTS},
            claims=read_claims(self.claims), variants=variants,
        )  # fmt: skip

    def factors(self, strategy: str) -> list[float]:
        """Learning rates of a strategy, as multiples of the reference."""
        return [float(factor) for factor in (self.strategies[strategy] or {}).get(FACTORS, [1.0])]

    def runs(self) -> list[PlannedRun]:
        """The whole grid, seed by seed."""
        return [
            self._run(task, strategy, factor, seed)
            for seed in self.seeds
            for task in self.tasks
            for strategy in self.strategies
            for factor in self.factors(strategy)
        ]

    def _run(self, task: str, strategy: str, factor: float, seed: int) -> PlannedRun:
        rate = self.reference_learning_rate * factor
        rate = self.reference_learning_rate if factor == 1 else float(f"{rate:.4g}")
        settings = merge(self.base, run_settings(self.strategies[strategy]))
        path = Path(self.output_dir) / folder_name(task) / strategy / f"lr-{rate:.3g}" / f"seed-{seed}"
        settings |= {
            "task": task, "learning_rate": rate, "seed": seed, "task_seed": seed, "output_dir": str(path)
        }  # fmt: skip
        if settings.get("effopd"):
            settings["effopd"] = {**settings["effopd"], "seed": seed}
        return PlannedRun(task, strategy, rate, seed, path, settings)


def run_settings(strategy: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a strategy of a plan changes in the settings of its runs."""
    return {key: value for key, value in (strategy or {}).items() if key not in GRID_FIELDS}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, blocks merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def folder_name(task: str) -> str:
    """A task as a folder name: `testbed:chain_sum` → `testbed-chain_sum`."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in task)


def load_grid(path: str | Path, **overrides: Any) -> Grid:
    """Read and check a plan; `overrides` that are not `None` win.

    Raises:
        ConfigError: no such file, no YAML mapping, or a field that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no plan at {path}: expected a YAML file (recipes/compare-testbed.yaml is one).")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    known = {f.name: f for f in dataclasses.fields(Grid)}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with {', '.join(known)}; got {type(values).__name__}.")
    unknown = sorted(set(values) - set(known))
    required = [name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if values.get(name) is None]
    if unknown or missing:
        raise ConfigError(
            f"{path}: " + "; ".join(
                [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
            ) + f". A plan has {', '.join(known)}."
        )  # fmt: skip
    _check_types(path, values)
    return Grid(**values | {name: value for name, value in overrides.items() if value is not None})


def _check_types(path: Path, values: Mapping[str, Any]) -> None:
    wanted: Sequence[tuple[type, Sequence[str]]] = (
        (list, ("tasks", "seeds", "devices", "launcher", "claims", *LISTS)),
        (dict, ("base", "strategies")),
        (str, ("output_dir", "baseline")),
        (int, ("workers", "threads")),
    )
    for kind, names in wanted:
        for name in names:
            if values.get(name) is not None and not isinstance(values[name], kind):
                raise ConfigError(
                    f"{path}: '{name}' must be a {kind.__name__}, got "
                    f"{type(values[name]).__name__} ({values[name]!r})."
                )
