"""Rows of a local JSON or Parquet file, or of a Hub dataset through `datasets.load_dataset`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.reference import MAX_DIGITS, single_precision
from effopd.tasks.row_columns import COLUMN_ARGS
from effopd.tasks.row_faults import BadRow

FILE_TYPES = (".jsonl", ".json", ".parquet")
#: Column types with fewer digits than Python prints.
_SHORT_FLOATS = ("float", "float32", "halffloat", "float16")


def on_hub(source: str) -> bool:
    """Whether a source is read with `datasets.load_dataset` instead of as a local file."""
    path = Path(source).expanduser()
    return path.suffix.lower() not in FILE_TYPES and not path.is_file()


def read_rows(source: str, args: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Rows with their 1-based number in the file (the line number for JSON Lines)."""
    if on_hub(source):
        return _hub_rows(source, args)
    if args:
        names = sorted(args)
        close = [match for name in names for match in difflib.get_close_matches(name, COLUMN_ARGS, n=1, cutoff=0.7)]
        fix = f"Did you mean {' and '.join(close)}?" if close else "Remove the others; they are for Hub datasets."
        raise TaskError(
            f"task_args of the local file '{source}': expected only {' and '.join(COLUMN_ARGS)}, got "
            f"{', '.join(map(repr, names))}. {fix}"
        )
    path = local_file(source)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_file,
        ".parquet": _parquet_rows,
    }
    return readers[path.suffix.lower()](path)


def local_file(source: str) -> Path:
    """Path of a source that is not on the Hub.

    Raises:
        TaskError: there is no such file, or its type is not one of `FILE_TYPES`.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise TaskError(f"no such file: '{source}' (looked in '{Path.cwd()}'). Check the path, or write a Hub id.")
    if path.suffix.lower() not in FILE_TYPES:
        raise TaskError(
            f"'{source}': expected a file ending in {', '.join(FILE_TYPES)}, got '{path.suffix}'. Convert it, e.g. "
            "with datasets.Dataset.to_json."
        )
    return path


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text, parse_int=_whole_number)
            except UnicodeDecodeError as error:
                yield number, BadRow("UTF-8 text", f"other bytes ({error.reason})", "Save the file as UTF-8.")
            except (json.JSONDecodeError, RecursionError) as error:
                shown = text.strip()[:60]
                yield number, BadRow("one JSON object per line", f"{shown!r} ({error})", "Correct the line.")


def _whole_number(digits: str) -> int | str:
    """Whole number in JSON; stays text if it has more digits than Python reads."""
    return int(digits) if len(digits) <= MAX_DIGITS else digits


def _json_file(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        is_array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        _refuse_nested(path)
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_whole_number)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TaskError(
            f"'{path}': expected a JSON array of objects, got invalid JSON ({error}). Correct the file."
        ) from error
    yield from enumerate(rows, start=1)


def _refuse_nested(path: Path) -> None:
    """Raise if the file is one object with the rows in a field, such as {"data": […]}."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline()
        indented = not first.rstrip().endswith("}")
        whole = json.loads(path.read_text(encoding="utf-8-sig") if indented else first, parse_int=_whole_number)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return  # reported line by line
    fields = whole if isinstance(whole, dict) else {}
    rows = [name for name, value in fields.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if rows and (indented or len(fields) == 1):  # else it can be a row
        raise TaskError(
            f"'{path}': expected a JSON array of objects or one object per line, got one object with the rows in "
            f"{', '.join(map(repr, rows))}. Save that list itself, json.load(file)[{rows[0]!r}], as JSON."
        )


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            short = [field.name for field in file.schema_arrow if str(field.type) in _SHORT_FLOATS]
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row | {name: single_precision(row[name]) for name in short}
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(
            f"'{path}': expected a Parquet file, got a file that cannot be read ({error}). Write it again."
        ) from error


def _hub_rows(source: str, args: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    args = {"split": "train", **args}
    try:
        dataset = load_dataset(source, **args)
    except Exception as error:  # the Hub client and dataset builders can raise anything
        raise TaskError(
            f"could not load the dataset '{source}' with {args}: {type(error).__name__}: {error}. Expected a Hub "
            f"dataset id or a local {', '.join(FILE_TYPES)} file. Check the name, task_args (e.g. 'name', 'split'), "
            "the network and your access to the dataset."
        ) from error
    if isinstance(dataset, dict | list):
        parts = f" ({', '.join(map(str, dataset))})" if isinstance(dataset, dict) else ""
        raise TaskError(
            f"the dataset '{source}' with {args}: expected one split, got {len(dataset)}{parts}. Name one in "
            'task_args, such as \'{"split": "train"}\', or join them: \'{"split": "train+test"}\'.'
        )
    features = getattr(dataset, "features", None) or {}
    short = [name for name, feature in features.items() if getattr(feature, "dtype", "") in _SHORT_FLOATS]
    for number, row in enumerate(dataset, start=1):
        yield number, row | {name: single_precision(row[name]) for name in short}
