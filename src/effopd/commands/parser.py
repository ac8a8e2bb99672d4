"""Argument parser with sectioned `--help` and suggestions for misspelled flags and YAML keys."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from effopd.common.host_values import turned_off
from effopd.common.unique_keys import check_keys, settings_text
from effopd.errors import ConfigError, EffOPDError

#: Host flags in the first help section of both training commands → help; "": the host's help.
RUN_ESSENTIALS = {
    "resume_from_checkpoint": "true: resume from the newest complete checkpoint in output_dir, or start "
    "training if there is none. Or the folder of a checkpoint. Without a value: true.",
    "max_steps": "Number of optimizer steps; overrides num_train_epochs.",
    "num_train_epochs": "",
    "learning_rate": "",
    "per_device_train_batch_size": "Rollouts per forward pass and device. A step trains on this × "
    "gradient_accumulation_steps × devices.",
    "gradient_accumulation_steps": "Forward and backward passes per optimizer step.",
    "max_completion_length": "Maximum length of an answer, in tokens.",
}
#: Help of `--dry_run`.
DRY_RUN = (
    "Check flags, local data files, folders and packages without weights or network. Print the plan and its estimated "
    "memory; write nothing."
)


#: Flag name in older host versions or other tools → (name, value) in this package.
_FORMER = {
    "warmup_ratio": ("warmup_steps", "SHARE"),
    "torch_dtype": ("dtype", ""),
    "evaluation_strategy": ("eval_strategy", ""),
    "max_new_tokens": ("max_completion_length", ""),
    "no_cuda": ("use_cpu", "true"),
    "student_model_name_or_path": ("model_name_or_path", ""),
    "dataset_name": ("task", ""),
    "lr": ("learning_rate", ""),
    "num_iterations": ("updates_per_rollouts", ""),
    "steps_per_generation": ("updates_per_rollouts", ""),
    "num_ppo_epochs": ("updates_per_rollouts", ""),
}
_HOSTS = {"trl": "TRL's", "transformers": "transformers'"}
#: Module of a dataclass in this package → its section of the help.
_SECTIONS = {
    "tasks": "task",
    "distill.teachers": "teachers: in memory, several, or behind a server",
    "distill.served": "teachers: in memory, several, or behind a server",
    "distill.schedule_config": "curriculum (CLPD) and Prune-OPD",
    "distill.offline_config": "stored answers",
    "distill.mixing_config": "stored answers",
}
_GENERAL = "runs, loss and evaluation"
#: argparse's message about a value that is not among the choices.
_WRONG_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from ")
#: All spellings of a flag, joined as in argparse's messages.
_SPELLINGS = re.compile(r"--[\w.-]+(?:/--?[\w.-]+)+")


def spelling(action: argparse.Action) -> str:
    """The spelling of a flag shown in help and messages, or the name of a positional argument.

    All other spellings of the flag are accepted too.
    """
    long = [option for option in action.option_strings if option.startswith("--")]
    dotted = [option for option in long if "." in option]
    shown = dotted or [option for option in long if "_" in option] or long or list(action.option_strings)
    return shown[0] if shown else str(action.metavar or action.dest)


class OneSpelling(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter: `--flag VALUE  help (default: …)`, with one spelling per flag.

    The default is left out if it is empty or false, or if the help already states it.
    """

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or "--help" in action.option_strings:
            return super()._format_action_invocation(action)
        flag = spelling(action)
        if flag.startswith("--no_") or action.nargs == 0 or action.const is True:  # a switch
            return flag
        if action.choices is not None:
            listed = "{" + ",".join(map(str, action.choices)) + "}"
            return f"{flag} {listed if len(listed) < 100 else 'NAME'}"
        return f"{flag} {action.metavar or flag.lstrip('-').rpartition('.')[2].upper()}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if (
            action.default in (None, argparse.SUPPRESS, "")
            or action.default is False
            or "efault:" in text
            or action.nargs == 0
        ):
            return text
        return super()._get_help_string(action) or ""


