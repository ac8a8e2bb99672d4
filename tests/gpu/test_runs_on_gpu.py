"""Searches and runs on the GPU: decisions of the CPU, bf16, random state, resume, LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer, small_scores
from peft import LoraConfig, get_peft_model

from effopd import EffOPD, EffOPDConfig, Sampling, evaluate
from effopd.distill.divergence import divergences, reverse_kl_of_completions
from effopd.extrapolate.scorers.teacher_kl import RolloutScorer
from effopd.models.token_batch import TokenBatch
from effopd.runs.records import read_searches, read_steps

pytestmark = pytest.mark.gpu

#: Relative tolerance of a float32 score against the CPU: other orders of the same sums.
SCORE = 1e-4
#: Tolerance of an accepted scale: the vertex of a parabola moves with the rounding of its points.
SCALE = 1e-2
ROLLOUTS = 12
#: Searches whose candidates are scored on given answers, so that no sampling differs by device.
FORCED = {
    "line_search": EffOPDConfig("line_search", min_z=0.0, reset_moments=False, adapt_learning_rate=False),
    "effopd": EffOPDConfig("effopd", parameters="all"),
}


def forced(rollouts=ROLLOUTS, length=9):
    """Prompts and answers of unequal length: the same on every device."""
    draw = torch.Generator().manual_seed(0)

    def row(size):
        return torch.randint(4, 47, (size,), generator=draw).tolist()

    return [row(4 + i % 3) for i in range(rollouts)], [row(length - i % 4) for i in range(rollouts)]


class Divergence:
    """Exact reverse KL to a teacher: the interface that `RolloutScorer` expects."""

    def __init__(self, teacher):
        self.teacher = teacher

    @torch.no_grad()
    def teacher_hidden(self, batches):
        return [batch.hidden(self.teacher) for batch in batches]

    def __call__(self, model, batches, teacher_hidden):
        return divergences(
            model, self.teacher, batches, vocab_size=64, beta=1.0, temperature=1.0, teacher_hidden=teacher_hidden
        )


def toward(student, teacher, share=0.03):
    """A training step in miniature: some of the way to the teacher."""
    with torch.no_grad():
        for parameter, target in zip(student.parameters(), teacher.parameters(), strict=True):
            parameter.lerp_(target, share)


def searched(place, config):
    """One search on forced rollouts: its record, and the weights after it."""
    student, teacher = make_model(0).to(place).eval(), make_model(1).to(place).eval()
    scorer = RolloutScorer(Divergence(teacher), ROLLOUTS)
    look_ahead = EffOPD(student, scorer if config.strategy == "line_search" else _mean(scorer), config)
    scorer.take([TokenBatch.of(*forced(), pad_token_id=0)])
    toward(student, teacher)
    record = look_ahead.search(1)
    return record, {name: p.detach().cpu() for name, p in student.named_parameters()}


def _mean(scorer):
    """The paper's gate compares means; a custom scorer replaces its answers."""
    return lambda model: scorer(model).mean


