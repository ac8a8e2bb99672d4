"""Rows of math problems: read, checked one by one, reported together.

A row has its question in `prompt`, `problem` or `question` (exactly one of them; text or chat messages), its reference
answer in `answer` (or in the `\\boxed{}` of `solution`) and optionally an `id`. A field inside of a column has a dotted
name, such as `reward_model.ground_truth` in verl's rows. Every other column goes to the example's metadata. Local files are read row by row; Hub datasets through `datasets.load_dataset`.

A bad row is never dropped: all of them are collected and raised in one `TaskError` that names file and row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.base import Example, Prompt
from effopd.tasks.math_grading import extract_boxed, plain_answer
from effopd.tasks.reference import MAX_DIGITS, UnusableAnswer, reference_text, single_precision

#: Columns that may hold the question.
PROMPT_COLUMNS = ("prompt", "problem", "question")
#: Metadata key with where an example came from, e.g. "data/train.jsonl row 12".
ORIGIN = "_origin"

_FILE_TYPES = (".jsonl", ".json", ".parquet")
_COLUMN_ARGS = ("prompt_column", "answer_column")
#: What the name of such a column often has in it.
_LIKELY = {
    "prompt_column": ("prompt", "problem", "question", "query", "instruction", "input"),
    "answer_column": ("answer", "solution", "target", "label", "result", "output", "truth", "gold"),
}
_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 20
#: Types of columns whose numbers have fewer digits than Python shows.
_SHORT_FLOATS = ("float", "float32", "halffloat", "float16")

#: What is wrong with a row: expected, got, how to fix it.
_Fault = tuple[str, str, str]


class RowFaults:
    """Collects what is wrong with rows and raises it all at once.

    Args:
        source: file or dataset the rows came from.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, origin: str, expected: str, got: str, fix: str) -> None:
        """Note one fault of the row at `origin`."""
        self.lines.append(f"{origin}: expected {expected}, got {got}. {fix}")

    def raise_if_any(self) -> None:
        """Raise every fault noted so far (the first 20 in words).

        Raises:
            TaskError: at least one was noted.
        """
        if not self.lines:
            return
        shown = "\n  ".join(self.lines[:_SHOWN])
        more = f"\n  … and {len(self.lines) - _SHOWN} more" if len(self.lines) > _SHOWN else ""
        count = f"{len(self.lines)} bad row" + ("s" if len(self.lines) > 1 else "")
        raise TaskError(f"{count} in '{self.source}'; no row was left out or changed:\n  {shown}{more}")


def read_math_rows(
    source: str,
    args: Mapping[str, Any] | None = None,
    *,
    answers_required: bool = True,
    why: str = "",
    setting: str = "task_args",
) -> tuple[Example, ...]:
    """Examples of a local file or Hub dataset, in its order, with the bare question as prompt.

    Args:
        source: path ending in .jsonl, .json (an array, or one object a line) or .parquet; a folder or Hub id otherwise.
        args: `prompt_column` and `answer_column` to use other columns, or fields inside of one by their dotted names; for Hub datasets also whatever `load_dataset`
            takes (`split` is "train" unless given).
        answers_required: whether a row without an answer is a fault. If not, rows must still be alike: an answer in
            all of them or in none.
        why: a sentence that says what needs the answers, for the message.
        setting: what `args` are called where the user gives them.

    Raises:
        TaskError: bad rows (all of them), no rows, or a source that cannot be read.
    """
    args = dict(args or {})
    columns = {name: args.pop(name, None) for name in _COLUMN_ARGS}
    faults, table = RowFaults(source), _Table(source, columns, setting)
    examples: list[Example] = []
    first_row_of: dict[str, int] = {}
    unusable: dict[str, Any] = {}
    for number, row in _open(source, args):
        origin = f"{source} row {number}"
        found = row if isinstance(row, _BadRow) else _to_example(row, source, number, columns)
        table.add(row, found)
        if isinstance(found, _BadRow):
            faults.add(origin, *found.fault)
            continue
        if found.id in first_row_of:
            what = f"{found.id!r}, which row {first_row_of[found.id]} has too"
            faults.add(origin, "an id of its own", what, "Give each row another id, or drop the column.")
            continue
        first_row_of[found.id] = number
        examples.append(found)
        if found.answer is None:
            unusable[found.id] = _field(row, columns["answer_column"] or "answer")
    table.check_prompts()
    if answers_required and examples and all(example.answer is None for example in examples):
        table.check_answers(why)
    _check_answers(examples, answers_required, columns["answer_column"] or "answer", faults, unusable)
    faults.raise_if_any()
    if not examples:
        raise TaskError(
            f"'{source}' has no rows: expected at least one with a prompt. Check that it is the right one."
        )
    return tuple(examples)


