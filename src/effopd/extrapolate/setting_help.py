"""Help texts of the settings: what one says, and the values of every strategy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from effopd.extrapolate.kinds import plain
from effopd.extrapolate.scoring import SCORERS
from effopd.extrapolate.strategy import STRATEGIES


def setting_help(name: str, text: str) -> dict[str, Any]:
    """The help of a setting, with the value of every strategy that reads it."""
    values = {strategy: rules.settings[name] for strategy, rules in STRATEGIES.items() if name in rules.settings}
    by_value: dict[Any, list[str]] = {}
    for strategy, value in values.items():
        by_value.setdefault(value, []).append(strategy)
    common = None if None in by_value else max(by_value, key=lambda value: len(by_value[value]))
    defaults = [_text(common)] if common is not None else []
    defaults += [
        f"{_text(value)} ({', '.join(names)})" for value, names in by_value.items() if value not in (None, common)
    ]
    return {"help": f"{text} Default: {'; '.join(defaults)}."}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default(value: Any) -> str:
    return "" if value is None else f"; default {value}"


def args_help() -> str:
    """The arguments of every strategy and scorer."""
    owners = [(name, rules.args) for name, rules in STRATEGIES.items()] + [
        (f"scoring by {s}", SCORERS[s][0]) for s in SCORERS
    ]
    texts: dict[str, list[str]] = {}
    for name, cls in owners:
        described = "; ".join(
            f"{f.name} ({f.metadata.get('help', '')}{_default(plain(cls())[f.name])})" for f in fields(cls)
        )
        if described:
            texts.setdefault(described, []).append(name)
    return " ".join(f"{', '.join(names)}: {described}." for described, names in texts.items())
