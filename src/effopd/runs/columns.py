"""Dataclasses ↔ JSON rows. A field says what it is under which key, so that documentation can be
generated from it.

    class Costs(Record, prefix="cost/"):
        net_seconds: Annotated[float | None, Column("all seconds but those of evaluation", "s")] =
        None

`None` means "not measured": the key is left out of the row. Keys that a record does not have are
ignored, unless it has a field `extra`, which holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints


@dataclass(frozen=True)
class Column:
    """What a field of a record is.

    Attributes:
        text: its meaning.
        unit: of the number, if it has one.
        key: in the row; default: the record's prefix and the field's name.
        null: `None` is written as null instead of being left out.
    """

    text: str
    unit: str = ""
    key: str = ""
    null: bool = False


@dataclass(frozen=True)
class Group:
    """A field that is a record itself, whose keys stand in the same row."""

    record: type[Record]


class Record:
    """Base of the frozen dataclasses that are rows of a file, or groups of columns in one.

    Args:
        prefix: before the name of every field, in its key.
    """

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "", **options: Any):
        super().__init_subclass__(**options)
        cls.prefix = prefix

    def to_row(self) -> dict[str, Any]:
        """JSON-ready, in the order of the fields; groups are spread out, what is `None` is left
        out, `extra` comes last.
        """
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
        """The inverse of `to_row`; a key that is missing leaves the field's default."""
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
    """The fields that are columns or groups of them, by name."""
    if record not in _FIELDS:
        hints = get_type_hints(record, include_extras=True)
        kinds = ((name, kind) for name, hint in hints.items() for kind in getattr(hint, "__metadata__", ()))
        _FIELDS[record] = tuple((name, kind) for name, kind in kinds if isinstance(kind, Column | Group))
    return _FIELDS[record]


def columns_of(record: type[Record]) -> Iterator[tuple[str, Column]]:
    """Every column with its key in the row, groups spread out."""
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
