"""Atomic replacement of files, and JSON-lines files that survive a kill."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from effopd.errors import ConfigError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that `path` holds either its old or its complete new content.

    Args:
        write: writes the content to the temporary path it is given, in the folder of `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def check_writable(folder: Path, setting: str) -> None:
    """Check that files can be written into a folder, which need not exist. Nothing is written.

    Args:
        setting: name of the setting, for messages.

    Raises:
        ConfigError: the folder, or its nearest existing parent, is a file or is write-protected.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{setting}: {existing} is a file: expected a folder. Choose another path.")
    if not takes_files(existing):
        raise ConfigError(f"{setting}: {existing} is write-protected. Choose another path.")


def takes_files(folder: Path) -> bool:
    """Whether files can be written into an existing folder.

    Nothing is written, except on file systems without a size: in /proc, permissions allow all to
    root, but no file can be made.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    if shutil.disk_usage(folder).total:
        return True
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line with a single write."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete JSON lines of a file, without a last line cut short by a kill.

    A missing file yields nothing.

    Raises:
        ConfigError: another line is no JSON object.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no text
            raise _broken(path, number, str(error)) from error
        if not isinstance(row, dict):
            raise _broken(path, number, f"a {type(row).__name__}")
        yield row


def _broken(path: Path, number: int, got: str) -> ConfigError:
    return ConfigError(
        f"{path}, line {number}: expected a JSON object, got {got}. Copy the file again, or delete this line."
    )


def keep_rows(path: Path, last_step: int) -> None:
    """Drop rows after `last_step`, and a truncated last line, before a run resumes.

    Otherwise the resumed run would log these steps twice.
    """
    if path.exists():
        text = "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= last_step)
        if text.encode() != path.read_bytes():
            write_atomically(path, lambda temporary: temporary.write_text(text))


def move_aside(path: Path) -> Path | None:
    """Rename a non-empty file to `NAME-N.SUFFIX`, with the first free N.

    Returns:
        The new path; `None`: there is no file, or it is empty.
    """
    if not path.is_file() or not path.stat().st_size:
        return None
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    aside = next(each for each in numbered if not each.exists())
    path.rename(aside)
    return aside
