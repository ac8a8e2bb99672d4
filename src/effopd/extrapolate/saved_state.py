"""The look-ahead's state in a checkpoint folder: write, load, and compare its settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.common.distributed import ShardSpec, all_gather_object, rank
from effopd.common.files import write_atomically
from effopd.errors import CheckpointError
from effopd.extrapolate.anchor_files import ANCHOR_FILE, read_anchor, write_anchor
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.scorers.base import OF_SCORERS

STATE_FILE = "effopd_state.json"
OBSERVATIONS_FILE = "effopd_observations.safetensors"


#: Settings that do not change decisions: a resumed run can change them.
DECIDES_NOTHING = ("anchor_device",)


def fingerprint(config: EffOPDConfig, scorer: Any, host: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings and validation prompts that a resumed run must share to make the same decisions.

    Args:
        config: settings of the look-ahead.
        scorer: scorer of the run.
        host: values of settings that the trainer decides: `score_rollouts` and
            `max_completion_length`.
    """
    settings = dataclasses.asdict(config)
    settings |= {f"args.{name}": value for name, value in settings.pop("args").items()}
    unread = OF_SCORERS - set(getattr(scorer, "reads", ()))
    for name in (*DECIDES_NOTHING, *unread, *(f"args.{name}" for name in unread)):
        settings.pop(name, None)
    host, limit = host or {}, "args.max_completion_length"
    if (settings.get("score_rollouts") or 1) < 1:  # a share of the step's rollouts
        settings["score_rollouts"] = host.get("score_rollouts", settings["score_rollouts"])
    if limit in settings and settings[limit] is None:
        settings[limit] = host.get("max_completion_length")
    return {"config": settings, "validation_ids": getattr(scorer, "validation_ids", None)}


def check_same(
    saved: Mapping[str, Any], config: EffOPDConfig, scorer: Any, host: Mapping[str, Any] | None = None
) -> None:
    """Check that a saved fingerprint equals that of the run; see `fingerprint`.

    Raises:
        CheckpointError: settings or validation prompts differ.
    """
    saved, now = (json.loads(json.dumps(one)) for one in (saved, fingerprint(config, scorer, host)))
    before, after = saved["config"], now["config"]
    differing = [name for name in after | before if before.get(name) != after.get(name)]
    values = [f"{name} {before.get(name)} → {after.get(name)}" for name in differing]
    if saved["validation_ids"] != now["validation_ids"]:
        differing.append("validation prompts")
    if differing:
        raise CheckpointError(
            f"the saved look-ahead state was made with other settings: {', '.join(differing)} differ"
            + (f" (saved → now: {', '.join(values)})" if values else "")
            + ". Resume with the settings of the run (its config.yaml), or start a new run."
        )


def read_state(folder: Path) -> dict[str, Any]:
    """JSON part of a saved state, without tensors.

    Raises:
        CheckpointError: the folder has no complete look-ahead state, or the file is damaged.
    """
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no complete look-ahead state ({STATE_FILE} is missing): it was written without EffOPD, or "
            "the run was killed while saving. Resume from an earlier checkpoint."
        )
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        return state | {"fingerprint": state["fingerprint"]}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error


def write_state(folder: Path, state: dict[str, Any], sharded: Mapping[str, ShardSpec]) -> None:
    """Write `EffOPD.state_dict()`. The JSON file is written last and marks the state as complete.

    Call it on all ranks: each rank writes its shards, and rank 0 writes the rest.

    Args:
        folder: checkpoint folder.
        state: state to write; its entries are consumed.
        sharded: this rank's shards of the anchor, by parameter name.
    """
    from safetensors.torch import save_file

    observations = state.pop("observations")
    parts = write_anchor(folder, state.pop("anchor"), next(iter(sharded.values()), None))
    if sharded:
        all_gather_object(None)  # wait until all parts are written
    if rank() != 0:
        return
    state |= {"observations": observations, "anchor_parts": parts, "anchor_sharded": list(sharded)}
    if observations is not None and (tensors := observations.pop("tensors")):
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(folder / OBSERVATIONS_FILE, lambda path: save_file(on_cpu, path))
    write_atomically(folder / STATE_FILE, lambda path: path.write_text(json.dumps(state, indent=1)))


def load_state(folder: Path, sharded: Mapping[str, ShardSpec]) -> dict[str, Any]:
    """State for `EffOPD.load_state_dict`, with this rank's part of the anchor.

    Raises:
        CheckpointError: the folder has no complete look-ahead state, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = read_state(folder)
    try:
        if state["observations"] is not None:
            file = folder / OBSERVATIONS_FILE
            state["observations"]["tensors"] = load_file(file) if file.is_file() else {}
        state["anchor"] = read_anchor(folder, state["anchor_parts"], state["anchor_sharded"], sharded)
    except (SafetensorError, FileNotFoundError, ValueError, KeyError) as error:
        raise damaged(folder, error) from error
    return state


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """Error for a state that exists but cannot be read."""
    return CheckpointError(
        f"the look-ahead state in {folder} is damaged ({error}). It consists of {STATE_FILE}, {ANCHOR_FILE} (or its "
        f"parts) and {OBSERVATIONS_FILE}. Resume from an earlier checkpoint."
    )