class _BadRow:
    """Stands where a row should be."""

    def __init__(self, expected: str, got: str, fix: str) -> None:
        self.fault: _Fault = (expected, got, fix)


class _NoPrompt(_BadRow):
    """A row without one column that is the prompt."""


class _Table:
    """The columns of a source as a whole: a mistake that every row makes is said once, with what names the right column.

    Args:
        source: file or dataset the rows came from.
        columns: the `prompt_column` and `answer_column` that were given.
        setting: what they are given in.
    """

    def __init__(self, source: str, columns: Mapping[str, str | None], setting: str) -> None:
        self._source, self._columns, self._setting = source, columns, setting
        self._seen: dict[str, None] = {}
        self._rows = self._without_prompt = 0

    def add(self, row: Any, found: Example | _BadRow) -> None:
        """Note a row, as read and as understood."""
        self._rows += 1
        self._without_prompt += isinstance(found, _NoPrompt)
        if isinstance(row, dict):
            self._seen |= dict.fromkeys(_names(row))

    def check_prompts(self) -> None:
        """
        Raises:
            TaskError: no row has one prompt column, and they agree on how.
        """
        names = _prompt_columns(self._columns)
        present = [name for name in names if name in self._seen]
        if not self._rows or self._without_prompt < self._rows:
            return
        if not present:
            self._raise("prompt_column", f"no row of {self._source} has {' or '.join(map(repr, names))}", "")
        self._raise(
            "prompt_column",
            f"no row of {self._source} has just one of {' and '.join(map(repr, present))}",
            "",
            present[0],
        )

    def check_answers(self, why: str) -> None:
        """For a source none of whose rows has an answer.

        Raises:
            TaskError: because there is no such column.
        """
        column = self._columns["answer_column"] or "answer"
        if not any(name == column or name.startswith(f"{column}.") for name in self._seen):
            self._raise("answer_column", f"no row of {self._source} has '{column}'", why)

    def _raise(self, which: str, what: str, why: str, guess: str | None = None) -> None:
        prompt = next((name for name in _prompt_columns(self._columns) if name in self._seen), None)
        others = [
            name for name in self._seen if name not in (prompt, self._columns["answer_column"] or "answer", "id")
        ]
        likely = [name for name in others if any(part in name.lower() for part in _LIKELY[which])]
        guess = guess or next(iter(likely or (others if len(others) == 1 else ())), "…")
        given = {name: value for name, value in self._columns.items() if value} | {which: guess}
        raise TaskError(
            f"{what} (columns: {', '.join(self._seen) or 'none'}). Name yours: --{self._setting} "
            f"'{json.dumps(given, ensure_ascii=False)}'." + (f" {why}" if why else "")
        )


def _prompt_columns(columns: Mapping[str, str | None]) -> tuple[str, ...]:
    return (columns["prompt_column"],) if columns["prompt_column"] else PROMPT_COLUMNS


def on_hub(source: str) -> bool:
    """Whether a source is read with `datasets.load_dataset` rather than as a local file."""
    path = Path(source).expanduser()
    return path.suffix.lower() not in _FILE_TYPES and not path.is_file()


