"""Help that teaches: one spelling a flag, what one mostly needs first, every flag of the host libraries after it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effopd.errors import ConfigError, EffOPDError

#: What the training commands explain first, besides their own.
RUN_ESSENTIALS = {
    "resume_from_checkpoint": "true: go on from the newest complete checkpoint of output_dir (from the start, if there is none yet); "
    "or the folder of a checkpoint.",
    "max_steps": "Optimizer steps; overrides num_train_epochs.",
    "num_train_epochs": "",
    "learning_rate": "",
    "per_device_train_batch_size": "Answers per forward pass, on each device. A step trains on this × gradient_accumulation_steps × devices.",
    "gradient_accumulation_steps": "Forward and backward passes per optimizer step.",
    "max_completion_length": "Longest answer, in tokens.",
}


_HOSTS = {"trl": "TRL's", "transformers": "transformers'"}


class OneSpelling(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows `--flag VALUE  what it does (default: …)`: one spelling (all of them work), and no default where there is none
    or the text says it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or "--help" in action.option_strings:
            return super()._format_action_invocation(action)
        long = [option for option in action.option_strings if option.startswith("--")]
        dotted = [option for option in long if "." in option]
        flag = (dotted or [option for option in long if "_" in option] or long or action.option_strings)[0]
        if flag.startswith("--no_") or action.nargs in (0, "?"):  # a switch
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


class _Help(argparse.Action):
    """`-h` the sections that one mostly needs, `--help` all of them."""

    def __init__(self, option_strings: Sequence[str], dest: str, short: int = 0, **kwargs: Any):
        super().__init__(
            option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="-h: the first sections; --help: every flag"
        )
        self._short = short

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "-h":
            later, parser._action_groups = parser._action_groups[self._short :], parser._action_groups[: self._short]
            count = sum(len(group._group_actions) for group in later)
            parser.epilog = f"{count} more flags, of TRL, transformers and this package: {parser.prog} --help\n\n{parser.epilog or ''}"
        parser.print_help()
        parser.exit()


def arrange(parser: argparse.ArgumentParser, dataclasses: Iterable[type], essentials: Mapping[str, str]) -> None:
    """Sort the flags of a parser made from dataclasses: the essentials, named sections, then by where a flag comes from.

    Args:
        parser: made with `add_help=False`.
        dataclasses: what it was made from.
        essentials: fields for the first section, in this order, each with its help ("": the host's).
    """
    flags = parser._optionals._group_actions
    named = [group for group in parser._action_groups if group not in (parser._optionals, parser._positionals)]
    first = parser.add_argument_group("essentials")
    first._group_actions += [action for name in essentials for action in flags if action.dest == name]
    for action in first._group_actions:
        action.help = essentials[action.dest] or action.help
    shown = list(first._group_actions)
    first.add_argument(
        "--config", metavar="FILE", type=_with_a_space, default=argparse.SUPPRESS,
        help="YAML with any of the settings here, without their dashes; flags on the command line win.",
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
    """`--config FILE` is read before the flags are parsed; what arrives here was written otherwise."""
    raise argparse.ArgumentTypeError(f"write it as two words: --config {value}")


def _origin(name: str, dataclasses: Iterable[type]) -> str:
    """The heading of a field: whose flag it is."""
    for dataclass in dataclasses:
        for cls in dataclass.__mro__:
            if name.removeprefix("no_") in vars(cls).get("__annotations__", {}):
                library, _, rest = cls.__module__.partition(".")
                if library in _HOSTS:
                    return f"{_HOSTS[library]} {cls.__name__.lstrip('_')}"
                return "task" if rest.startswith("tasks") else "runs, loss and evaluation"
    return "runs, loss and evaluation"


def parsed(parser: Any, argv: Sequence[str]) -> tuple[Any, ...]:
    """`parser.parse_args_and_config(argv)` of a `TrlParser`.

    Raises:
        ConfigError: an unknown setting in the YAML file, a missing file, or a value out of range.
    """
    try:
        return parser.parse_args_and_config(list(argv))
    except (ValueError, OSError) as error:
        raise error if isinstance(error, EffOPDError) else ConfigError(str(error)) from error
