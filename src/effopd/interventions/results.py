"""Results of interventions in a folder: settings, one row per finished point, and a table.

    config.yaml      the settings, with versions as comments; other settings are refused
    results.jsonl    one row per finished point, with the accuracy of every prompt
    results.parquet, results.csv    the table, for reading and plotting

Several interventions can share a folder if all other settings agree. Their models are then compared
on the same prompts, and a model that two interventions share is measured once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from effopd.common.files import append_row, read_rows, write_atomically
from effopd.common.statistics import Interval, bonett_price
from effopd.errors import CheckpointError, ConfigError
from effopd.interventions.points import BASE, Point

CONFIG, ROWS, TABLE = "config.yaml", "results.jsonl", "results"
#: Key of `config.yaml`: the options of each intervention in the folder.
INTERVENTIONS = "interventions"
#: Keys of `config.yaml`: checkpoint folder → sizes and times of its files. Old folders have none.
MARKS = ("files", "teacher_files")


class InterventionResults:
    """The finished points of a folder. Nothing is written before `begin`.

    Args:
        settings: all settings that determine a result, JSON-ready; `settings["interventions"]` maps
            each intervention to its options.

    Raises:
        ConfigError: the folder holds results with other settings, and the message names the first
            difference; or it holds other files.
        CheckpointError: the folder holds results without settings.
    """

    def __init__(self, root: str | Path, settings: Mapping[str, Any]):
        self.root = Path(root)
        self._settings = merged_settings(self.root, settings)
        _check_own(self.root)
        self.rows: dict[str, dict[str, Any]] = {row["id"]: row for row in read_rows(self.root / ROWS)}
        self._models = {row["model"]: row for row in self.rows.values() if _is_graded(row)}

    def begin(self, comments: Sequence[str] = ()) -> None:
        """Create the folder, write the settings, and drop a last row cut short by a kill."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_settings(self.root, self._settings, comments)
        if (self.root / ROWS).exists():
            text = "".join(json.dumps(row) + "\n" for row in self.rows.values())
            write_atomically(self.root / ROWS, lambda temporary: temporary.write_text(text))

    def __contains__(self, point_id: str) -> bool:
        return point_id in self.rows

    def of_model(self, model: str) -> dict[str, Any] | None:
        """Row of a graded point of this model (`Point.same_model`), if there is one."""
        return self._models.get(model)

    def add(self, point: Point, step: int | None, norm: float, measured: Mapping[str, Any]) -> None:
        """Append a finished point to the file immediately. A norm of 0 makes its model the base."""
        model = point.same_model if norm else BASE
        row = {
            "id": point.id,
            "intervention": point.intervention,
            "run": point.run,
            "step": step,
            "model": model,
            "coordinates": dict(point.coordinates),
            "measures": dict(point.measures),
            "update_norm": norm,
            "measured": dict(measured),
        }
        append_row(self.root / ROWS, row)
        self.rows[point.id] = row
        if _is_graded(row):
            self._models.setdefault(model, row)

    def coordinates(self, intervention: str) -> list[str]:
        """Names of the coordinates of the intervention's points."""
        rows = [row for row in self.rows.values() if row["intervention"] == intervention]
        return list(dict.fromkeys(key for row in rows for key in row["coordinates"]))

    def table(self) -> pd.DataFrame:
        """Tidy table: one row per point, one column per coordinate and measurement.

        `accuracy_change` is relative to the base, `change_from_trained` to the run's trained model;
        both are paired over prompts.
        """
        base = self.rows.get("reference/base")
        flat = [_flat(row, base, self.rows.get(f"reference/{row['run']}")) for row in self.rows.values()]
        coordinates = list(dict.fromkeys(key for row in self.rows.values() for key in row["coordinates"]))
        measures = list(dict.fromkeys(key for row in self.rows.values() for key in row["measures"]))
        coordinates = [key for key in coordinates if key != "step"]
        rest = list(dict.fromkeys(key for row in flat for key in row if key not in coordinates + measures))
        frame = pd.DataFrame(flat, columns=[*rest[:5], *coordinates, *rest[5:], *measures])
        return frame.convert_dtypes(convert_floating=False)

    def write_table(self) -> pd.DataFrame:
        """Write `table()` as Parquet and CSV, and return it."""
        frame = self.table()
        write_atomically(self.root / f"{TABLE}.parquet", lambda path: frame.to_parquet(path, index=False))
        write_atomically(self.root / f"{TABLE}.csv", lambda path: frame.to_csv(path, index=False))
        return frame


