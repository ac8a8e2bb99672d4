"""Rows of math tasks: every kind of bad row is reported with its place, good ones read alike from
every format.
"""

from __future__ import annotations

import json

import pytest

from effopd.errors import TaskError
from effopd.tasks import Example, Task, check_prompt_lengths, read_math_rows
from effopd.tasks.row_faults import ORIGIN

GOOD = '{"prompt": "1+1?", "answer": "2"}'


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("line", "expected", "fix"),
    [
        ('{"prompt": ', "one JSON object", "Correct the line"),
        ("[1]", "an object with a prompt", "Write"),
        ('{"prompt": "a"}', "a reference answer", "Add the answer"),
        ('{"prompt": "a", "answer": " "}', "a reference answer", "Add the answer"),
        ('{"prompt": "a", "answer": null}', "a reference answer", "Add the answer"),
        ('{"prompt": " ", "answer": "2"}', "a prompt", "Fill it in"),
        ('{"prompt": 3, "answer": "2"}', "a prompt that is text", "Write text"),
        ('{"prompt": [], "answer": "2"}', "a prompt that is text", "ending with the user"),
        ('{"prompt": [{"role": "me", "content": "x"}], "answer": "2"}', "a prompt that is text", "ending with"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "2"}', "a prompt that", "ending with"),
        ('{"prompt": "a", "answer": ["2"]}', "text or a number in 'answer'", "one string"),
        ('{"prompt": "a", "answer": true}', "text or a number in 'answer'", "one string"),
        ('{"prompt": "a", "question": "b", "answer": "2"}', "one of the columns", "Keep one"),
        ('{"text": "a", "answer": "2"}', "one of the columns", "Rename"),
        (r'{"prompt": "cut \ud83d", "answer": "2"}', "text of whole characters", "Correct the text"),
        (r'{"prompt": [{"role": "user", "content": "\udc00"}], "answer": "2"}', "text of whole", "Correct the text"),
        (r'{"prompt": "a", "answer": "\ud83d"}', "text of whole characters in 'answer'", "Correct the text"),
        ('{"prompt": "a", "answer": "2", "id": 1.5}', "'id'", "remove the column"),
        ('{"prompt": "a", "answer": "2", "id": "rows.jsonl:1"}', "a unique id", "its own id"),
    ],
)
def test_bad_row_is_named_with_file_and_row(tmp_path, line, expected, fix):
    file = write(tmp_path / "rows.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(TaskError) as error:
        read_math_rows(file)
    message = str(error.value)
    assert message.startswith("1 bad row in")
    assert f"{file} row 3: expected {expected}" in message.replace("expected the prompt in ", "expected ").replace(
        "text or a whole number in ", ""
    )
    assert ", got " in message and fix in message


def test_all_bad_rows_are_collected_and_counted(tmp_path):
    file = write(tmp_path / "rows.jsonl", *["{"] * 25, GOOD, '{"prompt": "a"}')
    with pytest.raises(TaskError, match=r"^26 bad rows") as error:
        read_math_rows(file)
    assert "row 20: " in str(error.value) and "row 21: " not in str(error.value)
    assert "and 6 more" in str(error.value)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(TaskError, match="row 2: expected UTF-8"):
        read_math_rows(str(tmp_path / "rows.jsonl"))


def test_answers_all_or_none_when_not_required(tmp_path):
    none = write(tmp_path / "none.jsonl", '{"prompt": "a"}', '{"prompt": "b"}')
    assert [row.answer for row in read_math_rows(none, answers_required=False)] == [None, None]
    with pytest.raises(TaskError, match=r"no row of .* has 'answer'"):
        read_math_rows(none)
    mixed = write(tmp_path / "mixed.jsonl", GOOD, '{"prompt": "b"}')
    with pytest.raises(TaskError, match=r"row 2: expected a reference answer in 'answer', as .* row 1 has"):
        read_math_rows(mixed, answers_required=False)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
)
def test_chats_that_end_with_an_answer_are_no_prompts(row, tmp_path):
    """The column must not be suggested as the prompt: its rows end with the assistant."""
    source = write(tmp_path / "chats.jsonl", json.dumps(row))
    with pytest.raises(TaskError, match=f"chats in '{next(iter(row))}' end with an answer.*before it to 'prompt'"):
        read_math_rows(source, answers_required=False)


