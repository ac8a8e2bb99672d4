"""Values of settings by the annotation of their dataclass: numbers, texts, truth values, lists of
numbers.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from numbers import Integral, Real
from typing import Any

from effopd.errors import ConfigError

_KINDS: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a string"),
}


def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, as types."""
    known = typing.get_type_hints(cls)
    return {field.name: known[field.name] for field in fields(cls)}


def check_kind(label: str, value: Any, hint: Any) -> None:
    """A value is of the annotated kind; annotations other than the simple ones are not checked.

    Args:
        label: names the setting in the message.

    Raises:
        ConfigError: it is not.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in options
    if value is None and optional:
        return
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) in (tuple, list):
        if not isinstance(value, list | tuple) or not all(_is(each, Real) for each in value):
            raise ConfigError(f"{label} must be a list of numbers, got {value!r}.")
    elif kind in _KINDS and not _is(value, _KINDS[kind][0]):
        raise ConfigError(f"{label} must be {_KINDS[kind][1]}{' or unset' if optional else ''}, got {value!r}.")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; truth values are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def mapping(label: str, value: Any) -> dict[str, Any]:
    """A mapping, or JSON text of one, as a dictionary; `None`: empty.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(
                f"{label}: expected a JSON object such as '{{\"k\": 2}}', got {value!r} ({error})."
            ) from error
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{label}: expected a mapping such as {{'k': 2}}, got {value!r}.")
    return dict(value or {})


def build(label: str, cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of settings from some of their values, checked by annotation and by the
    dataclass.

    Raises:
        ConfigError: a value is of another kind or out of range.
    """
    for name, hint in hints(cls).items():
        if name in values:
            check_kind(f"{label}: {name}", values[name], hint)
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{label}: {error}.") from error


def plain(settings: Any) -> dict[str, Any]:
    """The values of such a dataclass as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
