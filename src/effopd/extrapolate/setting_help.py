"""`--help` texts of the settings, with the default of every strategy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from effopd.extrapolate.kinds import plain
from effopd.extrapolate.scorers.base import SCORERS
from effopd.extrapolate.strategy import STRATEGIES


def setting_help(name: str, text: str) -> dict[str, Any]:
    """`text` plus the value of the setting in every strategy that reads it, as field metadata."""
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
    """One sentence per strategy or scorer that has arguments: their help texts and defaults."""
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
