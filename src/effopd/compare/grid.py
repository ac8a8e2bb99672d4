"""Plan of a comparison: a grid of strategy × learning rate × seed × task, read from one YAML file.

    output_dir: runs/compare         # folder of a run: TASK/STRATEGY/lr-RATE/seed-N below it
    reference_learning_rate: 3.0e-5
    baseline: plain                  # sets the targets; every strategy is compared with it
    tasks: [testbed:chain_sum]       # or {TASK: {…}}, with settings that differ by task
    seeds: [0, 1, 2, 3, 4]
    base: {…}                        # settings of `effopd train` shared by all runs
    strategies:                      # settings per strategy; learning_rate_factors default to [1]
      plain: {learning_rate_factors: [0.333, 1, 3, 10]}
      effopd: {effopd: {strategy: effopd}}
      effopd-all:
        variant_of: effopd           # also compared with effopd
        effopd: {strategy: effopd, parameters: all}
    workers: 2                       # runs at a time
    threads: 1                       # CPU threads per run; default: all threads / `workers`
    devices: ["0", "1"]              # optional: CUDA_VISIBLE_DEVICES of each worker
    launcher: [accelerate, launch]   # optional: put before `-m effopd.commands.main train …`

    # optional, see `roles.py`:
    baselines: [plain, topd]         # their best-tuned run is the opponent; default: the baseline
    rivals: [effopd]                 # every strategy is compared with these too
    headline: [effopd]               # shown first; default: all but baseline, controls, variants
    controls: [noop]                 # strategies expected to gain nothing, shown together
    claims:                          # published speed-ups over the baseline, checked on the page
      - {strategy: effopd, speedup: 3, axis: steps, text: 3× fewer steps}

`{task}` (as a folder name) and `{seed}` in a text are replaced by those of the run, for files
that a run reads: `rollouts: runs/rollouts/{task}/seed-{seed}`.

Runs are ordered by seed first, so a grid stopped half-way holds complete seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from effopd.common.unique_keys import load_unique
from effopd.compare.roles import LISTS, VARIANT_OF, Roles, check_names, read_claims
from effopd.errors import ConfigError

#: Settings that the grid sets in every run.
GRID_KEYS = ("task", "learning_rate", "seed", "task_seed", "output_dir", "resume_from_checkpoint")
FACTORS = "learning_rate_factors"
#: Fields of a strategy that are not settings of its runs.
GRID_FIELDS = (FACTORS, VARIANT_OF)


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid: its place, its folder, and its settings for `effopd train --config`."""

    task: str
    strategy: str
    learning_rate: float
    seed: int
    path: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Short label for progress bars and messages."""
        return f"{self.task} {self.strategy} lr {self.learning_rate:.3g} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """A checked plan; the module docstring describes the fields.

    Raises:
        ConfigError: a field is missing, unknown or out of range. Raised before any run starts.
    """

    output_dir: str
    reference_learning_rate: float
    tasks: list[str] | dict[str, dict[str, Any]]
    seeds: list[int]
    base: dict[str, Any]
    strategies: dict[str, dict[str, Any]]
    baseline: str = ""
    baselines: list[str] = field(default_factory=list)
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
                raise ConfigError(f"plan: '{name}' must not be empty or contain duplicates, got {value!r}.")
        if not self.baseline:
            object.__setattr__(self, "baseline", self.baselines[0] if self.baselines else "plain")
        if self.baseline not in self.strategies:
            raise ConfigError(
                f"plan: the baseline '{self.baseline}' is not one of the strategies ({', '.join(self.strategies)})."
            )
        if self.baselines and (self.baseline not in self.baselines or len(set(self.baselines)) < len(self.baselines)):
            raise ConfigError(
                f"plan: baselines={self.baselines!r}: expected different strategies, one of them the baseline "
                f"'{self.baseline}', which sets the targets."
            )
        if not isinstance(self.reference_learning_rate, int | float) or not 0 < self.reference_learning_rate < 1:
            raise ConfigError(
                "plan: reference_learning_rate must be a number in (0, 1), got "
                f"{self.reference_learning_rate!r}. YAML reads 3e-5 as text: write 3.0e-5."
            )
        if self.workers < 1 or (self.threads is not None and self.threads < 1):
            raise ConfigError(f"plan: workers and threads must be at least 1, got {self.workers} and {self.threads}.")
        if self.devices is not None and len(self.devices) < self.workers:
            raise ConfigError(
                f"plan: {self.workers} workers but {len(self.devices)} devices. Name one "
                "CUDA_VISIBLE_DEVICES value per worker."
            )
        by_task = self.tasks if isinstance(self.tasks, dict) else {}
        for name, settings in [("base", self.base), *by_task.items(), *self.strategies.items()]:
            if not isinstance(settings or {}, Mapping):
                raise ConfigError(f"plan: the settings of '{name}' must be a mapping, got {settings!r}.")
            self._check_settings(name, settings or {}, factors=name in self.strategies)
        check_names(self.roles, self.strategies)
        if 1.0 not in self.factors(self.baseline):
            raise ConfigError(
                f"plan: the baseline '{self.baseline}' needs factor 1 in its {FACTORS}: its run at the reference "
                "learning rate sets the targets. Add 1 to the list."
            )

        seen: dict[Path, PlannedRun] = {}
        for run in self.runs():
            other = seen.setdefault(run.path, run)
            if other is not run:
                raise ConfigError(
                    f"plan: two runs would share the folder {run.path}. Make tasks and {FACTORS} differ more."
                )

    def _check_settings(self, name: str, settings: Mapping[str, Any], *, factors: bool) -> None:
        taken = [key for key in GRID_KEYS if key in settings]
        if taken:
            raise ConfigError(f"plan: '{name}' sets {', '.join(taken)}, which the grid sets itself. Remove it.")
        given = settings.get(FACTORS, [1.0])
        if factors and not (
            isinstance(given, list) and given and all(isinstance(f, int | float) and 0 < f < math.inf for f in given)
        ):
            raise ConfigError(f"plan: '{name}.{FACTORS}' must be a list of positive numbers, got {given!r}.")

    @property
    def roles(self) -> Roles:
        """Roles of the strategies in the comparison."""
        variants = {
            name: settings[VARIANT_OF] for name, settings in self.strategies.items() if VARIANT_OF in (settings or {})
        }
        return Roles(
            self.baseline, self.reference_learning_rate, **{name: tuple(getattr(self, name)) for name in LISTS},
            claims=read_claims(self.claims), variants=variants,
        )  # fmt: skip

    def factors(self, strategy: str) -> list[float]:
        """Learning rates of a strategy, as multiples of the reference learning rate."""
        return [float(factor) for factor in (self.strategies[strategy] or {}).get(FACTORS, [1.0])]

    def runs(self) -> list[PlannedRun]:
        """All runs of the grid, seed by seed."""
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
        by_task = self.tasks[task] if isinstance(self.tasks, dict) else {}
        settings = merge(merge(self.base, by_task or {}), run_settings(self.strategies[strategy]))
        settings = filled(settings, {"{task}": folder_name(task), "{seed}": str(seed)})
        path = Path(self.output_dir) / folder_name(task) / strategy / f"lr-{rate:.3g}" / f"seed-{seed}"
        settings |= {
            "task": task, "learning_rate": rate, "seed": seed, "task_seed": seed, "output_dir": str(path)
        }  # fmt: skip
        if isinstance(settings.get("effopd"), Mapping) and settings["effopd"]:
            settings["effopd"] = {**settings["effopd"], "seed": seed}
        return PlannedRun(task, strategy, rate, seed, path, settings)


def run_settings(strategy: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run settings in a plan's strategy, without the grid's own fields."""
    return {key: value for key, value in (strategy or {}).items() if key not in GRID_FIELDS}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `changes`; nested mappings are merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def filled(settings: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """`settings` with the keys of `values` replaced in every text, also in mappings and lists.

    Example:
        >>> filled({"rollouts": "cache/seed-{seed}", "max_steps": 4}, {"{seed}": "3"})
        {'rollouts': 'cache/seed-3', 'max_steps': 4}
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return filled(value, values)
        if isinstance(value, list):
            return [replaced(each) for each in value]
        if isinstance(value, str):
            for name, text in values.items():
                value = value.replace(name, text)
        return value

    return {key: replaced(value) for key, value in settings.items()}


def folder_name(task: str) -> str:
    """A task as a folder name: `testbed:chain_sum` → `testbed-chain_sum`."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in task)


def load_grid(path: str | Path, **overrides: Any) -> Grid:
    """Read and check a plan; `overrides` that are not `None` take precedence.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or has an invalid field.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no plan at {path}: expected a YAML file (recipes/compare-testbed.yaml is one).")
    try:
        values = load_unique(path.read_text(), str(path))
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
            ) + f". Fields of a plan: {', '.join(known)}."
        )  # fmt: skip
    _check_types(path, values)
    return Grid(**values | {name: value for name, value in overrides.items() if value is not None})


def _check_types(path: Path, values: Mapping[str, Any]) -> None:
    tasks = values.get("tasks")
    if not isinstance(tasks, list | dict):
        raise ConfigError(f"{path}: 'tasks' must be a list or a mapping, got {type(tasks).__name__} ({tasks!r}).")
    wanted: Sequence[tuple[type, Sequence[str]]] = (
        (list, ("seeds", "devices", "launcher", "claims", *LISTS)),
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
    for name in ("tasks", "strategies", *LISTS):
        for key in values.get(name) or ():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{path}: '{name}' has a name that YAML reads as {key!r}: expected text. Write it in quotes."
                )
    for name in values["strategies"]:
        if "/" in name or name.startswith("."):
            raise ConfigError(f"{path}: strategy {name!r}: expected a name of a folder, without '/' and dot in front.")
    for seed in values["seeds"]:
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"{path}: 'seeds' has {seed!r}: expected whole numbers of at least 0.")
