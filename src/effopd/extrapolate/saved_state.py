"""The look-ahead's state in a checkpoint folder: reading it, and whether it belongs to the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.common.distributed import ShardSpec, all_gather_object, rank
from effopd.common.files import write_atomically
from effopd.errors import CheckpointError
from effopd.extrapolate.anchor_files import ANCHOR_FILE, read_anchor, write_anchor
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


def write_state(folder: Path, state: dict[str, Any], sharded: Mapping[str, ShardSpec]) -> None:
    """Write `EffOPD.state_dict()`; the JSON file comes last, so its presence means "complete".

    Every rank calls this: sharded parameters are written by the rank that holds them, the rest by rank 0.

    Args:
        sharded: this rank's shares of the anchor.
    """
    from safetensors.torch import save_file

    observations = state.pop("observations")
    parts = write_anchor(folder, state.pop("anchor"), next(iter(sharded.values()), None))
    if sharded:
        all_gather_object(None)  # every part is there
    if rank() != 0:
        return
    seen = {name: tensor.detach().cpu().contiguous() for name, tensor in observations.pop("tensors").items()}
    state |= {"observations": observations, "anchor_parts": parts, "anchor_sharded": list(sharded)}
    if seen:
        write_atomically(folder / OBSERVATIONS_FILE, lambda path: save_file(seen, path))
    write_atomically(folder / STATE_FILE, lambda path: path.write_text(json.dumps(state, indent=1)))


def load_state(folder: Path, sharded: Mapping[str, ShardSpec]) -> dict[str, Any]:
    """Read what `write_state` wrote, for `EffOPD.load_state_dict`; of the anchor this rank's share.

    Raises:
        CheckpointError: the folder has no complete look-ahead state, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = read_state(folder)
    try:
        seen = folder / OBSERVATIONS_FILE
        state["observations"]["tensors"] = load_file(seen) if seen.is_file() else {}
        state["anchor"] = read_anchor(folder, state["anchor_parts"], state["anchor_sharded"], sharded)
    except (SafetensorError, FileNotFoundError, ValueError, KeyError) as error:
        raise damaged(folder, error) from error
    return state


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error of a state that is there and cannot be read."""
    return CheckpointError(
        f"the look-ahead state in {folder} is damaged ({error}): {STATE_FILE}, {ANCHOR_FILE} (or its parts) and "
        f"{OBSERVATIONS_FILE} should be as they were written. Resume from an earlier checkpoint."
    )
