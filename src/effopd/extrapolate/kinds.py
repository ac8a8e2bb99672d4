"""Type checks of settings against their dataclass annotations, with typed errors."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from effopd.errors import ConfigError

_KINDS: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a string"),
}


def hints(cls: type) -> dict[str, Any]:
    """Resolved annotation of every field of a dataclass, by name."""
    known = typing.get_type_hints(cls)
    return {field.name: known[field.name] for field in fields(cls)}


def check_kind(label: str, value: Any, hint: Any) -> None:
    """Check that a value has the annotated type: number, string, boolean or list of numbers.

    Other annotations are not checked.

    Args:
        label: name of the setting in the error message.

    Raises:
        ConfigError: the value has another type.
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
    """`isinstance`, except that a boolean is not a number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def without_numpy(value: Any) -> Any:
    """The value with Python's numbers in the place of NumPy's, which JSON cannot hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: without_numpy(each) for key, each in value.items()}
    return type(value)(map(without_numpy, value)) if type(value) in (list, tuple) else value


def mapping(label: str, value: Any) -> dict[str, Any]:
    """Dictionary from a mapping or a JSON object; empty for `None`.

    Raises:
        ConfigError: the value is neither a mapping nor a JSON object.
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
    """Instance of a settings dataclass from checked values; missing ones take their defaults.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    for name, hint in hints(cls).items():
        if name in values:
            check_kind(f"{label}: {name}", values[name], hint)
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{label}: {error}.") from error


def plain(settings: Any) -> dict[str, Any]:
    """Values of a settings dataclass as JSON types: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