def _open(source: str, args: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Rows with their 1-based number in the file (the line number for JSON Lines)."""
    if on_hub(source):
        return _hub_rows(source, args)
    path = Path(source).expanduser()
    if args:
        raise TaskError(
            f"task_args of the local file '{source}': expected only {' and '.join(_COLUMN_ARGS)}, got "
            f"{', '.join(map(repr, sorted(args)))}. Remove the others; they are for Hub datasets."
        )
    if not path.is_file():
        raise TaskError(f"no such file: '{source}' (looked in '{Path.cwd()}'). Check the path, or write a Hub id.")
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_file,
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise TaskError(
            f"'{source}': expected a file ending in {', '.join(_FILE_TYPES)}, got '{path.suffix}'. Convert it, e.g. "
            "with datasets.Dataset.to_json."
        )
    return readers[path.suffix.lower()](path)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text, parse_int=_whole_number)
            except UnicodeDecodeError as error:
                yield number, _BadRow("UTF-8 text", f"other bytes ({error.reason})", "Save the file as UTF-8.")
            except (json.JSONDecodeError, RecursionError) as error:
                shown = text.strip()[:60]
                yield number, _BadRow("one JSON object a line", f"{shown!r} ({error})", "Correct the line.")


def _whole_number(digits: str) -> int | str:
    """A whole number of JSON; as text where Python would not read it."""
    return int(digits) if len(digits) <= MAX_DIGITS else digits


def _json_file(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        is_array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_whole_number)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TaskError(f"'{path}': expected a JSON array of objects, got invalid JSON ({error}).") from error
    yield from enumerate(rows, start=1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            short = [field.name for field in file.schema_arrow if str(field.type) in _SHORT_FLOATS]
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row | {name: single_precision(row[name]) for name in short}
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"'{path}': expected a Parquet file, got one that cannot be read ({error}).") from error


def _hub_rows(source: str, args: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    args = {"split": "train", **args}
    try:
        dataset = load_dataset(source, **args)
    except Exception as error:  # whatever the Hub client and dataset builders raise, with what to check
        raise TaskError(
            f"could not load the dataset '{source}' with {args}: {type(error).__name__}: {error}. Expected a Hub "
            f"dataset id or a local {', '.join(_FILE_TYPES)} file; check the name, task_args (e.g. 'name', 'split'), "
            "network access and that you may read it."
        ) from error
    features = getattr(dataset, "features", None) or {}
    short = [name for name, feature in features.items() if getattr(feature, "dtype", "") in _SHORT_FLOATS]
    for number, row in enumerate(dataset, start=1):
        yield number, row | {name: single_precision(row[name]) for name in short}


def _to_example(row: Any, source: str, number: int, columns: Mapping[str, str | None]) -> Example | _BadRow:
    if not isinstance(row, dict):
        return _BadRow("an object with a prompt", _kind(row), 'Write {"prompt": …, "answer": …}.')
    row = {name: value for name, value in row.items() if value is not None}
    names = _prompt_columns(columns)
    present = [name for name in names if _field(row, name) is not None]
    if len(present) != 1:
        got = f"both {' and '.join(map(repr, present))}" if present else f"columns {sorted(row)}"
        fix = "Keep one of them" if present else "Rename the column that has the question"
        expected = f"the prompt in one of the columns {', '.join(names)}"
        return _NoPrompt(expected, got, f"{fix}, or name it with task_args '{{\"prompt_column\": …}}'.")
    prompt = _field(row, present[0])
    row.pop(present[0], None)
    fault = _prompt_fault(prompt)
    if fault:
        return _BadRow(*fault)
    answer_column = columns["answer_column"] or "answer"
    answer = _field(row, answer_column)
    row.pop(answer_column, None)
    if answer is None and answer_column == "answer" and isinstance(row.get("solution"), str):
        answer = extract_boxed(row["solution"])
    try:
        text = reference_text(answer)
        text = reference_text(plain_answer(text)) if text is not None else None
    except UnusableAnswer as error:
        return _BadRow(f"{error} in '{answer_column}'", _kind(answer), error.fix)
    identity = row.pop("id", f"{Path(source).name}:{number}")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        return _BadRow("text or a whole number in 'id'", _kind(identity), "Change it, or drop the column.")
    return Example(str(identity), prompt, text, {**row, ORIGIN: f"{source} row {number}"})


def _prompt_fault(prompt: Any) -> _Fault | None:
    if isinstance(prompt, str):
        return None if prompt.strip() else ("a prompt", f"the empty text {prompt!r}", "Fill it in or remove the row.")
    expected = "a prompt that is text or a list of chat messages"
    fix = 'Write text, or [{"role": "user", "content": "…"}] ending with the user.'
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return expected, _kind(prompt), fix
    for message in prompt:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            return expected, f"the message {str(message)[:60]}", fix
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        return expected, "no user message with text at its end", fix
    return None


def _names(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold something; of one that holds fields, their dotted names."""
    names: list[str] = []
    for name, value in row.items():
        if isinstance(value, dict) and value:
            names += [f"{name}.{inner}" for inner in _names(value)]
        elif value is not None:
            names.append(name)
    return names


def _field(row: Any, name: str) -> Any:
    """The value in a column, or in a field inside of one (`column.field`, `column.0` of a list); `None` if there is none."""
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


def _check_answers(
    examples: list[Example], answers_required: bool, column: str, faults: RowFaults, unusable: Mapping[str, Any]
) -> None:
    having = next((example for example in examples if example.answer is not None), None)
    if not answers_required and having is None:
        return
    for example in examples:
        if example.answer is None:
            why = "" if answers_required or having is None else f", as {having.metadata[ORIGIN]} has"
            fix = "Add the answer; without accuracy, rows may lack it, but then all of them."
            value = unusable.get(example.id)
            got = "none" if value is None else f"no answer: {_kind(value)}"
            faults.add(str(example.metadata[ORIGIN]), f"a reference answer in '{column}'{why}", got, fix)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def question_key(prompt: Prompt) -> str:
    """A prompt as text that is equal for equal questions (space at the ends aside)."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
