"""Rows of math problems as examples; all bad rows are reported in one error.

Columns of a row:

    prompt, problem or question   the question, as text or chat messages; exactly one of the three
    answer                        reference answer; or the `\\boxed{}` in `solution`
    id                            optional
    others                        stored in the example's metadata

A field inside a column has a dotted name, such as `reward_model.ground_truth` in verl's rows.
Bad rows are never dropped: one `TaskError` lists their file and row numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.base import Example, Prompt
from effopd.tasks.math_grading import extract_boxed, plain_answer
from effopd.tasks.reference import WHOLE, UnusableAnswer, half_character, reference_text
from effopd.tasks.row_columns import COLUMN_ARGS, Columns, check_names, field_of, prompt_columns
from effopd.tasks.row_faults import ORIGIN, BadRow, Fault, NoPrompt, RowFaults, kind_of
from effopd.tasks.row_files import read_rows

_ROLES = ("system", "user", "assistant", "tool")


def read_math_rows(
    source: str,
    args: Mapping[str, Any] | None = None,
    *,
    answers_required: bool = True,
    why: str = "",
    setting: str = "task_args",
) -> tuple[Example, ...]:
    """Examples of a local file or Hub dataset, in order, with the bare question as prompt.

    Args:
        source: path ending in .jsonl, .json (an array, or one object per line) or .parquet;
            otherwise a folder or Hub id.
        args: `prompt_column` and `answer_column` for other columns or dotted fields; for Hub
            datasets also arguments of `load_dataset` (`split` defaults to "train").
        answers_required: whether every row must have an answer. If `False`, either all rows have
            an answer or none does.
        why: sentence for the error message about the feature that needs the answers.
        setting: name of the setting that holds `args`, for messages.

    Raises:
        TaskError: rows are bad (the message lists them), there are no rows, or the source cannot be
            read.
    """
    args = dict(args or {})
    columns = {name: args.pop(name, None) for name in COLUMN_ARGS}
    check_names(columns, setting)
    faults, table = RowFaults(source), Columns(source, columns, setting)
    examples: list[Example] = []
    first_row_of: dict[str, int] = {}
    unusable: dict[str, Any] = {}
    for number, row in read_rows(source, args):
        origin = f"{source} row {number}"
        example = row if isinstance(row, BadRow) else _to_example(row, source, number, columns)
        table.add(row, example)
        if isinstance(example, BadRow):
            faults.add(origin, *example.fault)
            continue
        if example.id in first_row_of:
            what = f"{example.id!r}, the id of row {first_row_of[example.id]}"
            faults.add(origin, "a unique id", what, "Give each row its own id, or remove the column.")
            continue
        first_row_of[example.id] = number
        examples.append(example)
        if example.answer is None:
            unusable[example.id] = field_of(row, columns["answer_column"] or "answer")
    table.check_prompts()
    if answers_required and examples and all(one.answer is None for one in examples):
        table.check_answers(why)
    _check_answers(examples, answers_required, columns["answer_column"] or "answer", faults, unusable)
    faults.raise_if_any()
    if not examples:
        raise TaskError(
            f"'{source}' has no rows: expected at least one with a prompt. Check that it is the right source."
        )
    return tuple(examples)


def _to_example(row: Any, source: str, number: int, columns: Mapping[str, str | None]) -> Example | BadRow:
    if not isinstance(row, dict):
        return BadRow("an object with a prompt", kind_of(row), 'Write {"prompt": …, "answer": …}.')
    row = {name: value for name, value in row.items() if value is not None}
    names = prompt_columns(columns)
    present = [name for name in names if field_of(row, name) is not None]
    if len(present) != 1:
        got = f"both {' and '.join(map(repr, present))}" if present else f"columns {sorted(row)}"
        fix = "Keep one of them" if present else "Rename the column with the question"
        expected = f"the prompt in one of the columns {', '.join(names)}"
        return NoPrompt(expected, got, f"{fix}, or name it with task_args '{{\"prompt_column\": …}}'.")
    prompt = field_of(row, present[0])
    row.pop(present[0], None)
    fault = prompt_fault(prompt)
    if fault:
        return BadRow(*fault)
    answer_column = columns["answer_column"] or "answer"
    answer = field_of(row, answer_column)
    row.pop(answer_column, None)
    if answer is None and answer_column == "answer" and isinstance(row.get("solution"), str):
        answer = extract_boxed(row["solution"])
    try:
        text = reference_text(answer)
        text = reference_text(plain_answer(text)) if text is not None else None
    except UnusableAnswer as error:
        return BadRow(f"{error} in '{answer_column}'", kind_of(answer), error.fix)
    identity = row.pop("id", f"{Path(source).name}:{number}")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        return BadRow("text or a whole number in 'id'", kind_of(identity), "Change it, or remove the column.")
    return Example(str(identity), prompt, text, {**row, ORIGIN: f"{source} row {number}"})


def prompt_fault(prompt: Any) -> Fault | None:
    """Fault of a prompt that is neither text nor chat messages; `None`: it is usable."""
    if isinstance(prompt, str):
        if not prompt.strip():
            return "a prompt", f"the empty text {prompt!r}", "Fill it in or remove the row."
        return _halved(prompt)
    expected = "a prompt that is text or a list of chat messages"
    fix = 'Write text, or [{"role": "user", "content": "…"}] ending with the user.'
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return expected, kind_of(prompt), fix
    for message in prompt:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            return expected, f"the message {str(message)[:60]}", fix
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        return expected, "a list that does not end with a user message with text", fix
    return next((fault for message in prompt if (fault := _halved(message["content"])) is not None), None)


def _halved(text: str) -> Fault | None:
    """Fault of a text with half of a character, which no tokenizer reads; `None`: it has none."""
    half = half_character(text)
    return None if half is None else (WHOLE, f"half of a character, {half!r}", "Correct the text or remove the row.")


def _check_answers(
    examples: list[Example], answers_required: bool, column: str, faults: RowFaults, unusable: Mapping[str, Any]
) -> None:
    having = next((example for example in examples if example.answer is not None), None)
    if not answers_required and having is None:
        return
    for example in examples:
        if example.answer is None:
            why = "" if answers_required or having is None else f", as {having.metadata[ORIGIN]} has"
            fix = "Add the answer. Without accuracy, answers can be left out of all rows."
            value = unusable.get(example.id)
            got = "none" if value is None else f"no answer: {kind_of(value)}"
            faults.add(str(example.metadata[ORIGIN]), f"a reference answer in '{column}'{why}", got, fix)


def question_key(prompt: Prompt) -> str:
    """Key of a prompt, equal for equal questions, whether text or a chat of one message.

    Ignores leading and trailing spaces, and fields of messages that are `None`, as Parquet files
    have them. Messages of the system are part of the question.
    """
    if isinstance(prompt, str):
        return prompt.strip()
    if len(prompt) == 1:
        return prompt[0]["content"].strip()
    chat = [
        {name: text.strip() if isinstance(text, str) else text for name, text in message.items() if text is not None}
        for message in prompt
    ]
    return json.dumps(chat, sort_keys=True)
