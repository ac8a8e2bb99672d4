"""`Sampling`: checked when built, and every field of it is read."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers.tiny_models import make_task, make_tokenizer

from effopd.commands.evaluate import eval_parser
from effopd.commands.intervene_parser import intervene_parser
from effopd.errors import ConfigError
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.tasks.generate import generate
from effopd.tasks.sampling import Sampling

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if twice is defined %}1 + 1{% endif %}"
BASE = Sampling(max_new_tokens=8, n=2)
#: A change of each field that can be seen in the answers.
CHANGES = {
    "n": 3, "temperature": 0.1, "top_p": 0.1, "max_new_tokens": 3, "batch_size": 5, "seed": 1,
    "chat_template_kwargs": {"twice": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"n": 0}, {"max_new_tokens": 0}, {"batch_size": 2**31}, {"temperature": -1.0}, {"temperature": math.inf},
        {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"chat_template_kwargs": "[1]"}, {"n": 2, "temperature": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=f"--{next(iter(bad))}"):
        Sampling(**bad)


def test_json_text_is_taken_for_the_template():
    assert Sampling(chat_template_kwargs='{"a": 1}').template == {"a": 1} and Sampling().template == {}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
def test_every_field_reaches_the_answers(student, name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = [[{"role": "user", "content": example.prompt}] for example in make_task(6).examples]

    def answers(sampling):
        batches = []
        completions = generate(student, tokenizer, prompts, sampling, progress=batches.append)
        return completions, batches

    assert answers(BASE) == answers(BASE)
    assert answers(dataclasses.replace(BASE, **{name: CHANGES[name]})) != answers(BASE)


def test_several_answers_per_prompt_are_those_of_the_repeated_prompts(student, tokenizer, task):
    prompts = [example.prompt for example in task.examples]
    several = generate(student, tokenizer, prompts, BASE)
    repeated = [prompt for prompt in prompts for _ in range(2)]
    assert several == generate(student, tokenizer, repeated, dataclasses.replace(BASE, n=1))


def test_the_scorer_grades_all_answers_of_a_prompt(student, tokenizer):
    task = make_task(6)
    task = dataclasses.replace(task, verify=lambda completion, example: float(len(completion) % 2))
    score = AccuracyScorer(task, tokenizer, dataclasses.replace(BASE, n=4))(student)
    assert len(score.per_example) == 6 and {4 * share for share in score.per_example} <= set(range(5))
    assert any(share not in (0, 1) for share in score.per_example)


@pytest.mark.parametrize("parser", [eval_parser, intervene_parser])
def test_the_commands_take_their_flags_from_it(parser):
    assert Sampling in parser().dataclass_types
