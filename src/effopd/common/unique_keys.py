"""YAML whose keys are unique and text; PyYAML itself keeps the last of equal keys."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml

from effopd.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses equal keys in one mapping; the key `<<` can repeat."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise ConfigError(
                    f"{key.value} is set twice, in lines {first[key.value]} and {line}. Keep one of them."
                )
            first[key.value] = line
        return node


def settings_text(path: Path) -> str:
    """Text of a file of settings.

    Raises:
        ConfigError: the file is in another encoding.
    """
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected text in {error.encoding}, got the byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}. Save the file in {error.encoding}."
        ) from error


def load_unique(text: str, name: str) -> Any:
    """Content of a YAML text.

    Args:
        name: the file, for messages.

    Raises:
        ConfigError: a mapping has the same key twice.
        yaml.YAMLError: the text is not YAML.
    """
    stream = io.StringIO(text)
    stream.name = name  # in PyYAML's messages
    try:
        return yaml.load(stream, Loader=_UniqueKeys)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_keys(text: str, name: str) -> None:
    """Check the keys of a YAML file of settings.

    Args:
        name: the file, for messages.

    Raises:
        ConfigError: a key occurs twice, or a key of the file's own mapping is not text.
        yaml.YAMLError: the text is not YAML.
    """
    values = load_unique(text, name)
    for key in values if isinstance(values, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(f"{name}: YAML reads a key as {key!r}: expected the name of a setting.")
