"""Tidy tables on disk: one value per row, as Parquet and CSV.

    matrices     run, step, layer, module, matrix, metric, value
    subspaces    run, step, layer, module, matrix, reference, metric, k, value
    directions   run, step, layer, module, matrix, metric, value
    embeddings   run, step, layer, module, matrix, metric, point, value

`step` is missing for a single checkpoint without a known step, `layer` outside the layers. `value`
is a float64, missing if the quantity is undefined. Rows are written in pieces, so a whole table
never needs to fit in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from effopd.common.files import fsync
from effopd.errors import CheckpointError

MATRICES = ("run", "step", "layer", "module", "matrix", "metric", "value")
SUBSPACES = ("run", "step", "layer", "module", "matrix", "reference", "metric", "k", "value")
DIRECTIONS = MATRICES
EMBEDDINGS = ("run", "step", "layer", "module", "matrix", "metric", "point", "value")

#: Table name → columns, in order.
TABLES: dict[str, tuple[str, ...]] = {
    "matrices": MATRICES,
    "subspaces": SUBSPACES,
    "directions": DIRECTIONS,
    "embeddings": EMBEDDINGS,
}
_INTEGERS = ("step", "layer", "k", "point")
_TEXT = ("run", "module", "matrix", "metric", "reference")
#: Rows buffered per write.
_PIECE = 200_000


class TableWriter:
    """Context manager that writes one table in pieces to `STEM.parquet` and `STEM.csv`.

    Both files appear, complete, at the end of the block. An exception inside the block leaves
    earlier files unchanged.

    Example:
        >>> import tempfile
        >>> stem = Path(tempfile.mkdtemp()) / "matrices"
        >>> with TableWriter(stem, MATRICES) as table:
        ...     table.add([("opd", 8, 0, "mlp", "down", "spectral_norm", 0.5)])
        >>> read_table(stem).value.tolist()
        [0.5]
    """

    def __init__(self, stem: Path, columns: Sequence[str]):
        self._columns = list(columns)
        self._final = [_with_suffix(stem, ".parquet"), _with_suffix(stem, ".csv")]
        self._temporary = [path.with_name(f".{path.name}.tmp") for path in self._final]
        self._rows: list[Sequence[Any]] = []
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> TableWriter:
        self._stack = ExitStack()
        self._csv = self._stack.enter_context(self._temporary[1].open("w", encoding="utf-8", newline=""))
        self._csv.write(",".join(self._columns) + "\n")
        return self

    def add(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows, values in the order of the columns."""
        self._rows.extend(rows)
        if len(self._rows) >= _PIECE:
            self._flush()

    def __exit__(self, kind, error, trace) -> None:
        with self._stack:
            if kind is None:
                self._flush(last=True)
            if self._parquet is not None:
                self._parquet.close()
        if kind is None:
            for temporary, final in zip(self._temporary, self._final, strict=True):
                fsync(temporary)
                os.replace(temporary, final)
        else:
            for temporary in self._temporary:
                temporary.unlink(missing_ok=True)

    def _flush(self, last: bool = False) -> None:
        if not self._rows and not (last and self._parquet is None):
            return
        frame = _typed(pd.DataFrame(self._rows, columns=self._columns))
        self._rows = []
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._temporary[0], table.schema)
        self._parquet.write_table(table)
        frame.to_csv(self._csv, header=False, index=False, lineterminator="\n")


def write_table(rows: pd.DataFrame | Iterable[Sequence[Any]], stem: Path, columns: Sequence[str] = MATRICES) -> None:
    """Write a whole table to `STEM.parquet` and `STEM.csv`.

    Raises:
        KeyError: a data frame lacks one of `columns`.
    """
    values = rows[list(columns)].astype(object).values.tolist() if isinstance(rows, pd.DataFrame) else rows
    with TableWriter(Path(stem), columns) as table:
        table.add(values)


def read_table(stem: Path, filters: Sequence[tuple[str, str, Any]] | None = None) -> pd.DataFrame:
    """Read a table as a data frame; text columns are categories, to save memory.

    Args:
        filters: conditions that every row must satisfy, as in `pandas.read_parquet`, e.g.
            `[("reference", "==", "final")]`.

    Raises:
        CheckpointError: the file is missing or is not a table.
    """
    path = _with_suffix(Path(stem), ".parquet")
    try:
        table = pq.read_table(path, filters=list(filters) if filters else None, read_dictionary=list(_TEXT))
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(
            f"{path} cannot be read: expected a table written by `effopd analyze`, got {error}. "
            "Run the analysis again into the same folder; finished parts are not measured twice."
        ) from error
    return _typed(table.to_pandas(ignore_metadata=True), text="category")


def _typed(frame: pd.DataFrame, text: str = "str") -> pd.DataFrame:
    types = {name: "Int64" for name in frame.columns if name in _INTEGERS}
    types |= {name: text for name in frame.columns if name in _TEXT}
    return frame.astype({**types, "value": "float64"})


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
