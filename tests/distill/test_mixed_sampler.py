"""Teacher-mixed sampling: its probabilities, what it leaves alone, refusals, costs and runs."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from helpers.tiny_models import make_model, of_type
from helpers.tiny_run import make_trainer
from transformers import Cache, TrainerCallback

from effopd import EffOPDConfig, OPDConfig
from effopd.common.files import read_rows
from effopd.distill import mixing as mixing_module
from effopd.distill.mixed_sampler import TeacherMixing, mixed_logps, mixing, teacher_tokens
from effopd.distill.mixing import TEACHER_SHARE
from effopd.distill.sampled_logps import recording
from effopd.errors import ConfigError
from effopd.tasks.base import Example, Task

SETTINGS = {"eval_strategy": "no", "max_steps": 1, "save_strategy": "no", "health_tokens": 0}
PROMPTS = [[1, 9, 13], [1, 5, 7, 30, 21, 8, 12, 40], [1, 33], [1, 17, 18, 19, 20]]


def gpt2(seed, drop=0.0):
    rates = {"resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop}
    return of_type("gpt2", seed, n_embd=32, n_layer=2, n_head=4, n_positions=128, **rates).eval()


def rwkv(seed):
    return of_type("rwkv", seed, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2).eval()


# -- probabilities ---------------------------------------------------------------------------------

MODELS = {
    "rotary": (lambda: make_model(0), lambda: make_model(1), PROMPTS),
    "position table": (lambda: make_model(0), lambda: gpt2(1), PROMPTS),
    "recurrent": (lambda: make_model(0), lambda: rwkv(1), PROMPTS[1:2]),
    "wider student": (lambda: make_model(0, vocab_size=80), lambda: make_model(1), PROMPTS),
    "wider teacher": (lambda: make_model(0), lambda: make_model(1, vocab_size=80), PROMPTS),
}


@torch.no_grad()
def sampled(student, teacher, prompts, *, alpha, temperature, recorded=0):
    """Ids and the sampler's log-probabilities of every step, from `generate` with mixing."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    processor = TeacherMixing(teacher, list(map(len, prompts)), alpha, temperature, 64, torch.no_grad)
    torch.manual_seed(5)
    with recording(student, recorded) as recorder, mixing(student, processor):
        out = student.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=7,
            eos_token_id=list(range(3, 14)), pad_token_id=0, output_scores=True, return_dict_in_generate=True,
            suppress_tokens=list(range(64, 80)) if student.config.vocab_size > 64 else None,
        )  # fmt: skip
    answers = out.sequences[:, width:].tolist()
    ends = [next((i + 1 for i, y in enumerate(row) if 3 <= y < 14), len(row)) for row in answers]
    answers = [row[:end] for row, end in zip(answers, ends, strict=True)]
    return answers, torch.stack(out.scores, dim=1), recorder.rows(answers) if recorded else None


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.2, 1.0), (0.7, 0.6)])
@torch.no_grad()
def test_each_token_is_drawn_from_the_mixture_of_full_forwards(models, alpha, temperature):
    make_student, make_teacher, prompts = MODELS[models]
    student, teacher = make_student().eval(), make_teacher().eval()
    answers, scores, logps = sampled(student, teacher, prompts, alpha=alpha, temperature=temperature, recorded=2)
    if len(prompts) > 1:
        assert len(set(map(len, answers))) > 1  # rows that are finished while others go on
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([[*prompt, *answer]])
        own, other = (
            (model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :64] / temperature).softmax(-1)
            for model in (student, teacher)
        )
        made = scores[row, : len(answer)].exp()
        torch.testing.assert_close(made[:, :64], alpha * other + (1 - alpha) * own, rtol=1e-4, atol=1e-5)
        assert float(made[:, 64:].abs().sum()) == 0
        if row < 2:  # the recorder keeps the student's log-probabilities
            expected = own.log().gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(logps[row]), expected, rtol=1e-4, atol=1e-4)


def test_the_mixture_in_logarithms():
    p, q = (torch.randn(3, 9, generator=torch.Generator().manual_seed(s)).softmax(-1) for s in (0, 1))
    torch.testing.assert_close(mixed_logps(p.log(), q.log(), 0.3).exp(), 0.3 * q + 0.7 * p)
    sure = torch.tensor([[0.0, -math.inf, -math.inf]])
    mixed = mixed_logps(sure, torch.tensor([[-math.inf, 0.0]]), 0.3)
    torch.testing.assert_close(mixed.exp(), torch.tensor([[0.7, 0.3, 0.0]]))


