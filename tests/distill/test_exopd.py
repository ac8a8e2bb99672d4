"""ExOPD: the mixture target against a dense reference, its ends, and a reference model that is
never ignored.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from helpers.traces import parameters, same

from effopd import EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.distill.divergence import Head, full_loss, kernel_dtype, mixture_head, mixture_hidden
from effopd.distill.policy_gradient import sampled_loss
from effopd.errors import CompatibilityError, ConfigError

FAST = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no"}


def parts(seed=0, widths=(6, 5, 7), vocabulary=11, bias=True):
    """Student, teacher and reference: hidden states [2, 4, H] and heads, all of different
    widths.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, width in enumerate(widths):
        hidden = torch.randn(2, 4, width, generator=generator)
        weight = torch.randn(vocabulary, width, generator=generator)
        offset = torch.randn(vocabulary, generator=generator) if bias and index != 1 else None
        made.append((hidden, Head(weight, offset, (1.0, 0.5, 2.0)[index], None)))
    return made


def dense_logits(hidden, head):
    logits = hidden.double() @ head.weight.double().T
    return head.scale * (logits if head.bias is None else logits + head.bias.double())


MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("weight", [0.4, 1.25, 1.8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_loss_is_the_kl_to_the_mixture_with_its_gradients(weight, temperature):
    (h_s, student), (h_t, teacher), (h_r, reference) = parts()
    h_s.requires_grad_(True)
    student.weight.requires_grad_(True)
    loss, *_ = full_loss(
        h_s, mixture_hidden(h_t, h_r, teacher, reference, weight), student, mixture_head(teacher, reference, weight),
        MASK, 1.0, temperature, None,
    )  # fmt: skip
    loss.backward()
    got = loss.detach(), h_s.grad.clone(), student.weight.grad.clone()
    h_s.grad = student.weight.grad = None
    mixed = weight * dense_logits(h_t, teacher) + (1 - weight) * dense_logits(h_r, reference)
    target = torch.log_softmax(mixed / temperature, -1)
    own = torch.log_softmax(dense_logits(h_s, student) / temperature, -1)
    dense = ((own.exp() * (own - target)).sum(-1) * MASK).sum() / MASK.sum()
    dense.backward()
    for value, wanted in zip(got, (dense.detach(), h_s.grad, student.weight.grad), strict=True):
        torch.testing.assert_close(value.double(), wanted.double(), rtol=2e-5, atol=5e-6)


def test_at_its_ends_the_mixture_is_the_teacher_and_the_reference():
    _, (h_t, teacher), (h_r, reference) = parts()
    for weight, hidden, head in ((1.0, h_t, teacher), (0.0, h_r, reference)):
        mixed = mixture_head(teacher, reference, weight).logits(mixture_hidden(h_t, h_r, teacher, reference, weight))
        torch.testing.assert_close(mixed.double(), dense_logits(hidden, head), rtol=1e-5, atol=1e-5)


def test_sampled_advantages_have_the_stated_form():
    (h_s, student), (h_t, teacher), (h_r, reference) = parts()
    ids, weight = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(1)), 1.25
    h_s.requires_grad_(True)
    loss, *_ = sampled_loss(h_s, h_t, student, teacher, ids, MASK, 1.0, None, (h_r, reference), weight)
    logp = [torch.log_softmax(dense_logits(h, head), -1).gather(-1, ids[..., None])[..., 0]
            for h, head in ((h_s, student), (h_t, teacher), (h_r, reference))]  # fmt: skip
    advantage = (weight * (logp[1] - logp[2]) - (logp[0] - logp[2])).detach()
    wanted = -(advantage * logp[0] * MASK).sum() / MASK.sum()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)


def test_capped_logits_are_refused():
    _, (_, teacher), (_, reference) = parts()
    capped = Head(teacher.weight, teacher.bias, 1.0, 30.0)
    for pair in ((capped, reference), (teacher, capped)):
        with pytest.raises(CompatibilityError, match="softcapping"):
            mixture_head(*pair, 1.25)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["full", "sampled"])
def test_a_reference_that_is_the_teacher_makes_it_plain_opd(tmp_path, loss_type):
    plain = make_trainer(tmp_path / "plain", loss_type=loss_type, **FAST)
    start = parameters(plain)
    plain.train()
    same_target = make_trainer(
        tmp_path / "mixed", loss_type=loss_type, lambda_extrapolation=1.7, reference_model=make_model(1), **FAST
    )
    same_target.train()
    ahead = make_trainer(
        tmp_path / "ahead", loss_type=loss_type, lambda_extrapolation=1.7, reference_model=make_model(2), **FAST
    )
    ahead.train()
    moved = max(float((parameters(plain)[n] - start[n]).abs().max()) for n in start)
    for name, tensor in parameters(plain).items():
        torch.testing.assert_close(tensor, parameters(same_target)[name], rtol=1e-3, atol=0.02 * moved)
    assert any((parameters(ahead)[n] - parameters(plain)[n]).abs().max() > 0.2 * moved for n in start)


