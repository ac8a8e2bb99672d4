"""Check that the runs of a grid read the same content wherever their settings are the same.

Settings name teachers, students and files. If their content changes between two runs, the runs
cannot be compared. Runs record SHA-256 of what they read (`runs.inputs`, `teachers.json`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from effopd.compare.grid import PlannedRun
from effopd.errors import CheckpointError, ConfigError, WeightsError
from effopd.runs.checkpoints import TEACHERS_FILE
from effopd.runs.inputs import read_inputs
from effopd.tasks.config import TaskConfig

#: Settings besides those of the task on which training prompts depend.
_PROMPTS = ("rollouts", "traces", "curriculum")
#: Prefixes of settings on which the student's initial weights depend.
_WEIGHTS = ("model_", "dtype", "load_in_", "bnb_", "bf16", "fp16", "use_peft", "lora_")


def check_same_content(runs: Sequence[PlannedRun]) -> None:
    """Compare what finished runs have recorded; runs without a record are not compared.

    Raises:
        ConfigError: two runs with the same settings read another teacher, student or data.
    """
    seen: dict[tuple[str, str], tuple[str, PlannedRun]] = {}
    for run in runs:
        for what, settings, content in _contents(run):
            known, other = seen.setdefault((what, settings), (content, run))
            if known != content:
                raise ConfigError(
                    f"{run.path} and {other.path} cannot be compared: {what} changed between them, although their "
                    f"settings are the same (SHA-256 {content[:12]} and {known[:12]}). Restore it and repeat the runs "
                    "that read the other one, or use another output_dir: move their folders away. Nothing was changed."
                )


def check_unchanged_teachers(finished: Sequence[PlannedRun]) -> None:
    """Check that the teachers of finished runs are unchanged on disk, before more runs start.

    Raises:
        ConfigError: the weights in a teacher's folder have changed.
    """
    from effopd.models.fingerprint import weights_sha256

    known = {(each["name"], each["sha256"]): run for run in finished for each in _teachers(run) if each["sha256"]}
    for (name, content), run in known.items():
        if not (name and Path(name).is_dir()):
            continue
        try:
            now = weights_sha256(Path(name))
        except (CheckpointError, WeightsError):  # other files than safetensors
            continue
        if now != content:
            raise ConfigError(
                f"the teacher '{name}' has changed since {run.path} was run (SHA-256 {content[:12]} → {now[:12]}), so "
                "further runs could not be compared with it. Restore the teacher, or use another output_dir. Nothing "
                "was changed."
            )


def _contents(run: PlannedRun) -> Iterator[tuple[str, str, str]]:
    """(what, the settings that name it, SHA-256) of everything that a run has recorded."""
    for each in _teachers(run):
        if each["sha256"] and each["name"]:
            named = [each[key] for key in ("name", "revision", "dtype", "quantization")]
            yield f"the teacher '{each['name']}'", json.dumps(named), each["sha256"]
    inputs = read_inputs(run.path)
    if inputs is None:
        return
    of_task = {field.name for field in dataclasses.fields(TaskConfig)}
    if inputs.held_out is not None:
        yield "the held-out prompts", _chosen(run.settings, of_task), inputs.held_out.sha256
    if inputs.train is not None:
        yield "the training prompts", _chosen(run.settings, {*of_task, *_PROMPTS}), inputs.train.sha256
    if inputs.weights is not None:
        names = {name for name in run.settings if name.startswith(_WEIGHTS)}
        yield "the student's initial weights", _chosen(run.settings, names), inputs.weights


def _teachers(run: PlannedRun) -> list[dict[str, Any]]:
    path = run.path / TEACHERS_FILE
    return json.loads(path.read_text())["teachers"] if path.is_file() else []


def _chosen(settings: Mapping[str, Any], names: set[str]) -> str:
    return json.dumps({name: settings[name] for name in sorted(names & settings.keys())}, sort_keys=True, default=str)