class CommandParser(TrlParser):
    """`TrlParser` with typed errors that suggest similar names.

    YAML keys are the names of the flags. `effopd: {strategy: …}` means `effopd.strategy: …`.

    Raises:
        ConfigError: a flag or a YAML key is unknown, or a word belongs to no flag. The message
            suggests similar names.
    """

    #: The file after `--config`, if any.
    config_path: Path | None = None
    _file = "the YAML file"
    _words: Sequence[str] = ()

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple[Any, ...]:
        """Like TRL's; also checks that one file follows `--config` and that its keys are unique."""
        self._words = words = list(args)
        if words[-1:] == ["--config"]:
            raise ConfigError("--config: expected a YAML file after it, got nothing.")
        if words.count("--config") > 1:
            raise ConfigError("--config is given twice: expected one YAML file. Merge the files.")
        if "--config" in words:
            self.config_path = path = Path(words[words.index("--config") + 1])
            self._file = path.name
            if not path.is_file():
                what = "is a folder" if path.is_dir() else f"no such file (working directory: {Path.cwd()})"
                raise ConfigError(f"--config {path}: {what}. Expected the path of a YAML file.")
            check_keys(settings_text(path), self._file)
        return super().parse_args_and_config(words, **kwargs)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Like TRL's, after checking that all keys are known and converting their values."""
        names = {action.dest: action.dest for action in self._settable()}
        names |= {spelling(action).lstrip("-"): action.dest for action in self._settable()}
        flat = list(_flattened(settings, names))
        for key, value in flat:
            if f"{key}.strategy" in names:
                raise ConfigError(f"{self._file}: {key}: expected a block, {{strategy: …}}, got {value!r}.")
        unknown = [key for key, _ in flat if key not in names]
        if unknown:
            problems = " ".join(f"unknown setting {key}.{_question(self.close(key), '', ': ')}" for key in unknown)
            raise ConfigError(f"{self._file}: {problems} (`{self.prog} --help` lists all)")
        actions = {action.dest: action for action in self._settable()}
        values: dict[str, Any] = {}
        for key, value in flat:
            if names[key] in values:
                raise ConfigError(f"{self._file}: {key} is set twice, in two spellings. Keep one of them.")
            values[names[key]] = self._as_given(actions[names[key]], key, value)
        return super().set_defaults_with_config(**self.adopted(values))

    def adopted(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the YAML file that become defaults, by field.

        Without those that nothing reads because the command line turns their reader off.
        """
        unread = turned_off(self.given, values)
        return {name: value for name, value in values.items() if not name.startswith(unread)}

    def given(self, dest: str) -> str | None:
        """Value of a field on the command line, as text; `None`: it is not given there.

        A flag without a value is "true".
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        names = next((action.option_strings for action in self._settable() if action.dest == dest), None)
        if names is None:
            return None
        first.add_argument(*names, dest="value", nargs="?", const="true")
        return first.parse_known_args(self._words)[0].value

    def _as_given(self, action: argparse.Action, key: str, value: Any) -> Any:
        """Convert a YAML value as the command line does, because TRL does not check YAML values."""
        if value is None or isinstance(value, Mapping):
            return value
        several = action.nargs in ("+", "*")
        words = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not several and action.type not in (None, str, tuple):
            raise ConfigError(f"{self._file}: {key}: expected one value, got {value!r}.")
        if not several and isinstance(value, list):
            return value
        converted = [self._one(action, key, word) for word in words]
        return converted if several else converted[0]

    def _one(self, action: argparse.Action, key: str, word: Any) -> Any:
        if word is False and "no" in (action.choices or ()):
            word = "no"  # YAML reads a bare no as false
        if action.type is str and isinstance(word, str | int | float) and not isinstance(word, bool):
            word = str(word)
        elif callable(action.type) and action.type is not str:
            try:
                word = action.type(str(word))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise ConfigError(f"{self._file}: {key}: expected another value, got {word!r} ({error}).") from error
        if action.choices is not None and word not in action.choices:
            raise ConfigError(
                f"{self._file}: {key}: expected one of {', '.join(map(str, action.choices))}; got {word!r}."
            )
        return word

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Like TRL's; if a dataclass rejects its values, the error names the flag at fault.

        Raises:
            ConfigError: a dataclass cannot be built from these values.
        """
        namespace, _ = self.parse_known_args(args)
        made = []
        for dataclass in self.dataclass_types:
            names = {field.name for field in fields(dataclass) if field.init}
            values = {name: value for name, value in vars(namespace).items() if name in names}
            for name in names:
                delattr(namespace, name)
            try:
                made.append(dataclass(**values))
            except EffOPDError as error:
                if error.__cause__ is None or str(error) != str(error.__cause__):
                    raise
                raise self._explained(dataclass, values, error) from error  # the host's message, unchanged
            except Exception as error:  # settings only: nothing is loaded or trained here
                raise self._explained(dataclass, values, error) from error
        return (*made, namespace) if vars(namespace) else tuple(made)

    def _explained(self, dataclass: type, values: Mapping[str, Any], error: Exception) -> ConfigError:
        """The host's message, with the flag whose default makes the error go away."""
        actions = {action.dest: action for action in self._settable()}
        defaults = {f.name: _default(f) for f in fields(dataclass) if f.init}
        message = " ".join(str(error).split()) or type(error).__name__
        for name, value in values.items():
            if name not in actions or value == defaults[name] or defaults[name] is MISSING:
                continue
            try:
                dataclass(**{**values, name: defaults[name]})
            except Exception as other:
                if str(other) == str(error):
                    continue
            flag = spelling(actions[name])
            return ConfigError(message if flag in message else f"{flag} {value}: {message}")
        return ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Like TRL's, but reports unknown flags before missing ones.

        A missing flag is often present under a misspelled name.
        """
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        given, rest = super().parse_known_args(args, namespace)
        if rest:
            raise ConfigError(self._unknown(rest))
        optional = self.optional(given)
        missing = [spelling(a) for a in required if getattr(given, a.dest) is None and a.dest not in optional]
        if missing:
            self.error(f"missing: {', '.join(missing)} (`{self.prog} --help` explains them)")
        return given, rest

    def optional(self, given: argparse.Namespace) -> Collection[str]:
        """Required fields that the other settings make optional; none by default."""
        return ()

    def error(self, message: str) -> Any:
        """Like argparse's, with one spelling per flag and suggestions for misspelled choices.

        Raises:
            ConfigError: a flag is ambiguous; the message is that for an unknown flag.
        """
        if message.startswith("ambiguous option: "):
            flag = message.removeprefix("ambiguous option: ").partition(" could match ")[0]
            raise ConfigError(self._unknown([flag]))
        by_all = {"/".join(action.option_strings): spelling(action) for action in self._actions}
        message = _SPELLINGS.sub(lambda match: by_all.get(match[0], match[0]), message)
        if wrong := _WRONG_CHOICE.search(message):
            hint = did_you_mean(wrong[1], re.findall(r"'([^']*)'", message[wrong.end() :]))
            message += f".{hint}" if hint else ""
        super().error(message)

    def close(self, word: str) -> list[tuple[str, str]]:
        """Suggestions for an unknown name, as (name, value), likeliest first.

        If the word is a choice of exactly one flag, that flag comes first with the word as its
        value. Then follow the names that end with the word or, if there are none, those that start
        with it or, if there are none, the most similar name. All other values are "".
        """
        word = word.lstrip("-").replace("-", "_")
        actions = {spelling(action).lstrip("-"): action for action in self._settable()}
        if word in actions:
            return [(word, "")]
        if word in _FORMER and _FORMER[word][0] in actions:
            return [_FORMER[word]]
        offering = [name for name, action in actions.items() if word in (action.choices or ())]
        ending = [name for name in actions if name.endswith((f"_{word}", f".{word}"))]
        longer = [name for name in actions if name.startswith(word)]
        found = ending or longer or difflib.get_close_matches(word, actions, n=1, cutoff=0.75)
        names = [(name, "") for name in found if name not in offering or len(offering) > 1]
        return ([(offering[0], word)] if len(offering) == 1 else []) + names[:3]

    def _settable(self) -> list[argparse.Action]:
        return [
            action
            for action in self._actions
            if action.dest not in ("help", "config") and not isinstance(action, argparse._StoreFalseAction)
        ]

    def _unknown(self, rest: Sequence[str]) -> str:
        """Message about unparsed words: the unknown flags among them, otherwise the first word."""
        flags = [word.partition("=")[0] for word in rest if word.startswith("-") and not word[1:2].isdigit()]
        problems = [f"unknown flag {flag}.{_question(self.close(flag), '--', ' ')}" for flag in flags]
        if not flags:
            hint = "; write --config before a YAML file" if rest[0].endswith((".yaml", ".yml")) else ""
            problems = [f"{rest[0]!r} belongs to no flag: expected --FLAG VALUE{hint}."]
        return f"{' '.join(problems)} (`{self.prog} --help` lists all)"


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _flattened(settings: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Settings, with each block of dotted flags expanded: `effopd: {seed: 0}` → `effopd.seed`."""
    blocks = {name.partition(".")[0] for name in names if "." in name}
    for key, value in settings.items():
        if key in blocks and (value is None or isinstance(value, dict)):
            yield from ((f"{key}.{name}", inner) for name, inner in (value or {}).items())
        else:
            yield key, value


def _question(close: Sequence[tuple[str, str]], dashes: str, between: str) -> str:
    options = [f"{dashes}{name}" + (f"{between}{value}" if value else "") for name, value in close]
    return f" Did you mean {' or '.join(options)}?" if options else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean NAME?` with the most similar name; "" if none is similar."""
    return _question([(name, "") for name in difflib.get_close_matches(word, list(known), n=1)], "", "")


class _Help(argparse.Action):
    """`-h` prints the first sections, `--help` prints all of them."""

    def __init__(self, option_strings: Sequence[str], dest: str, short: int = 0, **kwargs: Any):
        super().__init__(
            option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="-h: the first sections; --help: every flag"
        )
        self._short = short

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "-h":
            later, parser._action_groups = parser._action_groups[self._short :], parser._action_groups[: self._short]
            count = sum(len(group._group_actions) for group in later)
            more = f"{count} more flags of this package, TRL and transformers: {parser.prog} --help"
            parser.epilog = f"{more}\n\n{parser.epilog or ''}"
        parser.print_help()
        parser.exit()


def arrange(parser: argparse.ArgumentParser, dataclasses: Iterable[type], essentials: Mapping[str, str]) -> None:
    """Sort flags into help sections: essentials, named groups, this package, the host libraries.

    Args:
        parser: created with `add_help=False`.
        dataclasses: the dataclasses it was created from.
        essentials: field → help of the first section, in order; "": the field's own help.
    """
    flags = parser._optionals._group_actions
    named = [group for group in parser._action_groups if group not in (parser._optionals, parser._positionals)]
    first = parser.add_argument_group("essentials")
    first._group_actions += [action for name in essentials for action in flags if action.dest == name]
    for action in first._group_actions:
        action.help = essentials[action.dest] or action.help
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const, action.metavar = "?", "true", "[FOLDER]"
        if action.dest == "report_to":  # the host's help calls it a list, but its flag takes one name
            action.nargs = "+"
    shown = list(first._group_actions)
    first.add_argument(
        "--config", metavar="FILE", type=_with_a_space, default=argparse.SUPPRESS,
        help="YAML file with settings: flag names without dashes. Flags on the command line take precedence.",
    )  # fmt: skip
    first.add_argument("-h", "--help", action=_Help, short=1 + len(named))
    sections: dict[str, Any] = {}
    for action in flags:
        if action not in shown:
            title = _origin(action.dest, dataclasses)
            if title not in sections:
                sections[title] = parser.add_argument_group(title)
            sections[title]._group_actions.append(action)
    hosts = [group for title, group in sections.items() if title.startswith(tuple(_HOSTS.values()))]
    ours = [group for group in sections.values() if group not in hosts]
    parser._action_groups[:] = [first, *named, *ours, *hosts]


def _with_a_space(value: str) -> str:
    """Reject `--config=FILE`; `--config FILE` is read before the flags are parsed."""
    raise argparse.ArgumentTypeError(f"write it as two words: --config {value}")


def _origin(name: str, dataclasses: Iterable[type]) -> str:
    """Section heading of a field: the class of the host library, or a section of this package."""
    for dataclass in dataclasses:
        for cls in dataclass.__mro__:
            if name.removeprefix("no_") in vars(cls).get("__annotations__", {}):
                library, _, rest = cls.__module__.partition(".")
                if library in _HOSTS:
                    return f"{_HOSTS[library]} {cls.__name__.lstrip('_')}"
                return next((title for start, title in _SECTIONS.items() if rest.startswith(start)), _GENERAL)
    return _GENERAL


def add_dry_run(parser: argparse.ArgumentParser, text: str = DRY_RUN) -> None:
    """Add the switch `--dry_run`, which also takes true or false, as the switches of fields do.

    Args:
        text: its help.
    """
    parser.add_argument("--dry_run", type=string_to_bool, nargs="?", const=True, default=False, help=text)


def require(parser: argparse.ArgumentParser, *names: str) -> None:
    """Mark flags as required that are optional in their dataclass."""
    for action in parser._actions:
        action.required = action.required or action.dest in names


def parsed(parser: CommandParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """`parser.parse_args_and_config(argv)`.

    Raises:
        ConfigError: a YAML setting is unknown, a file is missing, or a value is out of range.
    """
    try:
        return parser.parse_args_and_config(list(argv))
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise error if isinstance(error, EffOPDError) else ConfigError(str(error)) from error
