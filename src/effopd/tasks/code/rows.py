"""Rows of code problems as examples, and their prompts; all bad rows are reported in one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effopd.errors import TaskError
from effopd.tasks.base import Example, Prompt
from effopd.tasks.code.shapes import Unrecognized, problem_of
from effopd.tasks.code.verifier import PROBLEM
from effopd.tasks.row_columns import check_names, field_of
from effopd.tasks.row_faults import ORIGIN, BadRow, RowFaults, kind_of
from effopd.tasks.row_files import read_rows
from effopd.tasks.rows import prompt_fault

#: Columns that can hold the question, in order of preference.
PROMPT_COLUMNS = ("prompt", "problem", "question", "question_content", "description", "text")
#: Columns that can hold the row's id.
_ID_COLUMNS = ("id", "task_id", "question_id", "problem_id")
_SHAPES = (
    "HumanEval (test, entry_point), MBPP (test_list), MBPP+ (test), TACO and APPS (input_output), DeepCoder (tests), "
    "Codeforces (official_tests, examples), CodeContests (public_tests), LiveCodeBench (public_test_cases) or "
    "Eurus-2-RL (reward_model.ground_truth)"
)

#: Templates of the sources: EvalPlus for HumanEval and MBPP+, Austin et al. for MBPP,
#: LiveCodeBench for the others.
_COMPLETE = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{question}\n```"
)
_MBPP = (
    "You are an expert Python programmer, and here is your task: {question}\nYour code should pass these tests:\n\n"
    "{tests}\n\nWrite the code in one markdown block that starts with ```python."
)
_MBPP_BASE = '"""\n{question}\n{tests}\n"""\n'
_FORMAT = "### Question:\n{question}\n\n### Format: "
_ANSWER = "\n\n### Answer: (use the provided format with backticks)\n\n"
_STARTER = _FORMAT + (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters.\n```python\n{starter}\n```"
) + _ANSWER  # fmt: skip
_FUNCTION = _FORMAT + (
    "Write the Python function `{entry}` and enclose your code within delimiters as follows.\n"
    "```python\n# YOUR CODE HERE\n```"
) + _ANSWER  # fmt: skip
_STDIN = _FORMAT + (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```"
) + _ANSWER  # fmt: skip


def read_code_rows(
    source: str, args: Mapping[str, Any] | None = None, *, keep: Sequence[str] = ()
) -> tuple[Example, ...]:
    """Examples of a local file or Hub dataset, in order, with the bare question as prompt.

    `Example.answer` is the reference program, where the source has a tested one (HumanEval, MBPP).
    The tests are in `Example.metadata`.

    Args:
        source: as for math rows.
        args: `prompt_column` for another column or dotted field; for Hub datasets also arguments of
            `load_dataset`.
        keep: further columns or nested fields to keep in the metadata.

    Raises:
        TaskError: rows are bad or have no tests in a known shape (the message lists them), there
            are no rows, or the source cannot be read.
    """
    args = dict(args or {})
    column = args.pop("prompt_column", None)
    check_names({"prompt_column": column})
    faults = RowFaults(source)
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for number, row in read_rows(source, args):
        origin = f"{source} row {number}"
        example = row if isinstance(row, BadRow) else _to_example(row, source, number, column)
        if isinstance(example, BadRow):
            faults.add(origin, *example.fault)
        elif example.id in seen:
            what = f"{example.id!r}, the id of row {seen[example.id]}"
            faults.add(origin, "a unique id", what, "Give each row its own id, or remove the column.")
        else:
            seen[example.id] = number
            kept = {name: value for name in keep if (value := field_of(row, name)) is not None}
            examples.append(replace(example, metadata={**example.metadata, **kept}) if kept else example)
    faults.raise_if_any()
    if not examples:
        raise TaskError(f"'{source}' has no rows: expected at least one with a prompt and tests. Check the source.")
    return tuple(examples)


def shapes_text(examples: Iterable[Example]) -> str:
    """Numbers of code rows by shape, most frequent first; "" if there are none."""
    shapes = Counter(example.metadata[PROBLEM]["shape"] for example in examples if PROBLEM in example.metadata)
    return ", ".join(f"{count} × {shape}" for shape, count in shapes.most_common())


def _to_example(row: Any, source: str, number: int, column: str | None) -> Example | BadRow:
    if not isinstance(row, dict):
        return BadRow("an object with a prompt and tests", kind_of(row), "Write one JSON object per row.")
    row = {name: value for name, value in row.items() if value is not None}
    names = (column,) if column else PROMPT_COLUMNS
    prompt = next((value for name in names if (value := field_of(row, name)) is not None), None)
    if prompt is None:
        expected = f"the question in one of the columns {', '.join(names)}"
        fix = "Rename the column with the question, or name it with task_args '{\"prompt_column\": …}'."
        return BadRow(expected, f"columns {sorted(row)}", fix)
    if (fault := prompt_fault(prompt)) is not None:
        return BadRow(*fault)
    try:
        problem = problem_of(row)
    except Unrecognized as error:
        return BadRow(f"tests in the columns of {_SHAPES}", str(error), "Rename or correct the row's columns.")
    identity = next((row[name] for name in _ID_COLUMNS if name in row), f"{Path(source).name}:{number}")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        return BadRow("text or a whole number as id", kind_of(identity), "Change it, or remove the column.")
    if isinstance(row.get("starter_code"), str) and row["starter_code"].strip():
        problem["starter"] = row["starter_code"]
    metadata = {PROBLEM: problem, ORIGIN: f"{source} row {number}"}
    return Example(str(identity), _question(prompt, row), _reference(row, problem), metadata)


def _question(prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
    """The question; Codeforces rows keep its parts in several columns."""
    if not isinstance(prompt, str) or not isinstance(row.get("input_format"), str):
        return prompt
    parts = [prompt, f"Input\n{row['input_format']}"]
    if isinstance(row.get("output_format"), str):
        parts.append(f"Output\n{row['output_format']}")
    for pair in row["examples"] if isinstance(row.get("examples"), list) else []:
        if isinstance(pair, dict):
            parts.append(f"Example input\n{pair.get('input', '')}\nExample output\n{pair.get('output', '')}")
    return "\n\n".join(parts)


def _reference(row: Mapping[str, Any], problem: Mapping[str, Any]) -> str | None:
    """A reference program that the source has tested; `None`: there is none."""
    if isinstance(row.get("canonical_solution"), str):
        return problem.get("before", "") + row["canonical_solution"]
    return row["code"] if isinstance(row.get("code"), str) and "entry" in problem else None


def render_program(program: str) -> str:
    """Completion with a program in a fenced block."""
    return f"```python\n{program}\n```"


def with_template(example: Example, as_chat: bool) -> Example:
    """The example with the question in the template of its source. Chat prompts are not changed.

    Without chat, functions are prompts to complete: the code itself for HumanEval, a docstring for
    MBPP.
    """
    if not isinstance(example.prompt, str):
        return example
    problem = example.metadata[PROBLEM]
    question, entry = example.prompt, ", ".join(problem.get("entry", ()))
    tests = "\n".join(problem.get("shown", ()))
    if problem.get("before"):
        prompt = _COMPLETE.format(question=question.rstrip()) if as_chat else question
    elif tests and problem["shape"] == "MBPP" and as_chat:
        prompt = _MBPP.format(question=question, tests=tests)
    elif tests:
        prompt = _MBPP_BASE.format(question=question, tests=tests)
        prompt = _COMPLETE.format(question=prompt.rstrip()) if as_chat else prompt
    elif problem.get("starter"):
        prompt = _STARTER.format(question=question, starter=problem["starter"])
    elif entry:
        prompt = _FUNCTION.format(question=question, entry=entry)
    else:
        prompt = _STDIN.format(question=question)
    return replace(example, prompt=prompt)
