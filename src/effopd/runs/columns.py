"""Conversion between dataclasses and JSON rows, with the documentation of every field.

    class Costs(Record, prefix="cost/"):
        net_seconds: Annotated[float | None, Column("all seconds except evaluation", "s")] = None

The tables of the documentation are generated from the columns. A value of `None` means "not
measured", and its key is left out of the row. Unknown keys are ignored, unless the record has a
field `extra`, which collects them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints


@dataclass(frozen=True)
class Column:
    """Description of a record's field.

    Attributes:
        text: meaning of the field.
        unit: unit of the number, if any.
        key: key in the row; default: the record's prefix followed by the field's name.
        null: write `None` as null instead of leaving it out.
    """

    text: str
    unit: str = ""
    key: str = ""
    null: bool = False


@dataclass(frozen=True)
class Group:
    """A field that is itself a record, with its keys in the same row."""

    record: type[Record]


class Record:
    """Base class of frozen dataclasses that describe a row of a file or a group of its columns.

    Args:
        prefix: prefix of all keys.
    """

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "", **options: Any):
        super().__init_subclass__(**options)
        cls.prefix = prefix

    def to_row(self) -> dict[str, Any]:
        """JSON-ready row in field order: groups flattened, `None` left out, `extra` last."""
        row: dict[str, Any] = {}
        for name, kind in fields_of(type(self)):
            value = getattr(self, name)
            if isinstance(kind, Group):
                row |= value.to_row()
            elif value is not None or kind.null:
                row[_key(type(self), name, kind)] = value
        return row | dict(getattr(self, "extra", ()))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Inverse of `to_row`; a missing key leaves the field's default."""
        values: dict[str, Any] = {}
        for name, kind in fields_of(cls):
            if isinstance(kind, Group):
                values[name] = kind.record.from_row(row)
            elif (key := _key(cls, name, kind)) in row:
                values[name] = row[key]
        if "extra" in cls.__annotations__:
            known = set(keys_of(cls))
            values["extra"] = {key: value for key, value in row.items() if key not in known}
        return cls(**values)


_FIELDS: dict[type[Record], tuple[tuple[str, Column | Group], ...]] = {}


def fields_of(record: type[Record]) -> tuple[tuple[str, Column | Group], ...]:
    """Names and descriptions of the fields that are columns or groups."""
    if record not in _FIELDS:
        hints = get_type_hints(record, include_extras=True)
        kinds = ((name, kind) for name, hint in hints.items() for kind in getattr(hint, "__metadata__", ()))
        _FIELDS[record] = tuple((name, kind) for name, kind in kinds if isinstance(kind, Column | Group))
    return _FIELDS[record]


def columns_of(record: type[Record]) -> Iterator[tuple[str, Column]]:
    """Every column with its key in the row, groups flattened."""
    for name, kind in fields_of(record):
        if isinstance(kind, Group):
            yield from columns_of(kind.record)
        else:
            yield _key(record, name, kind), kind


def _key(record: type[Record], name: str, column: Column) -> str:
    return column.key or record.prefix + name


def keys_of(record: type[Record]) -> Iterator[str]:
    """The keys of a row."""
    return (key for key, _ in columns_of(record))
