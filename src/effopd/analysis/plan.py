"""Plan of an analysis: its runs, parts and settings, checked before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import effopd
from effopd.analysis.measure import GROUPS, Options
from effopd.analysis.progress import Progress, file_marks
from effopd.common.float64 import has_float64
from effopd.errors import ConfigError
from effopd.weights import (
    Adapter,
    Checkpoint,
    Difference,
    Ending,
    Part,
    Snapshot,
    ending_of,
    find_snapshots,
    open_checkpoint,
    open_differences,
)

PathLike = str | Path
#: Labels reserved for the `reference` column.
_RESERVED = ("base", "final", "first")


@dataclass(frozen=True)
class AnalysisRun:
    """One trained checkpoint or trajectory. Runs of one `group` (label) differ only in the seed.

    `ending` is how far the run came; `None`: unknown, for example of a single checkpoint.
    """

    name: str
    group: str
    path: Path
    snapshots: tuple[Snapshot, ...]
    differences: tuple[Difference, ...]
    ending: Ending | None = None


@dataclass(frozen=True)
class AnalysisPlan:
    """Validated inputs and settings of an analysis; `progress` lists the finished parts."""

    base: Checkpoint
    runs: tuple[AnalysisRun, ...]
    parts: tuple[Part, ...]
    options: Options
    out: Path
    progress: Progress

    @property
    def snapshots(self) -> int:
        """Number of snapshots over all runs."""
        return sum(len(run.snapshots) for run in self.runs)


def prepare(
    base: PathLike,
    trained: Mapping[str, PathLike | Sequence[PathLike]],
    out: PathLike,
    *,
    k: int = 20,
    steps: Sequence[int] | None = None,
    device: str | None = None,
    metrics: Sequence[str] = GROUPS,
    base_spectrum: bool = False,
    seed: int = 0,
) -> AnalysisPlan:
    """Check every setting, file and shape; write nothing. Arguments as in `analysis.analyze`.

    Raises:
        ConfigError: a setting is out of range, a path is given twice, or `out` holds other files.
        CheckpointError, WeightsError: a checkpoint is missing, incomplete, or does not fit the
            base.
    """
    options = Options(k, _check_metrics(metrics), base_spectrum, seed, resolve_device(device))
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}. The paper uses 20.")
    named = name_runs(trained)
    opened = open_checkpoint(base)
    if isinstance(opened, Adapter):
        raise ConfigError(
            f"the base {base} is an adapter: expected the full checkpoint it was trained from. Pass that checkpoint "
            "as the base, and the adapter as a trained run."
        )
    runs = _open_runs(opened, named, steps)
    progress = Progress(Path(out), _settings(Path(base), runs, options))
    return AnalysisPlan(opened, runs, tuple(opened.parts()), options, Path(out), progress)


def seed_names(label: str, count: int) -> list[str]:
    """Names of the runs of one label: the label, or label#0, label#1, … for several seeds."""
    return [label] if count == 1 else [f"{label}#{seed}" for seed in range(count)]


def labeled(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse `--trained LABEL=DIR` into label → folders; labels in the order given.

    Raises:
        ConfigError: a text is not LABEL=DIR, or a label is invalid.
    """
    paths: dict[str, list[str]] = {}
    for text in texts:
        label, equals, path = text.partition("=")
        if not (label and equals and path):
            raise ConfigError(
                f"--trained: expected LABEL=DIR, got {text!r}. Write for example --trained opd={text.strip('=')}."
            )
        _check_label(label)
        paths.setdefault(label, []).append(path)
    return paths


def _check_label(label: str) -> None:
    if not re.fullmatch(r"[\w.+-]+", label) or label in _RESERVED:
        raise ConfigError(
            f"the label {label!r} cannot be used: expected letters, digits and . _ + -, such as opd or rl. "
            f"The names {', '.join(_RESERVED)} are reserved."
        )


def name_runs(trained: Mapping[str, PathLike | Sequence[PathLike]]) -> list[tuple[str, str, Path]]:
    """(run, group, path) for each trained path; several paths of one label are seeds.

    Raises:
        ConfigError: there is no run, a label is invalid, or a path is given twice.
    """
    if not trained:
        raise ConfigError("no trained run given: expected at least one. Pass LABEL=PATH.")
    named: list[tuple[str, str, Path]] = []
    for label, value in trained.items():
        _check_label(label)
        paths = [value] if isinstance(value, str | Path) else list(value)
        if not paths:
            raise ConfigError(f"the label {label!r} has no path: expected at least one per label.")
        named += [(name, label, Path(path)) for name, path in zip(seed_names(label, len(paths)), paths, strict=True)]
    seen: dict[Path, str] = {}
    for name, _, path in named:
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise ConfigError(
                f"{path} is given twice, as {other} and as {name}: expected a different path for each run. Counting "
                "the same weights as two seeds makes every interval too narrow."
            )
    return named


def resolve_device(device: str | None) -> str:
    """`device`; `None`: the accelerator if it supports float64, otherwise the CPU.

    Raises:
        ConfigError: the device does not exist on this machine, or lacks float64 (mps).
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator.type if accelerator is not None and has_float64(accelerator) else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown to torch: expected e.g. cpu or cuda. ({error})") from error
    if not has_float64(kind):
        raise ConfigError(
            f"device '{kind}' has no float64, which is needed to distinguish an update from rounding. "
            "Use --device cpu."
        )
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum().item()  # 'meta' and others hold no numbers
    except Exception as error:  # backends raise different types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"device {device!r} cannot compute on this machine ({reason}): expected cpu, or an accelerator such as "
            "cuda. Use --device cpu."
        ) from error
    return device


def _check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    unknown = sorted(set(metrics) - set(GROUPS))
    if unknown or not metrics:
        raise ConfigError(
            f"metrics must name groups out of {', '.join(GROUPS)}; got {', '.join(unknown) or 'none'}. Omit the "
            "setting to measure everything."
        )
    return tuple(group for group in GROUPS if group in metrics or group == "norms")


def _open_runs(
    base: Checkpoint, named: Sequence[tuple[str, str, Path]], steps: Sequence[int] | None
) -> tuple[AnalysisRun, ...]:
    snapshots = [tuple(find_snapshots(path, steps)) for _, _, path in named]
    differences = open_differences(base, [[snapshot.path for snapshot in of_run] for of_run in snapshots])
    return tuple(
        AnalysisRun(name, group, path, of_run, of_run_differences, ending_of(path))
        for (name, group, path), of_run, of_run_differences in zip(named, snapshots, differences, strict=True)
    )


def _settings(base: Path, runs: Sequence[AnalysisRun], options: Options) -> dict[str, Any]:
    """Settings that must be equal to resume an interrupted analysis."""
    return {
        "effopd": effopd.__version__,
        "base": {"path": str(base.resolve()), "files": file_marks(base)},
        "runs": {
            run.name: {
                "group": run.group,
                "path": str(run.path.resolve()),
                "snapshots": [
                    {"step": s.step, "path": str(s.path.resolve()), "files": file_marks(s.path)} for s in run.snapshots
                ],
            }
            for run in runs
        },
        "k": options.k,
        "metrics": list(options.metrics),
        "base_spectrum": options.base_spectrum,
        "seed": options.seed,
        "device": options.device,
    }