@pytest.mark.parametrize(
    ("row", "args", "message"),
    [
        (
            {"problem": "a", "solution": "2"},
            {},
            "has 'answer' (columns: problem, solution)"
            """. Name your column: --task_args '{"answer_column": "solution"}'. Because.""",
        ),
        (
            {"q": "a", "gold_answer": "2", "n": 1},
            {"prompt_column": "q", "answer_column": "gold"},
            "has 'gold' (columns: q, gold_answer, n)"
            """. Name your column: --task_args '{"prompt_column": "q", "answer_column": "gold_answer"}'.""",
        ),
        (
            {"problem": "a", "x": "2", "y": 1},
            {},
            """has 'answer' (columns: problem, x, y). Name your column: --task_args '{"answer_column": "…"}'.""",
        ),
        (
            {"text": "a", "answer": "2"},
            {},
            "has 'prompt' or 'problem' or 'question' (columns: text, answer)"
            """. Name your column: --task_args '{"prompt_column": "text"}'.""",
        ),
        (
            {"question": "a", "problem": "b", "answer": "2"},
            {},
            "has just one of 'problem' and 'question' (columns: question, problem, answer)"
            """. Name your column: --task_args '{"prompt_column": "problem"}'.""",
        ),
    ],
)
def test_a_mistake_of_every_row_is_said_once_with_the_remedy(tmp_path, row, args, message):
    file = write(tmp_path / "rows.jsonl", *[json.dumps(row)] * 40)
    with pytest.raises(TaskError) as error:
        read_math_rows(file, args, why="Because.")
    assert str(error.value).startswith(f"no row of {file} {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["none.jsonl", "rows.csv", "empty.jsonl", "broken.parquet", "broken.json"])
def test_unusable_files(tmp_path, name):
    if name != "none.jsonl":
        (tmp_path / name).write_text("[{" if "broken" in name else "")
    with pytest.raises(TaskError, match=name):
        read_math_rows(str(tmp_path / name))


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_a_field_of_one_object_are_refused_with_the_field(tmp_path, indent):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"data": [json.loads(GOOD)] * 2}, indent=indent))
    with pytest.raises(TaskError, match=r"got one object with the rows in 'data'.*\['data'\]"):
        read_math_rows(str(file))
    chat = {"prompt": [{"role": "user", "content": "1+1?"}], "answer": 2}
    file.write_text(json.dumps(chat))
    assert len(read_math_rows(str(file))) == 1


def test_formats_read_alike(tmp_path):
    from datasets import Dataset

    rows = [
        {"id": f"r{n}", "problem": f"{n}+1?", "answer": str(n + 1), "level": n, "note": "x" if n else None}
        for n in range(5)
    ]
    write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")

    def read(suffix):
        examples = read_math_rows(str(tmp_path / f"a.{suffix}"))
        assert examples[2].metadata[ORIGIN].endswith(f"a.{suffix} row 3")
        return [(e.id, e.prompt, e.answer, {k: v for k, v in e.metadata.items() if k != ORIGIN}) for e in examples]

    assert read("jsonl") == read("json") == read("parquet")
    assert read("jsonl")[0] == ("r0", "0+1?", "1", {"level": 0})


