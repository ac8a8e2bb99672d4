"""Progress file of an analysis, OUT/progress.jsonl, for resuming it.

The first line holds the settings: the options and the compared files with their sizes and times.
Every further line holds the finished measurements of one matrix or vector. A killed analysis
resumes after the last complete line; different settings are refused. Numbers round-trip exactly.
Every line is strict JSON: NaN is null, an infinity is {"float": "inf"}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effopd.common.files import append_row, check_writable
from effopd.errors import CheckpointError, ConfigError

FILE = "progress.jsonl"
#: Files of a checkpoint whose size and time identify its weights.
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


def file_marks(folder: Path) -> dict[str, list[int]]:
    """File name → [bytes, modification time in ns] of a checkpoint's weight and config files."""
    paths = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


class Progress:
    """Finished parts on disk, in the order of measurement.

    Args:
        out: the output folder. Nothing is written before `start`.
        settings: JSON-ready. An analysis is resumed only with equal settings.

    Raises:
        ConfigError: `out` cannot be written, holds other files, or holds an analysis with other
            settings (the message names them).
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.path = out / FILE
        self._settings = json.loads(json.dumps(settings))
        check_writable(out, "the output folder")
        header = self._header()
        if header is None:
            others = sorted(path.name for path in out.iterdir() if path.name != FILE) if out.is_dir() else []
            if others:
                raise ConfigError(
                    f"the output folder {out} holds other files ({', '.join(others[:3])}"
                    f"{', …' if len(others) > 3 else ''}): expected a new or empty folder, or an earlier analysis. "
                    "Choose another folder (nothing was changed)."
                )
        elif header != self._settings:
            raise ConfigError(
                f"{out} holds an analysis with other settings: {'; '.join(_differences(header, self._settings))}. "
                "Use the earlier settings to resume it, or choose another output folder (nothing was changed)."
            )

    def start(self) -> set[str]:
        """Create the folder and its first line if missing, and drop a line cut short by a kill.

        Returns:
            names of the finished parts.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._header() is None:
            self.path.unlink(missing_ok=True)
            append_row(self.path, {"settings": self._settings})
        with self.path.open("rb+") as file:
            end = 0
            for line in file:
                if line.endswith(b"\n"):
                    end += len(line)
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        return {record["part"] for record in self.records()}

    def add(self, record: dict[str, Any]) -> None:
        """Append the measurements of one part (key `part` names it)."""
        append_row(self.path, _encode(record))

    def records(self) -> Iterator[dict[str, Any]]:
        """The finished parts, one at a time.

        Raises:
            CheckpointError: a line in the middle of the file is damaged.
        """
        with self.path.open(encoding="utf-8") as file:
            next(file, None)
            for number, line in enumerate(file, start=2):
                if line.endswith("\n"):
                    yield _decode(self._parse(line, number))

    def _header(self) -> dict[str, Any] | None:
        """Settings of the analysis in the folder; `None` if missing or cut short."""
        if not self.path.exists():
            return None
        with self.path.open(encoding="utf-8") as file:
            line = file.readline()
        return self._parse(line, 1).get("settings", {}) if line.endswith("\n") else None

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{self.path}, line {number}, is damaged: expected one JSON object ({error}). Delete the folder or "
                "choose another one, then run the analysis again."
            ) from error


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    """One clause per differing setting; a difference in files is summarized per checkpoint."""
    if isinstance(then, dict) and isinstance(now, dict):
        if name.endswith("files"):
            return [f"{name.removesuffix('files')}weights changed on disk"] if then != now else []
        keys = [*then, *(key for key in now if key not in then)]
        return [text for key in keys for text in _differences(then.get(key), now.get(key), f"{name} {key}".strip())]
    if then == now:
        return []
    if now is None:
        return [f"{name} was removed"]
    if then is None:
        return [f"{name} was added"]
    if isinstance(then, list) and isinstance(now, list) and then and isinstance(then[0], dict):
        if len(then) != len(now):
            return [f"{name}: {len(then)} before, {len(now)} now"]
        pairs = zip(then, now, strict=True)
        return [t for i, (a, b) in enumerate(pairs) for t in _differences(a, b, f"{name}[{i}]")]
    return [f"{name} was {json.dumps(then)}, now {json.dumps(now)}"]


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else {"float": str(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
