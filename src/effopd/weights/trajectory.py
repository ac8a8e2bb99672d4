"""The checkpoints of a run directory, a transformers output folder or a single folder, by step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from effopd.errors import CheckpointError
from effopd.weights.checkpoint_files import ADAPTER, INDEX, WEIGHTS, find_weights, read_json

_STEP = re.compile(r"(?:step|checkpoint|global_step)[-_]?(\d+)$")
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint folder and the optimizer step of its weights (`None`: unknown)."""

    step: int | None
    path: Path


@dataclass(frozen=True)
class Ending:
    """How far a run came: its last step with weights, its planned number of steps, and whether its
    final model exists.
    """

    step: int
    planned: int
    final_model: bool


def ending_of(path: str | Path) -> Ending | None:
    """How far the run in a folder came; `None`: its steps or their planned number are unknown.

    The number is `max_steps` of the newest checkpoint's trainer state, or of `config.yaml`.
    """
    root = Path(path)
    steps = _step_folders(root)
    saved = _steps_in(root / "checkpoints") | _steps_in(root)
    states = (saved[step] / _STATE for step in sorted(saved, reverse=True))
    newest = next(filter(Path.is_file, states), None)
    try:
        planned = (read_json(newest) if newest else _settings(root)).get("max_steps")
    except CheckpointError:  # neither is needed for the weights
        return None
    if not steps or not isinstance(planned, int) or planned < 1:
        return None
    return Ending(max(steps), planned, _has_weights(root))


def find_snapshots(path: str | Path, steps: Sequence[int] | None = None) -> list[Snapshot]:
    """Checkpoints under a path, by step.

    Args:
        path: a checkpoint or adapter folder (one snapshot); a run directory (its `trajectory/`,
            otherwise its `checkpoints/`); or a folder of `step-8`, `checkpoint-500`, … folders.
        steps: return only these steps, without checking for gaps; `None`: all.

    Raises:
        CheckpointError: there are no checkpoints, a folder has no weights, a step of `steps` does
            not exist, or there is a gap: a step is missing according to the run's `trajectory`
            rule or the regular spacing of the others.
    """
    root = Path(path)
    folders = _step_folders(root)
    if not folders:
        return _single(root, steps)
    empty = [str(folder) for folder in folders.values() if not _has_weights(folder)]
    wanted = sorted(folders) if steps is None else sorted(set(steps))
    missing = [step for step in wanted if step not in folders]
    if missing:
        raise CheckpointError(
            f"{root} has no step {_list(missing)}: it has {_list(sorted(folders))}. Choose among these with --steps."
        )
    if steps is None:
        gaps = sorted(_expected(root, set(folders)) - set(folders))
        if gaps:
            raise CheckpointError(
                f"the trajectory of {root} has a gap: step {_list(gaps)} missing, between {_list(sorted(folders))}. "
                "Copy the missing folders, or choose the steps to use with --steps."
            )
    lost = [folder for folder in empty if steps is None or Path(folder) in {folders[step] for step in wanted}]
    if lost:
        raise CheckpointError(
            f"{lost[0]} has no {WEIGHTS}, {INDEX} or {ADAPTER}: its weights are missing. Copy the folder again, or "
            "leave out the step with --steps."
        )
    return [Snapshot(step, folders[step]) for step in wanted]


def _step_folders(root: Path) -> dict[int, Path]:
    """Step → folder, from the first place that has step folders."""
    for place in (root / "trajectory", root / "checkpoints", root):
        folders = _steps_in(place)
        if folders and (place != root or not _has_weights(root)):
            return folders
    return {}


def _steps_in(place: Path) -> dict[int, Path]:
    """Step → folder, of the step folders in one place."""
    return {int(m[1]): p for p in sorted(_folders(place)) if (m := _STEP.match(p.name))}


def _folders(place: Path) -> Iterable[Path]:
    return (p for p in place.iterdir() if p.is_dir()) if place.is_dir() else ()


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, ADAPTER))


def _single(root: Path, steps: Sequence[int] | None) -> list[Snapshot]:
    if not (root / ADAPTER).is_file():
        find_weights(root)
    state, named = root / _STATE, _STEP.match(root.name)
    step = int(read_json(state).get("global_step", 0)) if state.is_file() else int(named[1]) if named else None
    if steps is not None and step not in steps:
        raise CheckpointError(
            f"{root} is a single checkpoint{f' (step {step})' if step is not None else ''}, not a trajectory with "
            f"steps {_list(list(steps))}. Pass the run directory, or leave out --steps."
        )
    return [Snapshot(step, root)]


def _expected(root: Path, have: set[int]) -> set[int]:
    """Steps that are expected up to the last existing one."""
    last = max(have)
    rule = _rule(root) if (root / "trajectory").is_dir() else None
    doubling = {0, last} | {2**i for i in range(last.bit_length()) if 2**i <= last}
    if rule == "powers_of_two":
        return doubling
    if rule is not None and rule.isdecimal() and int(rule):
        return {*range(0, last + 1, int(rule)), last}
    if len(have - {0}) > 2 and have <= doubling:  # without a rule: expected from the first existing step on
        return {step for step in doubling if step >= min(have - {0})}
    ordered = sorted(have)
    spacings = [after - before for before, after in pairwise(ordered)]
    regular = min(spacings, default=0)
    if len(spacings) > 2 and sum(s == regular for s in spacings) * 2 > len(spacings):
        return {*range(ordered[0], ordered[-2] + 1, regular), last}
    return have


def _rule(root: Path) -> str | None:
    """The `trajectory` setting of the run's `config.yaml`."""
    value = _settings(root).get("trajectory")
    return None if value is None else str(value)


def _settings(root: Path) -> dict[str, Any]:
    """The run's `config.yaml`; empty without it."""
    config = root / "config.yaml"
    if not config.is_file():
        return {}
    try:
        settings: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{config} cannot be read as YAML ({error}). Copy the file again.") from error
    return settings if isinstance(settings, dict) else {}


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (", …" if len(steps) > 8 else "")
