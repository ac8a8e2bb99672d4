"""Calls between the process of the tests and the process of the program.

The process of the tests holds `Proxy` objects for the program's functions and objects. Arguments
that are not plain, such as lambdas, stay with the tests. The program can call and iterate over
them. It can read attributes only of instances of the tests' own classes and of files in memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from effopd.tasks.code.guest.values import MUTABLE, Channel, NotPlain, decode, encode, error_of, raised

#: Modules whose instances the program can read and change. A frame, a generator or a partial
#: function would lead to all of the tests.
_OPEN_MODULES = ("tests", "_io", "random")
#: Special attributes that the tests read; others, such as `__array_interface__`, are protocols by
#: which the program could name the tests' own memory.
_SPECIAL = ("__name__", "__qualname__", "__annotations__")
#: Methods that a proxy forwards. Operators that decide an assertion, such as `==` and `<`, are not
#: among them: the program's own versions could always agree.
_STRUCTURAL = ("__iter__", "__next__", "__len__", "__getitem__", "__setitem__", "__enter__", "__exit__")


class Peer:
    """One end of the conversation.

    Args:
        channel: messages to and from the other process.
        open_namespace: names that the other side can look up; `None`: it can only use what it was
            given, and no private attribute.
    """

    def __init__(self, channel: Channel, open_namespace: dict[str, Any] | None = None) -> None:
        self._channel = channel
        self._namespace = open_namespace
        self._exports: dict[int, Any] = {}
        self._ids: dict[int, int] = {}

    def serve(self) -> None:
        """Answer requests until the other side is gone."""
        try:
            while True:
                self._answer(self._channel.receive())
        except (EOFError, OSError):
            return

    def request(self, operation: str, *operands: Any) -> Any:
        """Result of a request; requests of the other side are answered meanwhile.

        Raises:
            EOFError: the other process is gone.
            Exception: the other side raised it; see `raised`.
        """
        self._channel.send({"do": operation, "with": list(operands)})
        while True:
            message = self._channel.receive()
            if not isinstance(message, dict):
                raise EOFError
            if "do" in message:
                self._answer(message)
            elif "error" in message:
                raise raised(message["error"])
            else:
                return message.get("value")

    def call(self, operation: str, target: int, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the other side; changes to arguments in place come back."""
        sent = [self.encode(argument) for argument in args]
        value, changed = self.request(operation, target, sent, {name: self.encode(v) for name, v in kwargs.items()})
        for index, form in changed.items():
            _change(args[int(index)], self.decode(form))
        return self.decode(value)

    def encode(self, value: Any) -> Any:
        return encode(value, self._export)

    def decode(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _export(self, value: Any) -> list:
        if isinstance(value, Proxy):
            return ["yours", object.__getattribute__(value, "_id")]
        key = self._ids.setdefault(id(value), len(self._exports))
        self._exports[key] = value
        return ["mine", key]

    def _resolve(self, tag: str, payload: Any) -> Any:
        if tag == "yours" and payload in self._exports:
            return self._exports[payload]
        if tag == "mine" and isinstance(payload, int):
            return Proxy(self, payload)
        raise NotPlain(f"unknown reference {tag!r:.40}")

    def _answer(self, message: Any) -> None:
        try:
            reply = {"value": getattr(self, f"_do_{message['do']}")(*message["with"])}
        except BaseException as error:  # the caller raises it
            reply = {"error": error_of(error)}
        try:
            self._channel.send(reply)
        except (ValueError, RecursionError, TypeError, MemoryError) as error:
            self._channel.send({"error": error_of(error)})

    def _do_names(self, names: list[str], entry: list[str]) -> dict[str, Any]:
        """Which of these names the namespace has: a module, a library's object, or a value.

        Names of `entry` are values.
        """
        found: dict[str, Any] = {}
        for name in names:
            if self._namespace is None or name not in self._namespace:
                continue
            value = self._namespace[name]
            home, own = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
            if name in entry:
                found[name] = ["value", self.encode(value)]
            elif isinstance(value, ModuleType):
                found[name] = ["module", value.__name__]
            elif isinstance(home, str) and home.partition(".")[0] in sys.stdlib_module_names and own == name:
                found[name] = ["library", f"{home}:{own}"]
            else:
                found[name] = ["value", self.encode(value)]
        return found

    def _do_call(self, target: int, args: list, kwargs: dict[str, Any]) -> list:
        return self._called(self._exports[target], args, kwargs)

    def _do_method(self, target: int, args: list, kwargs: dict[str, Any]) -> list:
        name, value = self.decode(args[0]), self._exports[target]
        if name not in _STRUCTURAL:
            self._check_public(value, name)
        value, changed = self._called(getattr(value, name), args[1:], kwargs)
        return [value, {int(index) + 1: form for index, form in changed.items()}]

    def _do_attribute(self, target: int, name: str) -> Any:
        value = self._exports[target]
        self._check_public(value, name)
        return self.encode(getattr(value, name))

    def _do_assign(self, target: int, name: str, form: Any) -> None:
        value = self._exports[target]
        self._check_public(value, name)
        setattr(value, name, self.decode(form))

    def _check_public(self, value: Any, name: str) -> None:
        """Refuse private attributes, and all attributes of other modules' types, to the program."""
        if self._namespace is None and (name.startswith("_") or type(value).__module__ not in _OPEN_MODULES):
            raise AttributeError(name)

    def _called(self, function: Callable[..., Any], args: list, kwargs: dict[str, Any]) -> list:
        values = [self.decode(argument) for argument in args]
        result = self.encode(function(*values, **{name: self.decode(v) for name, v in kwargs.items()}))
        changed = {}
        for index, (before, value) in enumerate(zip(args, values, strict=True)):
            if isinstance(value, MUTABLE) and (after := self.encode(value)) != before:
                changed[index] = after
        return [result, changed]


def _change(target: Any, value: Any) -> None:
    """Give a mutable container the content of another one of its type."""
    if type(target) is not type(value) or not isinstance(target, MUTABLE):
        return
    if isinstance(target, list | bytearray):
        target[:] = value
    elif isinstance(target, dict | set):
        target.clear()
        target.update(value)
    else:
        target.clear()
        target.extend(value)


class Proxy:
    """Function or object of the other process; equal only to itself.

    Calls, attributes, items, length and iteration are forwarded, and only them.
    """

    def __init__(self, peer: Peer, target: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_id", target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _peer(self).call("call", _id(self), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in _SPECIAL:
            raise AttributeError(name)
        return _peer(self).decode(_peer(self).request("attribute", _id(self), name))

    def __setattr__(self, name: str, value: Any) -> None:
        _peer(self).request("assign", _id(self), name, _peer(self).encode(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and _id(self) == _id(other)

    def __hash__(self) -> int:
        return hash(_id(self))

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        try:
            return _method(self, "__len__")
        except AttributeError as error:  # `list` asks for the length and expects this type
            raise TypeError(f"{error}") from None

    def __iter__(self) -> Any:
        return _Iterator(_method(self, "__iter__"))

    def __next__(self) -> Any:
        return _method(self, "__next__")


class _Iterator:
    """Iteration over a proxy; `StopIteration` of the other process ends it."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        return _method(self._source, "__next__")


def _peer(proxy: Proxy) -> Peer:
    return object.__getattribute__(proxy, "_peer")


def _id(proxy: Proxy) -> int:
    return object.__getattribute__(proxy, "_id")


def _method(proxy: Proxy, name: str, *args: Any) -> Any:
    return _peer(proxy).call("method", _id(proxy), name, *args)


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Proxy, *args: Any) -> Any:
        return _method(self, name, *args)

    return method


for _name in ("__getitem__", "__setitem__", "__enter__", "__exit__"):
    setattr(Proxy, _name, _forward(_name))


def fetched(peer: Peer, names: list[str], entry: set[str]) -> dict[str, Any]:
    """Values of the program's names for the tests; standard-library objects are imported here.

    A name of `entry`, the tested functions, is always the program's own object. Another object is
    imported only by its own name, so the program cannot choose a function to run with the tests.
    """
    values: dict[str, Any] = {}
    for name, (kind, what) in (peer.request("names", names, sorted(entry)) or {}).items():
        if kind == "value":
            values[name] = peer.decode(what)
            continue
        module, _, own = str(what).partition(":")
        if name in entry or module.partition(".")[0] not in sys.stdlib_module_names or own not in ("", name):
            continue
        found = importlib.import_module(module)
        values[name] = getattr(found, own) if own else found
    return values
