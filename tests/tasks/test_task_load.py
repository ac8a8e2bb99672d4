"""load_task: determinism, disjoint splits, prompts as configured, errors that help."""

from __future__ import annotations

import json
import random

import pytest

from effopd.errors import ConfigError, TaskError
from effopd.tasks import Example, Task, TaskConfig, check_sources, check_verifier, load_task, needs_network
from effopd.tasks.kinds import TASK_KINDS, TaskKind
from effopd.tasks.load import choose, instruction
from effopd.tasks.rows import question_key

GYM = "reasoning-gym:basic_arithmetic"


@pytest.fixture
def math_file(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n}+{n}?", "answer": str(2 * n)}) + "\n" for n in range(50)))
    return str(file)


@pytest.fixture(params=["gym", "narrow gym", "math"])
def config(request, math_file):
    narrow = {"max_digits": 1, "max_terms": 2, "operators": ["+"], "allow_parentheses": False, "allow_negation": False}
    return {
        "gym": TaskConfig(GYM, train_size=40, eval_size=20),
        "narrow gym": TaskConfig(GYM, narrow, train_size=40, eval_size=20),
        "math": TaskConfig(f"math:{math_file}", train_size=30, eval_size=20),
    }[request.param]


def questions(task):
    return [question_key(example.prompt) for example in task.examples]


def test_splits_are_deterministic_disjoint_and_of_the_asked_size(config):
    train, held_out = load_task(config, "train"), load_task(config, "eval")
    assert (len(train), len(held_out)) == (config.train_size, config.eval_size)
    assert train.examples == load_task(config, "train").examples
    assert held_out.examples == load_task(config, "eval").examples
    everything = questions(train) + questions(held_out)
    assert len(set(everything)) == len(everything)
    assert train.verifiable and train.name == config.task
    config.train_size = 5
    assert load_task(config, "eval").examples == held_out.examples
    config.task_seed = 1
    assert questions(load_task(config, "eval")) != questions(held_out)


def test_repeated_questions_stay_on_one_side(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"prompt": f"question {n % 10}", "answer": str(n % 10)}) for n in range(100)]
    file.write_text("\n".join(rows))
    config = TaskConfig(f"math:{file}", eval_size=3)
    train, held_out = load_task(config, "train"), load_task(config, "eval")
    assert len(held_out) == 3 and len(train) == 70
    assert not set(questions(train)) & set(questions(held_out))
    assert "27 rows" in caplog.text


def test_eval_task_is_kept_out_of_training(tmp_path, math_file):
    other = tmp_path / "test.jsonl"
    other.write_text('{"q": "3+3?", "answer": "6"}\n{"q": "new?", "answer": "1"}\n')
    config = TaskConfig(f"math:{math_file}", eval_task=f"math:{other}", eval_task_args={"prompt_column": "q"})
    assert len(load_task(config, "eval")) == 2 and load_task(config, "eval").name == f"math:{other}"
    assert len(load_task(config, "train")) == 49


@pytest.mark.parametrize("other", ["3+3?", " 3+3?\n", [{"content": "3+3? ", "role": "user", "name": None}]])
@pytest.mark.parametrize("own", ["3+3?", [{"role": "user", "content": "3+3?"}]])
def test_an_evaluation_question_in_another_form_is_kept_out_of_training(tmp_path, own, other):
    rows = [{"prompt": own, "answer": "6"}, {"prompt": "1+1?", "answer": "2"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": other, "answer": "6"}))
    config = TaskConfig(f"math:{tmp_path / 'train.jsonl'}", eval_task=f"math:{tmp_path / 'test.jsonl'}")
    assert [example.answer for example in load_task(config, "train").examples] == ["2"]


def test_questions_of_chats_with_several_messages():
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "a"}
    assert question_key([system, user]) == question_key([system | {"name": None}, user | {"content": " a"}])
    assert question_key([system, user]) != question_key([user]) == question_key("a")


def test_sources_are_looked_for_without_reading_or_network(math_file, tmp_path):
    (tmp_path / "rows.csv").touch()
    check_sources(TaskConfig("math:org/set", eval_task=f"math:{math_file}"))
    check_sources(TaskConfig("testbed:chain_sum"))
    for config, message in (
        (TaskConfig("testbed:chain_smu"), "expected one of chain_sum"),
        (TaskConfig("math:nowhere.jsonl"), "no such file"),
        (TaskConfig(GYM, eval_task="code:nowhere.parquet"), "no such file"),
        (TaskConfig(f"math:{tmp_path / 'rows.csv'}"), "expected a file ending in"),
    ):
        with pytest.raises(TaskError, match=message):
            check_sources(config)


def test_default_sizes(math_file):
    config = TaskConfig(f"math:{math_file}")
    assert (len(load_task(config, "train")), len(load_task(config, "eval"))) == (45, 5)
    config = TaskConfig(f"math:{math_file}", eval_size=0)
    assert len(load_task(config, "train")) == 50
    with pytest.raises(TaskError, match="eval_size=0: there is no eval split"):
        load_task(config, "eval")


def test_prompts_follow_the_config(math_file):
    def prompt(**settings):
        return load_task(TaskConfig(f"math:{math_file}", eval_size=1, **settings), "eval").examples[0].prompt

    text = prompt(as_chat=False)
    assert isinstance(text, str) and text.endswith("\\boxed{}.")
    question = text.partition("?")[0] + "?"
    assert prompt() == [{"role": "user", "content": text}]
    assert prompt(prompt_suffix="") == [{"role": "user", "content": question}]
    assert prompt(system_prompt="S")[0] == {"role": "system", "content": "S"}
    gym = load_task(TaskConfig(GYM, eval_size=1, as_chat=False), "eval").examples[0].prompt
    assert "<answer>" in gym


def test_chat_rows(tmp_path):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "2?"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": messages, "answer": "2"}))
    source = f"math:{tmp_path / 'chat.jsonl'}"
    (example,) = load_task(TaskConfig(source, prompt_suffix="!", eval_size=0), "train").examples
    assert example.prompt == [messages[0], {"role": "user", "content": "2?!"}]
    with pytest.raises(TaskError, match=r"chat.jsonl row 1: expected no system message"):
        load_task(TaskConfig(source, system_prompt="T", eval_size=0), "train")
    with pytest.raises(TaskError, match=r"chat.jsonl row 1: expected a text prompt"):
        load_task(TaskConfig(source, as_chat=False, eval_size=0), "train")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig("reasoning-gym:basic_arithmetics"), "Did you mean basic_arithmetic"),
        (TaskConfig(GYM, {"max_term": 3}), "Did you mean max_terms"),
        (TaskConfig(GYM, {"size": 3}), "train_size"),
        (TaskConfig(GYM, {"min_terms": 0}), "min_terms must be positive"),
        (TaskConfig(GYM, {"operators": 3}), "Correct task_args"),
        (TaskConfig("reasoning-gym:coin_flip", {"min_trials": 3, "max_trials": 3}), "distinct questions"),
    ],
)
def test_reasoning_gym_mistakes(config, message):
    with pytest.raises(TaskError, match=message):
        load_task(config, "train")