def _is_graded(row: Mapping[str, Any]) -> bool:
    return "accuracies" in row["measured"]


def _flat(row: Mapping[str, Any], base: Mapping[str, Any] | None, trained: Mapping[str, Any] | None) -> dict[str, Any]:
    measured = {key: value for key, value in row["measured"].items() if key != "accuracies"}
    flat = {
        "intervention": row["intervention"],
        "run": row["run"],
        "group": row["run"].partition("#")[0],
        "point": row["id"],
        "step": row["step"],
        **row["coordinates"],
        "update_norm": row["update_norm"],
        **measured,
        **row["measures"],
    }
    for name, reference in (("accuracy_change", base), ("change_from_trained", trained)):
        if not _is_graded(row) or reference is None:
            change = Interval(math.nan, math.nan, math.nan, 0)
        elif reference["model"] == row["model"]:
            change = Interval(0.0, 0.0, 0.0, 0)
        else:
            change = bonett_price(row["measured"]["accuracies"], reference["measured"]["accuracies"])
        flat |= {name: change.mean, f"{name}_low": change.low, f"{name}_high": change.high}
    return flat


def _check_own(root: Path) -> None:
    """Refuse a folder of other files, whose report would be replaced. Hidden files do not count."""
    if (root / CONFIG).exists() or not root.is_dir():
        return
    others = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    if others:
        raise ConfigError(
            f"{root} holds other files ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}): expected a new or "
            "empty folder, or earlier results of `effopd intervene`. Choose another folder (nothing was changed)."
        )


# -- settings --------------------------------------------------------------------------------------


def merged_settings(root: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, extended by the other interventions in `root`. Nothing is written.

    Raises:
        ConfigError: a setting differs from the one in `root`, or weights have changed on disk.
        CheckpointError: `root` holds results without settings.
    """
    path = root / CONFIG
    if not path.exists():
        if (root / ROWS).exists():
            raise CheckpointError(
                f"{root} holds {ROWS} but no {CONFIG}: expected both, or neither. Choose another folder."
            )
        return dict(settings)
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(old, dict) or not isinstance(old.get(INTERVENTIONS), dict):
        raise ConfigError(
            f"{path} was not written by `effopd intervene`. Choose another folder (nothing was changed)."
        )
    before, now = old[INTERVENTIONS], settings[INTERVENTIONS]
    shared = before.keys() & now.keys()
    apart = (INTERVENTIONS, *MARKS)
    for name, was, wanted in (
        *_differences("", _without(old, *apart), _without(settings, *apart)),
        *_differences("", {key: before[key] for key in shared}, {key: now[key] for key in shared}),
    ):
        raise ConfigError(
            f"{root} holds results with {name} = {was!r}, this run has {wanted!r}: expected equal settings, so that "
            "all points are comparable. Choose another folder, or use the old setting (nothing was changed)."
        )
    for name in MARKS:
        marks, then = settings.get(name, {}), old.get(name) or {}
        if changed := [path for path in marks if path in then and then[path] != marks[path]]:
            raise ConfigError(
                f"{root} holds results of other weights: the files in {changed[0]} have changed since. Expected "
                "unchanged checkpoints, so that points are comparable. Choose another folder (nothing was changed)."
            )
    return {**settings, INTERVENTIONS: {**before, **now}}


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


def write_settings(root: Path, settings: Mapping[str, Any], comments: Sequence[str] = ()) -> None:
    """Write `config.yaml`, with `comments` (versions) at the top."""
    text = "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(
        dict(settings), sort_keys=False, allow_unicode=True
    )
    write_atomically(root / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _differences(prefix: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf that differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix, old, new)]
    names = list(dict.fromkeys([*old, *new]))
    nested = (_differences(f"{prefix}.{name}".strip("."), old.get(name), new.get(name)) for name in names)
    return [difference for part in nested for difference in part]
