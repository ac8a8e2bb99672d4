"""`--help` texts of the settings, with the default of every strategy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from effopd.extrapolate.kinds import plain
from effopd.extrapolate.scorers.base import SCORERS
from effopd.extrapolate.strategy import STRATEGIES

#: Setting → its help; the values of the strategies follow.
TEXTS = {
    "strategy": "'none': plain OPD.",
    "args": "Settings of one strategy or scorer, as a JSON object.",
    "schedule": "Optimizer steps after which to search. 'powers_of_two': steps 1, 2, 4, 8, … "
    "'every_step': every step. 'adaptive': one step after a jump of s >= 1; otherwise the "
    "interval doubles, up to 8 steps (4 after a backward jump).",
    "parameters": "Parameters that the search moves: 'attention+mlp', 'all', 'released-code', or a regular "
    "expression searched in parameter names.",
    "validation_size": "Score candidates by accuracy on N training prompts, drawn once per run. Needs reference "
    "answers and generates completions. Replaces score_rollouts.",
    "score_rollouts": "Score candidates by the training divergence from the teacher (by default the exact "
    "reverse KL) on N of the next step's rollouts, before they are trained on. Needs neither "
    "answers nor generation. A value below 1 is a share of the step's rollouts, at least "
    "8 of them or half, clamped to 4–32. Replaces validation_size.",
    "gate": "Condition for accepting a candidate. 'not_worse': score >= the reference. 'better': score > "
    "the reference. 'significant': better by at least min_z standard errors of the paired "
    "difference. The reference is the last accepted point, in line_search the start.",
    "min_z": "Standard errors by which a candidate must be better under gate 'significant'.",
    "reset_moments": "Clear the optimizer's moments after a forward jump, because they average gradients at "
    "the previous weights.",
    "adapt_learning_rate": "After each search, multiply the learning rate by √min(1+s, 4) if the best scales s of "
    "this and s′ of the previous search exceed 1 (by ½√min(s, s′) if that is larger), and by 1/√2 "
    "if s < 0, down to 1/8 of its schedule. Not for Prodigy, D-Adaptation and DoG.",
}


def setting_help(name: str) -> str:
    """Help of a setting, with what every strategy that is registered now does or takes."""
    if name == "strategy":
        strategies = (f"'{strategy}': {rules.help}." for strategy, rules in STRATEGIES.items())
        return f"{TEXTS[name]} {' '.join(strategies)}"
    return f"{TEXTS[name]} {_args_help() if name == 'args' else _defaults(name)}"


def _defaults(name: str) -> str:
    """The value of a setting in every strategy that reads it."""
    values = {strategy: rules.settings[name] for strategy, rules in STRATEGIES.items() if name in rules.settings}
    by_value: dict[Any, list[str]] = {}
    for strategy, value in values.items():
        by_value.setdefault(value, []).append(strategy)
    common = None if None in by_value else max(by_value, key=lambda value: len(by_value[value]))
    defaults = [_text(common)] if common is not None else []
    defaults += [
        f"{_text(value)} ({', '.join(names)})" for value, names in by_value.items() if value not in (None, common)
    ]
    return f"Default: {'; '.join(defaults)}."


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default(value: Any) -> str:
    return "" if value is None else f"; default {value}"


def _args_help() -> str:
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
