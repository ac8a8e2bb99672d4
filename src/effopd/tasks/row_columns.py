"""Columns with the question and the answer of a row, and errors for sources that lack them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.base import Example
from effopd.tasks.row_faults import BadRow, NoPrompt

#: Columns that can hold the question.
PROMPT_COLUMNS = ("prompt", "problem", "question")
#: Settings for other column names.
COLUMN_ARGS = ("prompt_column", "answer_column")
#: Common parts of such columns' names.
_LIKELY = {
    "prompt_column": ("prompt", "problem", "question", "query", "instruction", "input"),
    "answer_column": ("answer", "solution", "target", "label", "result", "output", "truth", "gold"),
}


class Columns:
    """Columns of a whole source, to report a fault shared by all rows once.

    Args:
        source: file or dataset of the rows.
        columns: the user's `prompt_column` and `answer_column`.
        setting: name of the setting that holds them, for messages.
    """

    def __init__(self, source: str, columns: Mapping[str, str | None], setting: str) -> None:
        self._source, self._columns, self._setting = source, columns, setting
        self._seen: dict[str, None] = {}
        self._chat: str | None = None
        self._rows = self._without_prompt = 0

    def add(self, row: Any, example: Example | BadRow) -> None:
        """Record a row, as read and as converted."""
        self._rows += 1
        self._without_prompt += isinstance(example, NoPrompt)
        if isinstance(row, dict):
            self._seen |= dict.fromkeys(_names(row))
            self._chat = self._chat or next((name for name, value in row.items() if _ends_with_answer(value)), None)

    def check_prompts(self) -> None:
        """Check that at least one row has exactly one prompt column.

        Raises:
            TaskError: no row has; the message suggests a column.
        """
        names = prompt_columns(self._columns)
        present = [name for name in names if name in self._seen]
        if not self._rows or self._without_prompt < self._rows:
            return
        if not present and self._chat is not None:
            raise TaskError(
                f"no row of {self._source} has {' or '.join(map(repr, names))}; the chats in '{self._chat}' end with "
                "an answer of the assistant. Write the messages before it to 'prompt' and, for accuracy, the final "
                "answer to 'answer'."
            )
        if not present:
            self._raise("prompt_column", f"no row of {self._source} has {' or '.join(map(repr, names))}", "")
        self._raise(
            "prompt_column",
            f"no row of {self._source} has just one of {' and '.join(map(repr, present))}",
            "",
            present[0],
        )

    def check_answers(self, why: str) -> None:
        """Check that the answer column exists, for a source without any answer.

        Raises:
            TaskError: there is no such column; the message suggests one.
        """
        column = self._columns["answer_column"] or "answer"
        if not any(name == column or name.startswith(f"{column}.") for name in self._seen):
            self._raise("answer_column", f"no row of {self._source} has '{column}'", why)

    def _raise(self, which: str, what: str, why: str, guess: str | None = None) -> None:
        prompt = next((name for name in prompt_columns(self._columns) if name in self._seen), None)
        others = [
            name for name in self._seen if name not in (prompt, self._columns["answer_column"] or "answer", "id")
        ]
        likely = [name for name in others if any(part in name.lower() for part in _LIKELY[which])]
        guess = guess or next(iter(likely or (others if len(others) == 1 else ())), "…")
        given = {name: value for name, value in self._columns.items() if value} | {which: guess}
        raise TaskError(
            f"{what} (columns: {', '.join(self._seen) or 'none'}). Name your column: --{self._setting} "
            f"'{json.dumps(given, ensure_ascii=False)}'." + (f" {why}" if why else "")
        )


def check_names(columns: Mapping[str, Any], setting: str = "task_args") -> None:
    """Check that the user's names of columns are text.

    Raises:
        TaskError: one is not.
    """
    for which, name in columns.items():
        if name is not None and not isinstance(name, str):
            raise TaskError(
                f"{setting}: {which}: expected the name of one column as text, got {type(name).__name__} {name!r}. "
                f'Write for example \'{{"{which}": "{_LIKELY[which][2]}"}}\'.'
            )


def prompt_columns(columns: Mapping[str, str | None]) -> tuple[str, ...]:
    """Columns that can hold the question."""
    return (columns["prompt_column"],) if columns["prompt_column"] else PROMPT_COLUMNS


def field_of(row: Any, name: str) -> Any:
    """Value of a column or nested field (`column.field`, `column.0` of a list), or `None`."""
    if not isinstance(row, dict) or name in row:
        return row.get(name) if isinstance(row, dict) else None
    value: Any = row
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _ends_with_answer(value: Any) -> bool:
    """Whether a value is a chat that ends with the assistant, as in data for fine-tuning."""
    if not isinstance(value, list) or not value or not isinstance(value[-1], dict):
        return False
    return value[-1].get("role", value[-1].get("from")) in ("assistant", "gpt", "model")


def _names(row: Mapping[str, Any]) -> list[str]:
    """Names of a row's columns that are not empty; dotted names for nested fields."""
    names: list[str] = []
    for name, value in row.items():
        if isinstance(value, dict) and value:
            names += [f"{name}.{inner}" for inner in _names(value)]
        elif value is not None:
            names.append(name)
    return names
