"""Plain values as JSON, and calls between two processes that do not trust each other.

Only exact built-in types cross the boundary by value, so the other side compares with the
built-in `==`. Everything else stays where it is and crosses as a reference.
"""

from __future__ import annotations

import builtins
import datetime
import json
import struct
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

#: Integers below this are JSON numbers; larger ones are hexadecimal, which has no digit limit.
_SMALL = 1 << 62
#: Largest message, in bytes.
MAX_MESSAGE = 64 << 20

#: Tag → (type, value → JSON, JSON → value) of values that cross as text.
_TEXT: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda v: [v.real, v.imag], lambda v: complex(*v)),
    "range": (range, lambda v: [hex(v.start), hex(v.stop), hex(v.step)], lambda v: range(*(int(n, 16) for n in v))),
    "Decimal": (Decimal, str, Decimal),
    "Fraction": (
        Fraction,
        lambda v: [hex(n) for n in v.as_integer_ratio()],
        lambda v: Fraction(*(int(n, 16) for n in v)),
    ),
    "datetime": (datetime.datetime, lambda v: v.isoformat(), datetime.datetime.fromisoformat),
    "date": (datetime.date, lambda v: v.isoformat(), datetime.date.fromisoformat),
    "time": (datetime.time, lambda v: v.isoformat(), datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: datetime.timedelta(v[0], v[1], v[2]),
    ),
}
#: Containers, most specific first; a subclass (Counter, namedtuple) crosses as its built-in type.
_CONTAINERS: dict[str, Any] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque,
}  # fmt: skip
#: Containers that a callee can change in place.
MUTABLE = (list, dict, set, bytearray, deque)


class NotPlain(TypeError):
    """A value that has no plain form."""


def encode(value: Any, export: Callable[[Any], list] | None = None) -> Any:
    """JSON-ready form of a value; `export` gives the form of values that are not plain.

    Raises:
        NotPlain: the value is not plain and there is no `export`.
    """
    if value is None or isinstance(value, bool | float):
        return float(value) if isinstance(value, float) else value
    if isinstance(value, int):
        return int(value) if -_SMALL < value < _SMALL else ["int", hex(int(value))]
    if isinstance(value, str):
        return str.__getitem__(value, slice(None))
    if isinstance(value, dict):
        pairs = [[encode(key, export), encode(item, export)] for key, item in dict.items(value)]
        return ["dict", pairs]
    for tag, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return [tag, [encode(item, export) for item in kind.__iter__(value)]]
    for tag, (kind, write, _) in _TEXT.items():
        if type(value) is kind:
            return [tag, write(value)]
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), export)
    if export is None:
        raise NotPlain(f"{type(value).__name__} is not a plain value")
    return export(value)


def decode(data: Any, resolve: Callable[[str, Any], Any] | None = None) -> Any:
    """Value of a JSON-ready form; `resolve(tag, payload)` gives the values of references.

    Raises:
        NotPlain: the form is malformed, or is a reference and there is no `resolve`.
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise NotPlain("a bare JSON object is no value")
        return data
    try:
        tag, payload = data
        if tag == "int":
            return int(payload, 16)
        if tag == "dict":
            return {decode(key, resolve): decode(item, resolve) for key, item in payload}
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](decode(item, resolve) for item in payload)
        if tag in _TEXT:
            return _TEXT[tag][2](payload)
    except NotPlain:
        raise
    except Exception as error:
        raise NotPlain(f"malformed value: {type(error).__name__}") from error
    if resolve is None:
        raise NotPlain(f"a reference ({tag}) is not a plain value")
    return resolve(tag, payload)


def error_of(error: BaseException) -> dict[str, Any]:
    """Names of an exception's classes and its message, as sent to the caller."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        text = str(error)[:500]
    except BaseException:  # `__str__` of the program's own class
        text = ""
    return {"name": type(error).__name__, "builtin": names, "text": text}


def raised(data: Any) -> Exception:
    """Built-in exception for a sent one; never one that is not an `Exception`."""
    text = f"{data.get('text')}"
    for name in data.get("builtin") or ():
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and the like need more arguments
                continue
    return RuntimeError(f"{data.get('name')}: {text}")


class Channel:
    """Messages over a stream socket or a pair of pipes: 4 bytes of length, then JSON."""

    def __init__(self, read: Callable[[int], bytes], write: Callable[[bytes], Any]) -> None:
        self._read, self._write = read, write

    def send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        data = struct.pack(">I", len(body)) + body
        while data:
            data = data[self._write(data) :]

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other side is gone or sent too long a message.
        """
        (length,) = struct.unpack(">I", self._exactly(4))
        if length > MAX_MESSAGE:
            raise EOFError
        return json.loads(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._read(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
