"""Parser of commands that measure a model, with defaults from the run that produced it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effopd.commands.parser import CommandParser, parsed
from effopd.errors import ConfigError
from effopd.runs.run_prompts import agreed, check_files, run_of, spoken, taken_over


class MeasuringParser(CommandParser):
    """Parser whose defaults come from the run that produced the model (see `runs.run_prompts`).

    Attributes:
        note: one line with the settings taken from a run; "" if there are none.
        runs: `config.yaml` and settings of the models' runs; set by parsing.
    """

    #: Whether the task defaults to the run's task.
    own_task = True

    def __init__(self, *args: Any, **kwargs: Any):
        self.note = ""
        self.runs: list[tuple[Path, dict[str, Any]]] = []
        self._in_file: set[str] = set()
        super().__init__(*args, **kwargs)

    def models(self, namespace: argparse.Namespace) -> list[str]:
        """Folders or Hub ids of the models to measure."""
        return [str(namespace.model)] if namespace.model else []

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Like TRL's; also records the settings that the YAML file sets."""
        unset = object()
        before = [(action, action.default) for action in self._actions]
        for action in self._actions:
            action.default = unset
        try:
            return super().set_defaults_with_config(**settings)
        finally:
            for action, default in before:
                if action.default is unset:
                    action.default = default
                else:
                    self._in_file.add(action.dest)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Like `CommandParser`'s, with the run's settings as defaults.

        Raises:
            ConfigError: as for `CommandParser`, the models' runs disagree on a setting that no
                flag sets, or the task file of the run does not exist.
        """
        given, rest = super().parse_known_args(args, namespace)
        self.runs = runs = [run for run in map(run_of, self.models(given)) if run is not None]
        if not runs:
            return given, rest
        explicit = self._explicit(args) | self._in_file
        common, conflicts = agreed(runs)
        if message := next((text for flag, text in conflicts.items() if flag not in explicit), None):
            raise ConfigError(message)
        values = taken_over(common, vars(given), explicit, own_task=self.own_task)
        if not values:
            return given, rest
        check_files(runs[0][0], values)
        self.note = f"as in {runs[0][0]}: {spoken(values)}"
        self.set_defaults(**values)
        return super().parse_known_args(args, namespace)

    def _explicit(self, args: Any) -> set[str]:
        """Destinations of the flags on the command line."""
        before = [(action, action.default, action.required) for action in self._actions]
        defaults: dict[str, Any] = self._defaults  # type: ignore[has-type]
        self._defaults = {}
        try:
            for action in self._actions:
                action.default, action.required = argparse.SUPPRESS, False
            return set(vars(argparse.ArgumentParser.parse_known_args(self, args)[0]))
        finally:
            self._defaults = defaults
            for action, default, required in before:
                action.default, action.required = default, required


def parsed_as_trained(parser: MeasuringParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """Like `parsed`; prints the settings taken from a run, or appends them to the error."""
    try:
        arguments = parsed(parser, argv)
    except ConfigError as error:
        raise ConfigError(f"{error} ({parser.note})") if parser.note else error from error
    if parser.note:
        print(parser.note, flush=True)
    return arguments