def test_too_few_rows_and_unknown_split(math_file):
    with pytest.raises(TaskError, match=r"expected 46 rows for the train split, got 45.*Lower train_size"):
        load_task(TaskConfig(f"math:{math_file}", train_size=46), "train")
    with pytest.raises(TaskError, match="expected 51 rows for the eval split, got 50"):
        load_task(TaskConfig(f"math:{math_file}", eval_size=51), "eval")
    with pytest.raises(TaskError, match="'test'"):
        load_task(TaskConfig(GYM), "test")


def test_rows_without_answers_load_when_none_are_needed(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    config = TaskConfig(f"math:{tmp_path / 'p.jsonl'}")
    task = load_task(config, "train", answers_required=False)
    assert len(task) == 1 and not task.verifiable
    with pytest.raises(TaskError, match="cannot be verified"):
        check_verifier(task)
    with pytest.raises(TaskError, match=r"no row of .*p\.jsonl has 'answer' \(columns: prompt\).* Because\.$"):
        load_task(config, "train", why="Because.")


def test_a_part_of_a_file_knows_how_much_there_is(math_file):
    assert load_task(TaskConfig(f"math:{math_file}"), "eval").available == 50
    assert load_task(TaskConfig(f"math:{math_file}"), "train").available == 45
    assert load_task(TaskConfig(GYM, eval_size=5), "eval").available is None


def test_only_hub_datasets_need_the_network(math_file):
    assert not needs_network(TaskConfig(GYM)) and not needs_network(TaskConfig(f"math:{math_file}"))
    assert not needs_network(TaskConfig("math:not-there.jsonl"))
    assert needs_network(TaskConfig("math:org/set")) and needs_network(TaskConfig(GYM, eval_task="math:org/set"))


def test_testbed_is_delegated(monkeypatch):
    def family_task(name, split, size, seed):
        rng = random.Random(f"{split}{seed}")
        return Task(name, tuple(Example(str(n), f"{split} {rng.random()}", "1") for n in range(size)), lambda *_: 0.0)

    monkeypatch.setattr("effopd.tasks.load.family_task", family_task)
    train = load_task(TaskConfig("testbed:toy", train_size=3), "train")
    assert len(train) == 3 and train.name == "testbed:toy" and train.examples[0].prompt.startswith("train ")
    with pytest.raises(TaskError, match="task_args"):
        load_task(TaskConfig("testbed:toy", {"a": 1}), "train")


def test_a_kind_of_another_package_has_splits_suffix_and_settings_of_every_task(monkeypatch):
    """Its rows are split like those of files, and its prompts are written like theirs."""

    def load(request):
        examples = [Example(str(n), f"{request.args['word']} {n}?", str(n)) for n in range(30)]
        chosen, available = choose(request, examples)
        return Task(request.name, chosen, lambda text, example: float(text == example.answer), available=available)

    monkeypatch.setitem(TASK_KINDS, "mine", TaskKind(load, "WORD", " In digits."))
    config = TaskConfig("mine:x", {"word": "which"}, train_size=20, eval_size=10, as_chat=False)
    train, held_out = load_task(config, "train"), load_task(config, "eval")
    assert (len(train), len(held_out), train.name) == (20, 10, "mine:x")
    assert not set(questions(train)) & set(questions(held_out))
    assert all(example.prompt == f"which {example.answer}? In digits." for example in train.examples)
    assert instruction("mine:x", None) == " In digits." and instruction("mine:x", "!") == "!"
    with pytest.raises(ConfigError, match="or 'mine:WORD', got 'other:x'"):
        TaskConfig("other:x")
    monkeypatch.setitem(TASK_KINDS, "mine", TaskKind(load, suffix=None))
    assert load_task(config, "train").examples[0].prompt.endswith("?")
    with pytest.raises(ConfigError, match="prompt_suffix: expected none for a mine task"):
        TaskConfig("mine:x", prompt_suffix="!")


def test_a_kind_that_trains_on_questions_of_the_evaluation_is_refused(monkeypatch):
    examples = tuple(Example(str(n), f"{n}?", str(n)) for n in range(4))
    monkeypatch.setitem(TASK_KINDS, "mine", TaskKind(lambda request: Task("x", examples, lambda *_: 0.0)))
    with pytest.raises(TaskError, match=r"mine:x.* got 4 that are.*Request\.excluded"):
        load_task(TaskConfig("mine:x"), "train")
