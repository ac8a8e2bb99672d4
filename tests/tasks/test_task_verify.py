"""Verifiers: math equivalence, the hard time limit, equality with reasoning-gym, the user's own,
the check.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

import pytest

from effopd.errors import TaskError
from effopd.tasks import (
    Example,
    MathVerifier,
    ReasoningGymVerifier,
    Task,
    TaskConfig,
    check_score,
    check_verifier,
    extract_boxed,
    load_task,
    load_verifier,
)
from effopd.tasks.math_grading import render_boxed
from effopd.tasks.worker import GradingWorker

HANG = r"\boxed{9^{9^{9^{9}}}}"


def example(answer, identity="e"):
    return Example(identity, "?", answer)


@pytest.fixture(scope="module")
def verifier():
    built = MathVerifier(timeout=3.0)
    yield built
    built.worker.close()


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"{ \boxed {3} and \boxed{4", "3"),
        (r"\boxed{", None),
        ("the answer is 4", None),
    ],
)
def test_extract_boxed(text, boxed):
    assert extract_boxed(text) == boxed


def test_extract_boxed_is_linear():
    assert extract_boxed(r"\boxed{" * 1_000_000) is None  # looking for each one's end would take hours


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("1/2", r"\frac12", 1.0),
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", "1/2", 1.0),
        ("0.5", r"\frac{2}{4}", 1.0),
        ("$1,234$", "1234", 1.0),
        (r"so \boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        ("x^2+1", "1+x^2", 1.0),
        (r"\text{Tuesday}", "Tuesday", 1.0),
        ("1/2", r"\frac13", 0.0),
        ("2", "-2", 0.0),
        ("(1,2)", "(2,1)", 0.0),
        ("2", "", 0.0),
        ("2", r"\frac{", 0.0),
    ],
)
def test_math_equivalence(verifier, gold, answer, score):
    assert verifier(f"Thus \\boxed{{{answer}}}.", example(gold)) == score


def test_only_the_box_counts(verifier):
    assert verifier("The answer is 4", example("4")) == 0.0
    assert verifier(r"\boxed{4} no, \boxed{5}", example("4")) == 0.0
    with pytest.raises(TaskError, match="example 'e'"):
        verifier(r"\boxed{4}", example(None))


@pytest.mark.slow
def test_a_hanging_grading_is_cut_counted_and_does_not_hurt_the_next(caplog):
    verifier = MathVerifier(timeout=2.0)
    verifier(r"\boxed{\frac12}", example("0.5"))
    process = verifier.worker._process
    texts = [r"\boxed{\frac12}", HANG, r"\boxed{1/2}", r"\boxed{1/3}"]
    assert verifier.verify_batch(texts, [example("0.5", f"row {n}") for n in range(4)]) == [1.0, 0.0, 1.0, 0.0]
    assert (verifier.timeouts, verifier.errors) == (1, 0)
    assert process.returncode is not None, "the killed process was reaped"
    assert verifier(HANG, example("0.5")) == 0.0
    assert verifier.timeouts == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "row 1" in caplog.text
    verifier.worker.close()


@pytest.mark.slow
def test_limit_holds_outside_the_main_thread():
    verifier, scores = MathVerifier(timeout=0.5), []
    thread = threading.Thread(target=lambda: scores.extend(verifier.verify_batch([HANG], [example("1")])))
    thread.start()
    thread.join(30)
    assert scores == [0.0] and verifier.timeouts == 1
    verifier.worker.close()


def test_one_process_grades_a_batch_like_single_calls(verifier):
    texts = [f"\\boxed{{\\frac{{{n}}}{{7}}}}" for n in range(200)]
    examples = [example(f"{n + n % 2}/7") for n in range(200)]
    verifier(texts[0], examples[1])
    process = verifier.worker._process.pid
    batch = verifier.verify_batch(texts, examples)
    assert verifier.worker._process.pid == process
    assert batch == [float(n % 2 == 0) for n in range(200)]
    assert batch[:5] == [verifier(text, row) for text, row in zip(texts[:5], examples[:5], strict=True)]


def test_exact_match_needs_no_process():
    verifier = MathVerifier()
    assert verifier(render_boxed("x+1"), example("x+1")) == 1.0
    assert verifier.worker._process is None


def test_picklable(verifier):
    copy = pickle.loads(pickle.dumps(verifier))
    assert copy(r"\boxed{0.5}", example("1/2")) == 1.0
    assert copy.worker._process.pid != verifier.worker._process.pid
    pid = copy.worker._process.pid
    del copy
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_no_process_outlives_its_owner():
    script = (
        "from effopd.tasks import Example, MathVerifier\n"
        "v = MathVerifier()\nv(r'\\boxed{2}', Example('e', '?', '3'))\nprint(v.worker._process.pid)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_worker_counts_failures_and_reports_a_failed_start(caplog):
    worker = GradingWorker("math:sqrt", 5.0)
    assert worker.score_many([(0.25,), (-1.0,), (-1.0,), (1.0,)], list("abcd")) == [0.5, 0.0, 0.0, 1.0]
    assert worker.errors == 2 and len(caplog.records) == 1 and "example b" in caplog.text
    dying = GradingWorker("os:_exit", 5.0)
    assert "died" in dying.grade_many([(3,)])[0].problem
    with pytest.raises(TaskError, match="no_such_module"):
        GradingWorker("no_such_module:f", 5.0).grade_many([()])
    worker.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic_arithmetic", "countdown", "leg_counting", "word_ladder"])
def test_reasoning_gym_scores_are_the_librarys(name):
    import reasoning_gym
    from reasoning_gym.utils import extract_answer

    task = load_task(TaskConfig(f"reasoning-gym:{name}", eval_size=3), "eval")
    library = reasoning_gym.create_dataset(name, size=1, seed=0)
    for row in task.examples:
        for answer in (row.answer, f"about {row.answer}", "12", "foo"):
            completion = f"<answer>0</answer> hm <answer> {answer}\n</answer> done <answer>"
            expected = library.score_answer(extract_answer(completion), row.metadata["entry"])
            assert task.verify(completion, row) == expected
        assert task.verify(f"{row.answer}", row) == 0.0
    assert check_verifier(task).checked == 3


def test_reasoning_gym_needs_its_entry():
    with pytest.raises(TaskError, match="'entry'"):
        ReasoningGymVerifier("countdown")("<answer>1</answer>", example("1"))


@pytest.mark.slow
def test_reasoning_gym_without_reference_answers():
    task = load_task(TaskConfig("reasoning-gym:graph_color", eval_size=2), "eval")
    assert task.verifiable and not task.has_answers
    assert check_verifier(task).unchecked == 2


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_user_verifier_from_the_current_directory(user_module, tmp_path):
    user_module("mine_ok", "def grade(completion, example):\n    return float(example.answer in completion)\n")
    before = list(sys.path)
    assert load_verifier("mine_ok:grade")("it is 4", example("4")) == 1.0
    assert sys.path == before
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n{"prompt": "1+1?", "answer": "2"}')
    task = load_task(TaskConfig("math:rows.jsonl", verifier="mine_ok:grade"), "train")
    assert check_verifier(task).checked == 1 and task.verify("4 or 2", task.examples[0]) == 1.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine_a", None, "importable module 'mine_a'"),
        ("mine_b", "import no_such_package", "no_such_package"),
        ("mine_c", "1/0", "ZeroDivisionError"),
        ("mine_d", "def score(completion, example): ...", "Functions there: score"),
        ("mine_e", "grade = 3", "expected a function, got int"),
        ("mine_f", "def grade(completion): ...", r"grade\(completion\)"),
    ],
)
def test_user_verifier_mistakes(user_module, name, text, message):
    if text is not None:
        user_module(name, text)
    with pytest.raises(TaskError, match=message):
        load_verifier(f"{name}:grade")


def test_a_function_that_a_module_without_a_file_lacks():
    with pytest.raises(TaskError, match="expected a function 'grade' in the module sys, got none"):
        load_verifier("sys:grade")


def test_verifier_check_catches_what_does_not_discriminate():
    rows = (example("1", "a"), example("2", "b"))

    def check(verify):
        return check_verifier(Task("t", rows, verify, render_boxed))

    assert check(lambda text, row: float(text == render_boxed(row.answer))).checked == 2
    assert check_verifier(Task("t", rows, MathVerifier(), render_boxed)).checked == 2
    with pytest.raises(TaskError, match="does not tell right from wrong on example 'a'"):
        check(lambda text, row: 1.0)
    with pytest.raises(TaskError, match="does not tell right from wrong"):
        check(lambda text, row: 0.0)
    with pytest.raises(TaskError, match="does not tell right from wrong"):
        check(lambda text, row: float("boxed" in text))
    with pytest.raises(TaskError, match="raised IndexError"):
        check(lambda text, row: [][0])


@pytest.mark.parametrize("value", [None, float("nan"), -0.1, 1.1, "1", [1.0], float("inf")])
def test_wrong_score_types_name_the_example(value):
    with pytest.raises(TaskError, match="example 'e'"):
        check_score(value, example("1"), "t")
    with pytest.raises(TaskError, match="example 'e'"):
        check_verifier(Task("t", (example("1"),), lambda *_: value))


def test_scores_that_count():
    import numpy

    assert [check_score(v, example("1"), "t") for v in (1, True, 0.5, numpy.float32(0.5))] == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.slow
def test_importing_is_not_part_of_a_gradings_limit(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = GradingWorker("math:sqrt", 1.0, imports=("slow_to_import",))
    assert worker.score_many([(0.25,)], ["a"]) == [0.5] and worker.timeouts == 0
    assert pickle.loads(pickle.dumps(worker)).imports == ("slow_to_import",)
    worker.close()
