"""The look-ahead's state in a checkpoint folder: reading it, and whether it belongs to the settings of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.errors import CheckpointError
from effopd.extrapolate.anchor_files import ANCHOR_FILE
from effopd.extrapolate.config import EffOPDConfig

STATE_FILE = "effopd_state.json"
OBSERVATIONS_FILE = "effopd_observations.safetensors"


def fingerprint(config: EffOPDConfig, scorer: Any) -> dict[str, Any]:
    """What must be the same for a resumed run to take the same decisions."""
    settings = dataclasses.asdict(config)
    for name in ("anchor_device", "score_timeout"):  # decide nothing
        settings.pop(name)
    settings |= {"gate": config.resolved_gate, "parameters": config.resolved_parameters}
    return {"config": settings, "validation_ids": getattr(scorer, "validation_ids", None)}


def check_same(saved: Mapping[str, Any], config: EffOPDConfig, scorer: Any) -> None:
    """Compare the fingerprint of a saved state with that of a run.

    Raises:
        CheckpointError: the state belongs to other settings or another D_v.
    """
    saved, now = (json.loads(json.dumps(one)) for one in (saved, fingerprint(config, scorer)))
    differing = [name for name, value in now["config"].items() if saved["config"].get(name) != value]
    if saved["validation_ids"] != now["validation_ids"]:
        differing.append("validation examples (D_v)")
    if differing:
        raise CheckpointError(
            f"the saved look-ahead state was made with other settings: {', '.join(differing)} differ. Resume with "
            "the settings of the run (its config.yaml), or start a new run."
        )


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