@pytest.mark.slow
def test_the_reference_stays_frozen_and_its_forward_is_charged(tmp_path):
    reference = make_model(2)
    before = copy.deepcopy(reference.state_dict())
    trainer = make_trainer(
        tmp_path / "x", lambda_extrapolation=1.25, reference_model=reference,
        effopd=EffOPDConfig(validation_size=12, parameters="all", args={"scales": [2.0]}), **FAST,
    )  # fmt: skip
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.reference_model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in trainer.reference_model.parameters())
    last = list(read_rows(tmp_path / "x" / "metrics.jsonl"))[-1]
    assert last["cost/teacher_forward_tokens"] == 2 * last["cost/update_forward_tokens"]


def test_evaluation_is_against_the_teacher_alone(tmp_path):
    """Both kinds: the answers to `eval_task`, and TRL's loss over a dataset."""
    data, rows = make_task(8).to_dataset(), []
    for name, flags in (("plain", {}), ("ahead", {"lambda_extrapolation": 1.9, "reference_model": make_model(2)})):
        trainer = make_trainer(tmp_path / name, **flags, **FAST)
        rows.append((trainer.evaluate()["eval_kl"], trainer.evaluate(eval_dataset=data)["eval_loss"]))
    assert rows[0] == rows[1]


def test_the_start_of_the_student_by_its_path_is_a_model_of_its_own(tmp_path):
    path = str(tmp_path / "start")
    make_model(0).save_pretrained(path)
    args = OPDConfig(
        output_dir=str(tmp_path / "run"), lambda_extrapolation=1.25, reference_model_name_or_path=path, use_cpu=True,
        max_steps=1, report_to="none",
    )  # fmt: skip
    trainer = OPDTrainer(
        path, make_model(1), args, train_dataset=make_task(8).to_dataset(), processing_class=make_tokenizer(),
        reference_model=path,
    )  # fmt: skip
    assert all(p.requires_grad for p in trainer.model.parameters())
    own, frozen = ({p.data_ptr() for p in model.parameters()} for model in (trainer.model, trainer.reference_model))
    assert own.isdisjoint(frozen)


def test_models_that_cannot_be_a_reference(tmp_path):
    student, args = make_model(0), OPDConfig(output_dir=str(tmp_path), lambda_extrapolation=1.25)
    with pytest.raises(ConfigError, match="student object itself"):
        OPDTrainer(student, make_model(1), args, reference_model=student)
    with pytest.raises(CompatibilityError, match="the reference has 40 vocabulary rows"):
        make_trainer(tmp_path / "b", lambda_extrapolation=1.25, reference_model=make_model(2, vocab_size=40), **FAST)


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "lambda_extrapolation": 1.25}
    whole = make_trainer(tmp_path, reference_model=make_model(2), **settings)
    whole.train()
    again = make_trainer(tmp_path, reference_model=make_model(2), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000002"))
    assert same(parameters(whole), parameters(again))


@pytest.mark.slow
def test_a_reference_by_path(tmp_path):
    make_model(2).save_pretrained(tmp_path / "reference")
    named = make_trainer(
        tmp_path / "a", lambda_extrapolation=1.25, reference_model_name_or_path=str(tmp_path / "reference"), **FAST
    )
    named.train()
    given = make_trainer(tmp_path / "b", lambda_extrapolation=1.25, reference_model=make_model(2), **FAST)
    given.train()
    assert same(parameters(named), parameters(given))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"reference_model_name_or_path": "r"}, "no effect"),
        ({"lambda_extrapolation": 0.0}, "above 0"),
        ({"lambda_extrapolation": 1.25, "beta": 0.5}, "reverse KL"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(output_dir=str(tmp_path), **flags)


def test_lambda_without_reference_and_reference_without_lambda(tmp_path):
    with pytest.raises(ConfigError, match="reference_model_name_or_path"):
        make_trainer(tmp_path / "a", lambda_extrapolation=1.25, **FAST)
    with pytest.raises(ConfigError, match="lambda_extrapolation"):
        make_trainer(tmp_path / "b", reference_model=make_model(2), **FAST)


def test_unstable_values_are_warned_about(tmp_path, caplog):
    OPDConfig(output_dir=str(tmp_path), lambda_extrapolation=1.5, reference_model_name_or_path="r")
    assert "unstable" in caplog.text


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_lambda_adds_no_rounding(autocast):
    """Against the dense float64 loss of the same bf16 hidden states and weights."""
    (h_s, student), (h_t, teacher), (h_r, reference) = parts(widths=(64, 64, 48), vocabulary=50)
    mask, weight = torch.ones(2, 4), 1.25
    half = [(h.bfloat16() / 4, Head(head.weight.bfloat16(), None, head.scale, None)) for h, head in
            ((h_s, student), (h_t, teacher), (h_r, reference))]  # fmt: skip
    (h_s, student), (h_t, teacher), (h_r, reference) = half
    states = [h.float() for h in (h_s, h_t, h_r)] if autocast else [h_s, h_t, h_r]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtype = kernel_dtype(states[1])
        target = mixture_hidden(states[1], states[2], teacher, reference, weight, dtype)
        head = mixture_head(teacher, reference, weight, dtype)
        loss, *_ = full_loss(states[0], target, student, head, mask, 1.0, 1.0, None)
    mixed = weight * dense_logits(h_t, teacher) + (1 - weight) * dense_logits(h_r, reference)
    log_q, log_p = torch.log_softmax(mixed, -1), torch.log_softmax(dense_logits(h_s, student), -1)
    dense = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert dtype == torch.bfloat16 and float(loss) == pytest.approx(float(dense), rel=2e-6)
