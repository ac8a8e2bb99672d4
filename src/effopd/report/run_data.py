"""Settings and records of run directories, as the page of a run needs them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from effopd.common.unique_keys import load_unique, settings_text
from effopd.errors import ConfigError
from effopd.runs.records import (
    CONFIG,
    EVALS,
    METRICS,
    SEARCHES,
    EvaluationRecord,
    SearchRecord,
    StepRecord,
    read_evaluations,
    read_searches,
    read_steps,
)


@dataclass(frozen=True)
class RunRecords:
    """Settings and records of a run directory."""

    label: str
    root: Path
    config: dict[str, Any]
    versions: tuple[str, ...]
    steps: list[StepRecord]
    searches: list[SearchRecord]
    evaluations: list[EvaluationRecord]

    @property
    def last(self) -> StepRecord | EvaluationRecord:
        """Record of the latest step; its costs are cumulative."""
        latest: list[StepRecord | EvaluationRecord] = [*self.steps[-1:], *self.evaluations[-1:]]
        return max(latest, key=lambda record: record.step)

    @property
    def strategy(self) -> str:
        """Strategy of the look-ahead; without one, the method of the loss, the horizon or RL."""
        config = self.config
        strategy = (config.get("effopd") or {}).get("strategy")
        if strategy not in (None, "none"):
            return str(strategy)
        if config.get("algorithm"):
            return str(config["algorithm"])
        if config.get("rollout_horizon") not in (None, "none", "full"):
            return str(config["rollout_horizon"])
        return "exopd" if config.get("lambda_extrapolation") not in (None, 1, 1.0) else "plain"

    @property
    def clock(self) -> str:
        """Unit of the cost ledger."""
        return "CPU seconds" if self.config.get("cost_clock") == "cpu" else "seconds"

    @property
    def files(self) -> list[Path]:
        """Files with the rows and settings of the run."""
        return [self.root / name for name in (METRICS, EVALS, SEARCHES, CONFIG)]


def read_runs(roots: Sequence[Path]) -> list[RunRecords]:
    """The runs, labeled by their paths relative to the common parent folder.

    Raises:
        ConfigError: a folder holds no rows of a run, or is given twice, or a file is damaged.
    """
    paths = [root.absolute() for root in roots]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"a run directory is given twice: expected each run once, got {', '.join(map(str, roots))}.")
    above = paths[0].parent if len(paths) == 1 else Path(os.path.commonpath(paths))
    runs = []
    for root, path in zip(roots, paths, strict=True):
        check_is_folder(root)
        steps, evaluations = read_steps(root), read_evaluations(root)
        if not steps and not evaluations:
            raise ConfigError(
                f"{root} is not a run directory: expected rows in {METRICS} or {EVALS}. Pass the output directory of "
                "`effopd train` or `effopd rl`."
            )
        text = settings_text(root / CONFIG) if (root / CONFIG).is_file() else ""
        versions = tuple(line[2:] for line in text.splitlines() if line.startswith("# "))
        label = str(path.relative_to(above)) if path != above else path.name
        settings = _settings(text, root / CONFIG)
        runs.append(RunRecords(label, root, settings, versions, steps, read_searches(root), evaluations))
    return runs


def check_is_folder(root: Path) -> None:
    """Check that a run is a folder.

    Raises:
        ConfigError: it is a file, or there is nothing.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else f"no such folder (working directory: {Path.cwd()})"
        raise ConfigError(f"{root}: {what}. Expected the output directory of `effopd train` or `effopd rl`.")


def _settings(text: str, path: Path) -> dict[str, Any]:
    """The settings in the text of a `config.yaml`.

    Raises:
        ConfigError: the text is not YAML or holds no settings.
    """
    try:
        settings = load_unique(text, str(path)) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}. Copy the file again.") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path}, line 1: expected a mapping of settings, got a {type(settings).__name__}. Copy the file again."
        )
    if not isinstance(settings.get("effopd") or {}, dict):
        raise ConfigError(
            f"{path}: effopd: expected a block, {{strategy: …}}, got {settings['effopd']!r}. Copy the file again."
        )
    return settings
