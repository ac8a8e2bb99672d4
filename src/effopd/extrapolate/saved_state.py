"""The look-ahead's state in a checkpoint folder: reading it, and whether it belongs to the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.errors import CheckpointError
from effopd.extrapolate.anchor_files import ANCHOR_FILE
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.settings_in_use import DECIDE_NOTHING, OF_BUILT_IN_SCORERS, OF_THE_STRATEGY
from effopd.extrapolate.strategies import STRATEGIES

STATE_FILE = "effopd_state.json"
OBSERVATIONS_FILE = "effopd_observations.safetensors"


def fingerprint(config: EffOPDConfig, scorer: Any, host: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What must be the same for a resumed run to take the same decisions, every default resolved.

    Args:
        config: the settings of the run.
        scorer: what it scores with.
        host: what the trainer decides where the settings leave it open: `score_rollouts`, `max_completion_length`.
    """
    settings, reads = config.in_use(), getattr(scorer, "reads", ())
    for name in (*DECIDE_NOTHING, *(name for name in OF_BUILT_IN_SCORERS if name not in reads)):
        settings.pop(name, None)
    settings |= {name: value for name, value in (host or {}).items() if name in settings and settings[name] is None}
    return {"config": settings, "validation_ids": getattr(scorer, "validation_ids", None)}


def check_same(
    saved: Mapping[str, Any], config: EffOPDConfig, scorer: Any, host: Mapping[str, Any] | None = None
) -> None:
    """Compare the fingerprint of a saved state with that of a run; see `fingerprint`.

    Raises:
        CheckpointError: the state belongs to other settings or another D_v.
    """
    saved, now = (json.loads(json.dumps(one)) for one in (saved, fingerprint(config, scorer, host)))
    there = {name: _resolved(name, saved["config"], host or {}) for name in now["config"]}
    differing = [name for name, value in now["config"].items() if there[name] != value]
    values = [f"{name} {there[name]} → {now['config'][name]}" for name in differing]
    if saved["validation_ids"] != now["validation_ids"]:
        differing.append("validation examples (D_v)")
    if differing:
        raise CheckpointError(
            f"the saved look-ahead state was made with other settings: {', '.join(differing)} differ"
            + (f" (saved → now: {', '.join(values)})" if values else "")
            + ". Resume with the settings of the run (its config.yaml), or start a new run."
        )


def _resolved(name: str, saved: Mapping[str, Any], host: Mapping[str, Any]) -> Any:
    """A saved setting with its default; earlier states kept `None` for one."""
    value = saved.get(name)
    if value is None and name in OF_THE_STRATEGY:
        strategy = STRATEGIES.get(saved.get("strategy", ""))
        return getattr(strategy, name, None)
    return host.get(name) if value is None else value


def read_state(folder: Path) -> dict[str, Any]:
    """The plain part of a saved state; its tensors are in files of their own.

    Raises:
        CheckpointError: the folder has no complete look-ahead state.
    """
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no complete look-ahead state ({STATE_FILE} expected): it was written "
            "without EffOPD, or the run was killed while saving. Resume from an earlier checkpoint."
        )
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        return state | {"fingerprint": state["fingerprint"]}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error of a state that is there and cannot be read."""
    return CheckpointError(
        f"the look-ahead state in {folder} is damaged ({error}): {STATE_FILE}, {ANCHOR_FILE} (or its parts) and "
        f"{OBSERVATIONS_FILE} should be as they were written. Resume from an earlier checkpoint."
    )