def test_answer_forms_and_columns(tmp_path):
    file = write(
        tmp_path / "rows.jsonl",
        r'{"question": "a", "answer": "So 3 + 4.\n#### 7"}',
        r'{"problem": "b", "solution": "thus \\boxed{\\frac{1}{2}}"}',
        r'{"prompt": "c", "answer": "$x$"}',
        '{"prompt": [{"role": "user", "content": "d"}], "answer": 4}',
    )
    rows = read_math_rows(file)
    assert [row.answer for row in rows] == ["7", r"\frac{1}{2}", "x", "4"]
    assert [row.id for row in rows] == [f"rows.jsonl:{n}" for n in (1, 2, 3, 4)]
    other = write(tmp_path / "other.jsonl", '{"q": "a", "prompt": "not this", "gold": "1"}')
    (row,) = read_math_rows(other, {"prompt_column": "q", "answer_column": "gold"})
    assert (row.prompt, row.answer, row.metadata["prompt"]) == ("a", "1", "not this")
    with pytest.raises(TaskError, match="'split'"):
        read_math_rows(other, {"split": "test"})


@pytest.mark.parametrize("name", ["prompt_column", "answer_column"])
def test_names_of_columns_are_text(tmp_path, name):
    file = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(TaskError, match=rf"eval_task_args: {name}: expected the name .* as text, got list \['a'\]"):
        read_math_rows(file, {name: ["a"]}, setting="eval_task_args")


def test_several_splits_of_a_dataset_are_refused(monkeypatch):
    import datasets

    part = datasets.Dataset.from_list([{"question": "a", "answer": "1"}])
    for parts in (datasets.DatasetDict({"train": part, "test": part}), [part, part]):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, parts=parts, **__: parts)
        with pytest.raises(TaskError, match=r"expected one split, got 2.* Name one in task_args"):
            read_math_rows("org/set", {"split": None})


def test_hub_rows_and_their_failures(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **kwargs):
        asked.update(kwargs, path=path)
        if path == "no/such":
            raise FileNotFoundError("not on the Hub")
        return datasets.Dataset.from_list([{"question": "a", "answer": "1"}, {"question": "", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match="org/set row 2: expected a prompt"):
        read_math_rows("org/set", {"name": "main"})
    assert asked == {"path": "org/set", "name": "main", "split": "train"}
    with pytest.raises(TaskError, match=r"'no/such'.*not on the Hub"):
        read_math_rows("no/such")


class _Tokenizer:
    """One token a character; the chat template adds four."""

    chat_template: str | None = "yes"
    name_or_path = "tiny"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text)}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **kwargs):
        return "<u>" + messages[-1]["content"] + ">" + kwargs.get("tail", "")


def test_prompt_lengths_count_the_template_and_name_rows():
    chat = [{"role": "user", "content": "abcd"}]
    task = Task("t", (Example("a", "abcd", metadata={ORIGIN: "f row 1"}), Example("b", chat)), lambda *_: 0.0)
    assert check_prompt_lengths(task, _Tokenizer(), None) == {"a": 4, "b": 8}
    assert check_prompt_lengths(task, _Tokenizer(), 10, {"tail": "!!"}) == {"a": 4, "b": 10}
    with pytest.raises(TaskError, match=r"1 bad row .*\n.*id b.*at most 7 prompt tokens, got 8"):
        check_prompt_lengths(task, _Tokenizer(), 7)
    with pytest.raises(TaskError, match=r"f row 1 \(id a\)"):
        check_prompt_lengths(task, _Tokenizer(), 3)
    plain = _Tokenizer()
    plain.chat_template = None
    with pytest.raises(TaskError, match="chat template"):
        check_prompt_lengths(task, plain, None)


@pytest.mark.parametrize(
    ("given", "fix"),
    [("promt_column", "Did you mean prompt_column?"), ("split", "Remove the others; they are for Hub")],
)
def test_an_unknown_setting_of_a_file_comes_back_with_what_was_meant(given, fix, tmp_path):
    with pytest.raises(TaskError) as error:
        read_math_rows(str(tmp_path / "rows.jsonl"), {given: "x"})
    assert f"got '{given}'. {fix}" in str(error.value)
