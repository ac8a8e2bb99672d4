"""Reference answers of every type, and fields inside of columns."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from effopd.errors import TaskError
from effopd.extrapolate.scorers.accuracy import training_task
from effopd.tasks import Example, MathVerifier, Task, check_verifier, read_math_rows
from effopd.tasks.math_grading import render_boxed
from effopd.tasks.reference import UnusableAnswer, reference_text

NUMBERS = [
    (0.00005, "0.00005"),
    (1e20, "100000000000000000000"),
    (1e-7, "0.0000001"),
    (8.0, "8.0"),
    (8, "8"),
    (-3, "-3"),
    (10**30, "1" + "0" * 30),
    (Decimal("12.50"), "12.50"),
    (Decimal("1E+3"), "1000"),
    (Fraction(1, 3), "1/3"),
    (np.float64(5e-5), "0.00005"),
    (np.float32(0.1), "0.1"),
    (np.float16(0.5), "0.5"),
    (np.int64(7), "7"),
    (np.array(2.5), "2.5"),
    (np.str_("x+1"), "x+1"),
    (torch.tensor(3), "3"),
    (torch.tensor(0.1), "0.1"),
    (" x ", "x"),
    ("1e-5", "1e-5"),
    ("nano", "nano"),
]
NO_ANSWERS = [
    None,
    float("nan"),
    float("inf"),
    -float("inf"),
    np.float32("nan"),
    np.float64("inf"),
    Decimal("NaN"),
    torch.tensor(float("nan")),
    "",
    " \n",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "+Infinity",
    "$nan$",
]
UNUSABLE = [True, np.bool_(True), ["2"], {"a": 1}, b"2", 10**5000, "1" * 5000, np.array([1.0, 2.0])]


@pytest.mark.parametrize(("value", "text"), NUMBERS, ids=repr)
def test_numbers_are_written_out(value, text):
    assert reference_text(value) == text


@pytest.mark.parametrize("value", NO_ANSWERS, ids=repr)
def test_what_is_no_answer(value):
    assert reference_text(value) is None


@pytest.mark.parametrize("value", UNUSABLE, ids=lambda value: type(value).__name__)
def test_what_cannot_be_one(value):
    with pytest.raises(UnusableAnswer):
        reference_text(value)


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.slow
def test_rows_with_numbers_are_graded_as_numbers(tmp_path):
    file = write(
        tmp_path / "rows.jsonl",
        '{"problem": "a", "answer": 0.00005}',
        '{"problem": "b", "answer": 1e20}',
        '{"problem": "c", "answer": 1e-02}',
        '{"problem": "d", "answer": 8}',
    )
    rows = read_math_rows(file)
    assert [row.answer for row in rows] == ["0.00005", "100000000000000000000", "0.01", "8"]
    verifier = MathVerifier()
    texts = ["5 \\times 10^{-5}", "10^{20}", "e-2", "8.0"]
    assert verifier.verify_batch([render_boxed(text) for text in texts], rows) == [1.0, 1.0, 0.0, 1.0]
    assert check_verifier(Task("t", rows, verifier, render_boxed)).checked == 4
    verifier.worker.close()


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", '"nan"', '" "', '"inf"', '"#### NaN"', '"$ $"'])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_no_number_is_a_bad_row(tmp_path, bad, suffix):
    rows = ['{"problem": "a", "answer": 1}', f'{{"problem": "b", "answer": {bad}}}']
    text = "\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]"
    with pytest.raises(
        TaskError, match=r"1 bad row in .*\n.*row 2: expected a reference answer in 'answer', got no answer: "
    ):
        read_math_rows(write(tmp_path / f"rows.{suffix}", text))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_number_too_long_to_read_is_a_bad_row(tmp_path, suffix):
    rows = ['{"problem": "a", "answer": 1}', f'{{"problem": "b", "answer": {"1" * 5000}}}']
    text = "\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]"
    with pytest.raises(
        TaskError, match=r"1 bad row .*\n.*row 2: expected a number of at most 4300 digits in 'answer'"
    ):
        read_math_rows(write(tmp_path / f"rows.{suffix}", text))
    fine = write(tmp_path / f"fine.{suffix}", text.replace("1" * 5000, '2, "other": ' + "1" * 5000))
    assert [row.answer for row in read_math_rows(fine)] == ["1", "2"]


def test_parquet_decimals_and_short_floats(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = {
        "decimal": pa.array([Decimal("0.50"), Decimal("3.00")], pa.decimal128(10, 2)),
        "short": pa.array([0.1, 2.5], pa.float32()),
        "long": pa.array([5e-5, 1e20], pa.float64()),
    }
    pq.write_table(pa.table({"prompt": ["a", "b"], **answers}), tmp_path / "rows.parquet")

    def read(column):
        return [row.answer for row in read_math_rows(str(tmp_path / "rows.parquet"), {"answer_column": column})]

    (first, _) = read_math_rows(str(tmp_path / "rows.parquet"), {"answer_column": "long"})
    assert first.metadata["short"] == 0.1 and isinstance(first.metadata["short"], float)
    assert read("decimal") == ["0.50", "3.00"]
    assert read("short") == ["0.1", "2.5"]
    assert read("long") == ["0.00005", "100000000000000000000"]


def verl_row(number):
    return {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": f"{number}+1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"index": number, "question": f"{number} plus 1?", "choices": ["a", "b"]},
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_fields_inside_of_columns_have_dotted_names(tmp_path, kind, monkeypatch):
    import datasets

    rows = [verl_row(n) for n in range(3)]
    source = str(tmp_path / f"rows.{kind}")
    if kind == "jsonl":
        write(tmp_path / "rows.jsonl", *rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(source)
    else:
        source = "org/set"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    read = read_math_rows(source, {"answer_column": "reward_model.ground_truth"})
    assert [row.answer for row in read] == ["1", "2", "3"]
    assert read[0].prompt == [{"role": "user", "content": "0+1?"}]
    assert read[0].metadata["data_source"] == "gsm8k"
    (first, *_) = read_math_rows(
        source, {"answer_column": "extra_info.choices.1", "prompt_column": "extra_info.question"}
    )
    assert (first.prompt, first.answer) == ("0 plus 1?", "b")
    with pytest.raises(TaskError) as error:
        read_math_rows(source)
    assert "reward_model.style, reward_model.ground_truth" in str(error.value)
    assert """--task_args '{"answer_column": "reward_model.ground_truth"}'""" in str(error.value)


def test_the_training_sets_own_answers_are_read_alike():
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a", "answer": 0.00005}, {"prompt": "b", "answer": float("nan")}])
    task = training_task(rows, lambda *_: 0.0)
    assert [example.answer for example in task.examples] == ["0.00005", None]
    wrong = datasets.Dataset.from_list([{"prompt": "a", "answer": ["1"]}])
    with pytest.raises(TaskError, match="row 0 of the training set: expected text or a number in 'answer', got list"):
        training_task(wrong, lambda *_: 0.0)


def test_an_answer_of_thousands_of_digits_is_wrong_not_an_error():
    verifier = MathVerifier()
    assert verifier(render_boxed("1" * 5000), Example("e", "?", "11")) == 0.0
    assert verifier.errors == verifier.timeouts == 0
    verifier.worker.close()
