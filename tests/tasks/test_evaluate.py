"""Generation, grading and intervals."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_model, make_task
from scipy import stats

from effopd.common.statistics import accuracy_interval
from effopd.errors import ConfigError, TaskError
from effopd.tasks.base import Example, Task
from effopd.tasks.evaluate import evaluate, pass_at_k
from effopd.tasks.generate import generate
from effopd.tasks.sampling import Sampling


def prompts(task):
    return [example.prompt for example in task.examples]


def test_same_seed_same_answers_and_the_callers_random_state_is_untouched(student, tokenizer, task):
    state, python = torch.get_rng_state(), random.getstate()
    first = generate(student, tokenizer, prompts(task), Sampling(max_new_tokens=6, seed=3))
    second = generate(student, tokenizer, prompts(task), Sampling(max_new_tokens=6, seed=3))
    other = generate(student, tokenizer, prompts(task), Sampling(max_new_tokens=6, seed=4))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert student.training


def test_every_submodule_keeps_its_mode(student, tokenizer, task):
    student.train()
    student.model.layers[0].eval()  # a part that is meant to stay frozen
    modes = [module.training for module in student.modules()]
    generate(student, tokenizer, prompts(task)[:2], Sampling(max_new_tokens=2, seed=0))
    assert [module.training for module in student.modules()] == modes


def test_common_random_numbers_couple_nearby_models(student, tokenizer):
    """Under the same seed a slightly moved model gives mostly the same answers; under another seed
    it does not.
    """
    task = make_task(32)
    moved = make_model(0)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.001)
    runs = [
        generate(model, tokenizer, prompts(task), Sampling(max_new_tokens=6, seed=seed))
        for model, seed in ((student, 0), (moved, 0), (moved, 1))
    ]
    same = [sum(a.completion_ids == b.completion_ids for a, b in zip(runs[0], run, strict=True)) for run in runs[1:]]
    assert same[0] > 24 > 8 > same[1]


def test_greedy_equals_a_plain_loop(student, tokenizer, task):
    student.eval()
    for completion in generate(student, tokenizer, prompts(task)[:4], Sampling(max_new_tokens=5, temperature=0)):
        ids = list(completion.prompt_ids)
        for token in completion.completion_ids:
            with torch.no_grad():
                assert int(student(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_completions_end_at_the_first_end_token(student, tokenizer, task):
    completions = generate(student, tokenizer, prompts(task), Sampling(max_new_tokens=12, seed=0))
    assert {c.truncated for c in completions} == {True, False}
    for c in completions:
        assert c.truncated == (tokenizer.eos_token_id not in c.completion_ids)
        assert tokenizer.eos_token_id not in c.completion_ids[:-1]


def test_evaluate_counts(student, tokenizer, task):
    result = evaluate(student, tokenizer, task, Sampling(max_new_tokens=6, n=4, seed=0))
    flat = list(itertools.chain(*result.correct))
    summary = result.summary()
    assert len(flat) == 4 * len(task)
    assert summary["avg@4"] == pytest.approx(sum(flat) / len(flat)) == summary["pass@1"]
    assert summary["pass@1"] <= summary["pass@2"] <= summary["pass@4"]
    assert summary["pass@4"] == pytest.approx(sum(any(row) for row in result.correct) / len(task))
    assert summary["ci95_low"] <= summary["avg@4"] <= summary["ci95_high"]
    rows = list(result.rows())
    assert [row["sample"] for row in rows[:4]] == [0, 1, 2, 3] and rows[0]["id"] == task.examples[0].id
    assert summary["generated_tokens"] == sum(row["tokens"] for row in rows)


def test_pass_at_k_is_the_average_over_subsets():
    for n, c in ((5, 2), (4, 0), (4, 4), (6, 1)):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ValueError, match="k=5"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(("n", "samples", "p"), [(50, 1, 0.3), (200, 1, 0.9), (60, 4, 0.5)])
def test_intervals_cover(n, samples, p):
    rng = random.Random(0)
    hits, trials = 0, 400
    for _ in range(trials):
        rates = [min(1.0, max(0.0, rng.gauss(p, 0.15))) if samples > 1 else p for _ in range(n)]
        interval = accuracy_interval([[rng.random() < rate for _ in range(samples)] for rate in rates])
        hits += interval.low <= p <= interval.high
    assert 0.92 <= hits / trials <= 0.98


def test_interval_of_certainty_is_not_a_point():
    assert accuracy_interval([[True]] * 20).low < 0.9
    assert accuracy_interval([[False, False]] * 20).high > 0.1


@pytest.mark.parametrize(
    ("rows", "low", "high"),
    [
        ([[1, 0, 0, 0, 0]] * 3, 0.025, 0.712),
        ([[1, 0]] * 3, 0.125, 0.875),
        ([[1, 0, 0, 0]] * 2, 0.027, 0.802),
        ([[1, 0, 0]], 0.025, 0.906),
    ],
)
def test_equal_prompts_get_wilsons_interval_at_their_mean(rows, low, high):
    """(mean + z²/2n ± z √(mean (1 − mean)/n + z²/4n²)) / (1 + z²/n), without rounding mean · n to a
    count.
    """
    interval = accuracy_interval(rows)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-4)
    assert interval.mean == pytest.approx(sum(rows[0]) / len(rows[0]))


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 17), (17, 17), (999, 1000)])
def test_one_sample_per_prompt_gets_scipys_wilson_interval(right, n):
    interval = accuracy_interval([[True]] * right + [[False]] * (n - right))
    wilson = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)


def test_different_prompts_get_students_t():
    interval = accuracy_interval([[1, 0], [1, 1], [0, 0], [1, 0]])
    half = stats.t.ppf(0.975, 3) * np.std([0.5, 1, 0, 0.5], ddof=1) / 2
    assert (interval.low, interval.high) == (pytest.approx(max(0.0, 0.5 - half)), pytest.approx(min(1.0, 0.5 + half)))


def test_bad_requests(student, tokenizer, task):
    with pytest.raises(ConfigError, match="greedy"):
        evaluate(student, tokenizer, task, Sampling(max_new_tokens=4, n=2, temperature=0))
    unanswered = Task("t", (Example("a", "x", "1"), Example("b", "y", None)), lambda c, e: 0.0)
    with pytest.raises(TaskError, match="example 'b' has no answer"):
        evaluate(student, tokenizer, unanswered, Sampling(max_new_tokens=4))
    with pytest.raises(TaskError, match="no examples"):
        evaluate(student, tokenizer, Task("t", (), lambda c, e: 0.0), Sampling(max_new_tokens=4))


# -- the model's own sampling defaults -------------------------------------------------------------

#: What a `generation_config.json` may bring along.
OWN = {
    "repetition_penalty": 1.3,
    "min_p": 0.2,
    "top_k": 2,
    "top_p": 0.5,
    "temperature": 0.3,
    "top_h": 0.3,
    "typical_p": 0.3,
    "no_repeat_ngram_size": 1,
    "num_beams": 2,
    "num_return_sequences": 2,
    "min_new_tokens": 6,
    "suppress_tokens": list(range(3, 40)),
    "bad_words_ids": [[token] for token in range(3, 40)],
    "sequence_bias": [[[token], 10.0] for token in range(3, 20)],
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 5.0),
    "return_dict_in_generate": True,
    "stop_strings": ["a"],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", OWN)
def test_a_models_own_sampling_defaults_are_not_used(student, tokenizer, task, temperature, name):
    settings = {"max_new_tokens": 6, "temperature": temperature, "seed": 0}
    plain = generate(student, tokenizer, prompts(task), Sampling(**settings))
    own = student.generation_config
    setattr(own, name, OWN[name])
    before = own.to_dict()
    assert generate(student, tokenizer, prompts(task), Sampling(**settings)) == plain
    assert student.generation_config is own and own.to_dict() == before


def test_an_adapted_and_a_compiled_model_answer_without_them_too(student, tokenizer, task):
    peft = pytest.importorskip("peft")
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    plain = generate(student, tokenizer, prompts(task), Sampling(**settings))
    own = student.generation_config
    own.repetition_penalty = 1.3
    compiled = torch.compile(student, backend="eager")
    assert generate(compiled, tokenizer, prompts(task), Sampling(**settings)) == plain
    adapted = peft.get_peft_model(student, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert generate(adapted, tokenizer, prompts(task), Sampling(**settings)) == plain
    assert student.generation_config is compiled.generation_config is adapted.generation_config is own
    assert "generation_config" not in vars(adapted)


def test_a_models_generation_config_survives_an_exception(student, tokenizer, task, monkeypatch):
    own = student.generation_config
    own.repetition_penalty = 1.3
    before = own.to_dict()

    def fail(*args, **kwargs):
        assert student.generation_config.repetition_penalty is None
        raise KeyboardInterrupt

    monkeypatch.setattr(student.model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(student, tokenizer, prompts(task), Sampling(max_new_tokens=2))
    assert student.generation_config is own and own.to_dict() == before


def test_the_end_tokens_that_a_model_declares_are_used(student, tokenizer, task):
    declared = 9
    student.generation_config.eos_token_id = [tokenizer.eos_token_id, declared]
    student.generation_config.min_new_tokens = 6
    completions = generate(student, tokenizer, prompts(task), Sampling(max_new_tokens=12, seed=0))
    last = {completion.completion_ids[-1] for completion in completions if not completion.truncated}
    assert last == {tokenizer.eos_token_id, declared}
    assert min(len(completion.completion_ids) for completion in completions) < 6
    assert not any({tokenizer.eos_token_id, declared} & {*c.completion_ids[:-1]} for c in completions)
