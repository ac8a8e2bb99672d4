"""Rows of math problems: read, checked one by one, reported together.

A row has its question in `prompt`, `problem` or `question` (exactly one of them; text or chat messages), its reference
answer in `answer` (or in the `\\boxed{}` of `solution`) and optionally an `id`. Every other column goes to the
example's metadata. Local files are read row by row; Hub datasets through `datasets.load_dataset`.

A bad row is never dropped: all of them are collected and raised in one `TaskError` that names file and row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effopd.errors import TaskError
from effopd.tasks.base import Example, Prompt, Task
from effopd.tasks.math_grading import extract_boxed, plain_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Columns that may hold the question.
PROMPT_COLUMNS = ("prompt", "problem", "question")
#: Metadata key with where an example came from, e.g. "data/train.jsonl row 12".
ORIGIN = "_origin"

_FILE_TYPES = (".jsonl", ".json", ".parquet")
_COLUMN_ARGS = ("prompt_column", "answer_column")
#: What the name of such a column often has in it.
_LIKELY = {
    "prompt_column": ("prompt", "problem", "question", "query", "instruction", "input"),
    "answer_column": ("answer", "solution", "target", "label", "result", "output"),
}
_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 20

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
        args: `prompt_column` and `answer_column` to use other columns; for Hub datasets also whatever `load_dataset`
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
    table.check_prompts()
    if answers_required and examples and all(example.answer is None for example in examples):
        table.check_answers(why)
    _check_answers(examples, answers_required, columns["answer_column"] or "answer", faults)
    faults.raise_if_any()
    if not examples:
        raise TaskError(
            f"'{source}' has no rows: expected at least one with a prompt. Check that it is the right one."
        )
    return tuple(examples)


def check_prompt_lengths(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Length of every prompt in tokens, as the model gets it: chat messages with the template and generation prompt.

    Args:
        task: whose prompts to measure.
        tokenizer: the student's.
        max_prompt_length: longest allowed, in tokens; `None` only measures.
        chat_template_kwargs: passed to `apply_chat_template`.

    Returns:
        Example id → number of tokens.

    Raises:
        TaskError: prompts longer than allowed (all of them), or chat messages and no chat template.
    """
    lengths: dict[str, int] = {}
    faults = RowFaults(task.name)
    for example in task.examples:
        if isinstance(example.prompt, str):
            tokens = tokenizer(example.prompt)["input_ids"]
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise TaskError(
                    f"prompts of task '{task.name}' are chat messages: expected a tokenizer with a chat template, got "
                    f"none in '{tokenizer.name_or_path}'. Set as_chat to false for a base model, or add a template."
                )
            try:
                text = tokenizer.apply_chat_template(
                    example.prompt, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
                )
            except Exception as error:  # a template is a program: it may raise anything
                raise TaskError(
                    f"the chat template of '{tokenizer.name_or_path}' cannot write the prompt of example '{example.id}'"
                    + (f" with {dict(chat_template_kwargs)}" if chat_template_kwargs else "")
                    + f": {type(error).__name__}: {error}. Mend the template, or what it is given (--chat_template_kwargs, "
                    "--system_prompt)."
                ) from error
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        lengths[example.id] = len(tokens)
        if max_prompt_length is not None and len(tokens) > max_prompt_length:
            origin = f"{example.metadata.get(ORIGIN, task.name)} (id {example.id})"
            fix = "Raise max_prompt_length, or shorten or remove the row."
            faults.add(origin, f"at most {max_prompt_length} prompt tokens", str(len(tokens)), fix)
    faults.raise_if_any()
    return lengths


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
            self._seen |= dict.fromkeys(name for name, value in row.items() if value is not None)

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
        if column not in self._seen:
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
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                yield number, _BadRow("UTF-8 text", f"other bytes ({error.reason})", "Save the file as UTF-8.")
            except (json.JSONDecodeError, RecursionError) as error:
                shown = text.strip()[:60]
                yield number, _BadRow("one JSON object a line", f"{shown!r} ({error})", "Correct the line.")


def _json_file(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        is_array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TaskError(f"'{path}': expected a JSON array of objects, got invalid JSON ({error}).") from error
    yield from enumerate(rows, start=1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
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
    yield from enumerate(dataset, start=1)


def _to_example(row: Any, source: str, number: int, columns: Mapping[str, str | None]) -> Example | _BadRow:
    if not isinstance(row, dict):
        return _BadRow("an object with a prompt", _kind(row), 'Write {"prompt": …, "answer": …}.')
    row = {name: value for name, value in row.items() if value is not None}
    names = _prompt_columns(columns)
    present = [name for name in names if name in row]
    if len(present) != 1:
        got = f"both {' and '.join(map(repr, present))}" if present else f"columns {sorted(row)}"
        fix = "Keep one of them" if present else "Rename the column that has the question"
        expected = f"the prompt in one of the columns {', '.join(names)}"
        return _NoPrompt(expected, got, f"{fix}, or name it with task_args '{{\"prompt_column\": …}}'.")
    prompt = row.pop(present[0])
    fault = _prompt_fault(prompt)
    if fault:
        return _BadRow(*fault)
    answer_column = columns["answer_column"] or "answer"
    answer = row.pop(answer_column, None)
    if answer is None and answer_column == "answer" and isinstance(row.get("solution"), str):
        answer = extract_boxed(row["solution"])
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        fix = "Write the final answer as one string."
        return _BadRow(f"text or a number in '{answer_column}'", _kind(answer), fix)
    identity = row.pop("id", f"{Path(source).name}:{number}")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        return _BadRow("text or a whole number in 'id'", _kind(identity), "Change it, or drop the column.")
    plain = plain_answer(str(answer)) if answer is not None else ""
    return Example(str(identity), prompt, plain or None, {**row, ORIGIN: f"{source} row {number}"})


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


def _check_answers(examples: list[Example], answers_required: bool, column: str, faults: RowFaults) -> None:
    having = next((example for example in examples if example.answer is not None), None)
    if not answers_required and having is None:
        return
    for example in examples:
        if example.answer is None:
            why = "" if answers_required or having is None else f", as {having.metadata[ORIGIN]} has"
            fix = "Add the answer; without accuracy, rows may lack it, but then all of them."
            faults.add(str(example.metadata[ORIGIN]), f"a reference answer in '{column}'{why}", "none", fix)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def question_key(prompt: Prompt) -> str:
    """A prompt as text that is equal for equal questions (space at the ends aside)."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