def test_nothing_is_left_on_the_student(student):
    before = dict(vars(student))
    for _ in range(2):
        sampled(student, make_model(1), PROMPTS, alpha=0.2, temperature=1.0, recorded=1)
    assert vars(student).keys() == before.keys()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"teacher_mixed_alpha": 1.0}, r"\[0, 1\)"), ({"teacher_mixed_alpha": -0.1}, r"\[0, 1\)"),
    ({"teacher_mixed_alpha": math.nan}, r"\[0, 1\)"),
    ({"use_vllm": True}, "use_vllm=True"), ({"top_p": 0.9}, "top_p=0.9"), ({"top_k": 5}, "top_k=5"),
    ({"min_p": 0.1}, "min_p=0.1"), ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
    ({"generation_kwargs": {"suppress_tokens": [3]}}, "generation_kwargs="), ({"temperature": 0.0}, "--temperature"),
    ({"loss_type": "negative_advantage"}, "loss_type='negative_advantage'"),
    ({"lmbda": 0.5, "traces": "x"}, "lmbda=0.5"), ({"rollout_horizon": "prune"}, "rollout_horizon='prune'"),
    ({"teachers": ["a=x", "b=y"]}, "teachers="), ({"teacher_shard": True}, "teacher_shard=True"),
    ({"teacher_server": "http://127.0.0.1:9"}, "--teacher_server"), ({"rollouts": "x"}, "--rollouts"),
])  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(use_cpu=True, report_to="none", **{"teacher_mixed_alpha": 0.2} | settings)


@pytest.mark.slow
def test_trainers_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="teachers="):
        make_trainer(tmp_path, teacher={"a": make_model(1), "b": make_model(2)}, teacher_mixed_alpha=0.2, **SETTINGS)
    monkeypatch.setattr(mixing_module, "is_whole", lambda model: False)
    with pytest.raises(ConfigError, match="got a sharded one"):
        make_trainer(tmp_path, teacher_mixed_alpha=0.2, **SETTINGS)


# -- one step --------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """What each step trains on, and the steps in which the teacher samples along."""

    def __init__(self, trainer, monkeypatch):
        self.batches, self.mixed = [], []
        loss = trainer.distillation_loss

        def record(student, inputs, num_items):
            if trainer.model.training:
                self.batches.append((trainer.state.global_step + 1, inputs))
            return loss(student, inputs, num_items)

        class Seen(TeacherMixing):
            def __init__(inner, *arguments):
                assert trainer.model.training
                self.mixed.append(trainer.state.global_step + 1)
                super().__init__(*arguments)

        trainer.distillation_loss = record
        monkeypatch.setattr(mixing_module, "TeacherMixing", Seen)

    def answers(self, step):
        return [
            ids[mask.bool()].tolist()
            for at, inputs in self.batches
            if at == step
            for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        ]


def trained(path, monkeypatch, **settings):
    trainer = make_trainer(path, **SETTINGS | settings)
    steps = Steps(trainer, monkeypatch)
    trainer.train()
    return trainer, steps


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_without_a_teacher_in_it_the_mixture_is_the_student(tmp_path, monkeypatch, loss):
    """α near 0, or a teacher equal to the student: the same random numbers draw the same tokens."""
    made = {}
    for name, teacher, alpha in (
        ("off", 1, 0.0), ("nearly", 1, 1e-9), ("off, equal", 0, 0.0), ("equal", 0, 0.4), ("mixed", 1, 0.4),
    ):  # fmt: skip
        trainer, steps = trained(
            tmp_path / name, monkeypatch, teacher=make_model(teacher), teacher_mixed_alpha=alpha, loss_type=loss
        )
        made[name] = steps.answers(1), weights(trainer)
        assert steps.mixed == [1] * (alpha > 0)
        assert all((TEACHER_SHARE in inputs) == (alpha > 0 and loss == "sampled") for _, inputs in steps.batches)
    assert made["nearly"][0] == made["off"][0] != made["mixed"][0] and made["equal"][0] == made["off, equal"][0]
    torch.testing.assert_close(made["nearly"][1], made["off"][1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_teacher_stays_frozen_and_its_cache_is_released(tmp_path, monkeypatch):
    teacher = gpt2(1, drop=0.5).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer, steps = trained(tmp_path, monkeypatch, teacher=teacher, teacher_mixed_alpha=0.5, max_steps=2)
    assert steps.mixed == [1, 2]
    held = trainer.accelerator.unwrap_model(trainer.teacher_model)
    assert not any(module.training for module in held.modules())
    assert all(p.grad is None and not p.requires_grad for p in held.parameters())
    assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, Cache | TeacherMixing)]