@pytest.mark.parametrize("strategy", FORCED)
def test_a_search_decides_as_on_the_cpu(device, strategy):
    config = FORCED[strategy]
    (expected, weights), (record, moved) = searched("cpu", config), searched(device, config)
    assert expected.candidates >= 2 and expected.accepted_scale != 0
    assert [trial.verdict for trial in record.trials] == [trial.verdict for trial in expected.trials]
    for trial, other in zip(record.trials, expected.trials, strict=True):
        assert trial.scale == pytest.approx(other.scale, rel=SCALE)
        # near a vertex the score is flat, so an inexact vertex barely changes it
        assert trial.score == pytest.approx(other.score, rel=10 * SCORE)
    assert record.trials[0].score == pytest.approx(expected.trials[0].score, rel=SCORE)
    assert record.accepted_scale == pytest.approx(expected.accepted_scale, rel=SCALE)
    assert record.delta_norm == pytest.approx(expected.delta_norm, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(moved[name], weight, rtol=SCALE, atol=SCALE)


def test_the_kl_equals_that_of_the_cpu_in_float64(device):
    prompts, answers = forced()

    def sums(place, dtype):
        models = (make_model(seed).to(place, dtype).eval() for seed in (0, 1))
        return reverse_kl_of_completions(*models, prompts, answers, vocab_size=64, pad_token_id=0)[0]

    exact = sums("cpu", torch.float64)
    assert sums(device, torch.float32) == pytest.approx(exact, rel=SCORE)
    # bfloat16 weights are other weights: the sum over the rollouts only
    assert sum(sums(device, torch.bfloat16)) == pytest.approx(sum(exact), rel=0.1)


def test_a_bf16_run_with_look_ahead(device, trainer_on, tmp_path):
    config = EffOPDConfig("line_search", score_rollouts=8, schedule="every_step")
    trainer = trainer_on(tmp_path, effopd=config, max_steps=3, bf16=True)
    trainer.train()
    steps, searches = read_steps(tmp_path), read_searches(tmp_path)
    assert [step.step for step in steps] == [1, 2, 3]
    assert all(math.isfinite(step.loss) for step in steps)
    numel = sum(p.numel() for p in trainer.model.parameters())
    assert searches and all(search.memory_bytes == 8 * numel for search in searches)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.device.type for p in trainer.model.parameters()} == {device}
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_rollouts_are_scored_as_they_are_trained_on(device, trainer_on, tmp_path):
    """Without a jump, the start's score is minus the loss of the step whose rollouts it scored."""
    config = EffOPDConfig("line_search", score_rollouts=8, schedule="every_step", min_z=1e9)
    trainer_on(tmp_path, effopd=config, max_steps=3, learning_rate=1e-7).train()
    losses = {step.step: step.loss for step in read_steps(tmp_path)}
    searches = read_searches(tmp_path)
    assert len(searches) == 2
    for search in searches:
        assert -search.start_score == pytest.approx(losses[search.step], rel=1e-3)


def _random_states(device):
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


def test_a_search_leaves_no_trace(device):
    """Candidates that sample and are all rejected: weights, modes and random states stay."""
    model = make_model(0).to(device).train()
    scores = iter([1.0, 0.0, 0.0, 0.0])

    def sampling(model):
        ids = torch.full((4, 3), 5, device=device)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=True)
        return next(scores)

    look_ahead = EffOPD(model, sampling, EffOPDConfig("effopd"))
    toward(model, make_model(1).to(device))
    before, states = [p.detach().clone() for p in model.parameters()], _random_states(device)
    record = look_ahead.search(1)
    assert record.accepted_scale == 0 and record.candidates == 1 and model.training
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, _random_states(device), states))


class Stop(Exception):
    """Ends a run after a checkpoint."""


@pytest.mark.parametrize("strategy", ["effopd", "line_search"])
def test_a_resumed_run_continues_like_an_uninterrupted_one(device, trainer_on, tmp_path, strategy):
    config = EffOPDConfig(strategy, **small_scores(strategy))
    settings = {"effopd": config, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_on(tmp_path / "whole", **settings)
    whole.train()
    half = trainer_on(tmp_path / "half", **settings)

    def stop(*_, **__):
        if half.state.global_step == 3:
            raise Stop

    half.callback_handler.callbacks[-1].on_step_begin = stop
    with pytest.raises(Stop):
        half.train()
    again = trainer_on(tmp_path / "half", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoints" / "step-000002"))
    searches = [[(row.step, row.accepted_scale) for row in read_searches(tmp_path / run)] for run in ("whole", "half")]
    assert [step for step, _ in searches[0]] == [step for step, _ in searches[1]]
    # kernels that add in any order may round differently between two runs on a GPU
    exact = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-6}
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, **exact)


def test_a_lora_run_with_look_ahead(device, trainer_on, tmp_path):
    student = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if "lora_" not in name}
    config = EffOPDConfig("line_search", score_rollouts=8, schedule="every_step")
    trainer = trainer_on(tmp_path, student=student, effopd=config, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert read_searches(tmp_path)
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[name].cpu(), weight) for name, weight in frozen.items())
    assert any(bool(p.any()) for name, p in parameters.items() if "lora_B" in name)


def test_greedy_answers_equal_those_of_the_cpu(device):
    task, tokenizer = make_task(16), make_tokenizer()
    sampling = Sampling(max_new_tokens=6, temperature=0.0, batch_size=8)
    done = [evaluate(make_model(0).to(place), tokenizer, task, sampling) for place in ("cpu", device)]
    answers = [[[each.completion_ids for each in row] for row in one.completions] for one in done]
    assert answers[0] == answers[1]