def uneven_task(size=32):
    prompts = ["1 + 1 = ?" * (1 + i % 3) + "x" * (i % 4) for i in range(size)]
    examples = [Example(str(i), [{"role": "user", "content": text}], "a") for i, text in enumerate(prompts)]
    return Task("uneven", tuple(examples), lambda completion, example: float("a" in completion))


@pytest.mark.slow
def test_a_teacher_that_padding_changes_gets_one_prompt_at_a_time(tmp_path, monkeypatch):
    _, steps = trained(
        tmp_path, monkeypatch, teacher=rwkv(1), task=uneven_task(), teacher_mixed_alpha=0.5, max_completion_length=3
    )
    assert steps.mixed == [1] * 8


@pytest.mark.slow
def test_the_teachers_tokens_are_charged(tmp_path, monkeypatch):
    assert teacher_tokens([[1, 2, 3], [4]], [[5], [6, 7, 8]]) == 3 + 1 + 0 + 2
    _, steps = trained(tmp_path, monkeypatch, task=uneven_task(), teacher_mixed_alpha=0.5, health_tokens=256)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    inputs = steps.batches[0][1]
    once = sum(int(inputs[name].sum()) for name in ("prompt_mask", "completion_mask"))
    assert row["cost/teacher_forward_tokens"] == 2 * once - len(inputs["prompt_ids"])
    assert row["cost/rollout_generated_tokens"] == int(inputs["completion_mask"].sum())
    assert row["cost/update_forward_tokens"] == once
    assert row["health/sampler_logp_gap"] < 1e-5  # the student's own log-probabilities, at sampling and in the loss


# -- runs ------------------------------------------------------------------------------------------

LONG = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "teacher_mixed_alpha": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"effopd": EffOPDConfig("newton_search", score_rollouts=4)},
    {"effopd": EffOPDConfig("line_search", score_rollouts=4), "loss_type": "sampled", "learning_rate": 2e-4},
], ids=["newton_search", "sampled"])  # fmt: skip
def test_resumed_runs_are_the_uninterrupted_one_and_searches_are_on_policy(
    tmp_path, monkeypatch, one_thread, settings
):
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole, steps = trained(tmp_path / "whole", monkeypatch, **LONG, **accumulated, **settings)
    searches = list(read_rows(whole.run_dir.root / "searches.jsonl"))
    at = {row["step"] for row in searches}
    assert at and len(set(range(5, 9)) - at) > 1  # some steps mix on both sides of the checkpoint
    rows = [row for row in read_rows(whole.run_dir.root / "metrics.jsonl") if "loss" in row]
    assert [row["rollouts/on_policy"] for row in rows] == [float(step in at) for step in range(1, 9)]
    assert set(steps.mixed) == set(range(1, 9)) - at
    if "loss_type" in settings:
        assert any(row["accepted_scale"] for row in searches)  # its rollouts were dropped and sampled again
        shares = {step: inputs.get(TEACHER_SHARE) for step, inputs in steps.batches}
        assert {step for step, share in shares.items() if share is None} == at
        assert all(share.tolist() == pytest.approx([0.3] * 4) for share in shares.values() if share is not None)
    resumed = make_trainer(tmp_path / "resumed", **SETTINGS | LONG | accumulated | settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoints/step-000004"))
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_micro_batches_add_up_to_the_batch(tmp_path, monkeypatch, loss):
    rows = []
    for size in (8, 2):
        trained(
            tmp_path / str(size), monkeypatch, loss_type=loss, per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size, teacher_mixed_alpha=0.5,
        )  # fmt: skip
        rows += read_rows(tmp_path / str(size) / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3)


@pytest.mark.slow
def test_evaluations_never_mix(tmp_path, monkeypatch):
    trainer, steps = trained(tmp_path, monkeypatch, teacher_mixed_alpha=0.5, eval_strategy="steps", eval_steps=1)
    trainer.evaluate(trainer.train_dataset.select(range(4)))  # the host's, which samples as training does
    assert steps.mixed == [1]
