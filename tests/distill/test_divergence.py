"""Losses and exact divergence against dense references."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model

from effopd.distill.divergence import (
    Head,
    full_loss,
    reverse_kl_of_completions,
    shared_vocab_size,
)
from effopd.distill.policy_gradient import sampled_loss
from effopd.errors import CompatibilityError

B, T, H, V = 3, 5, 8, 20


@pytest.fixture
def setting():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    h_s, h_t = draw(B, T, H).requires_grad_(), draw(B, T, H)
    w_s, w_t = draw(V, H).requires_grad_(), draw(V, H)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    ids = torch.randint(0, V, (B, T), generator=g)
    return h_s, h_t, Head(w_s, None, 1.0, None), Head(w_t, None, 1.0, None), ids, mask


def dense(setting, temperature):
    h_s, h_t, s, t, ids, mask = setting
    logp = (h_s @ s.weight.T / temperature).log_softmax(-1)
    logq = (h_t @ t.weight.T / temperature).log_softmax(-1)
    return logp, logq, ids, mask.bool()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_loss_is_the_dense_reverse_kl(setting, temperature):
    h_s, h_t, s, t, _, mask = setting
    loss, entropy, count = full_loss(h_s, h_t, s, t, mask, 1.0, temperature, None)
    logp, logq, _, valid = dense(setting, temperature)
    kl = (logp.exp() * (logp - logq)).sum(-1)[valid]
    torch.testing.assert_close(loss, kl.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1)[valid].sum(), rtol=1e-5, atol=1e-5)
    assert count == valid.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_items", [None, 40])
def test_sampled_loss_matches_dense_with_gradients(setting, temperature, num_items):
    h_s, h_t, s, t, ids, mask = setting
    loss, _, count = sampled_loss(h_s, h_t, s, t, ids, mask, temperature, num_items)
    logp, logq, ids, valid = dense(setting, temperature)
    lp, lq = (x.gather(-1, ids[..., None])[..., 0][valid] for x in (logp, logq))
    reference = -((lq - lp).detach() * lp).sum() / (num_items or valid.sum())
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    assert count == valid.sum()
    grads = [torch.autograd.grad(x, (h_s, s.weight), retain_graph=True) for x in (loss, reference)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_expected_sampled_gradient_is_the_reverse_kl_gradient(setting):
    """Enumerate every action at one prefix: Σ_y p(y) ∇loss(y) = ∇KL(p ‖ q)."""
    h_s, h_t, s, t, _, _ = setting
    one = torch.ones(1, 1, dtype=torch.long)
    p = (h_s[0, 0] @ s.weight.T).softmax(-1).detach()
    total = torch.zeros(H)
    for y in range(V):
        loss, _, _ = sampled_loss(h_s[:1, :1], h_t[:1, :1], s, t, torch.tensor([[y]]), one, 1.0, None)
        total += p[y] * torch.autograd.grad(loss, h_s, retain_graph=True)[0][0, 0]
    kl, _, _ = full_loss(h_s[:1, :1], h_t[:1, :1], s, t, one, 1.0, 1.0, None)
    torch.testing.assert_close(total, torch.autograd.grad(kl, h_s)[0][0, 0], rtol=1e-4, atol=1e-5)


def test_same_model_is_zero(setting):
    h_s, _, s, _, ids, mask = setting
    for loss in (
        full_loss(h_s, h_s.detach(), s, s, mask, 1.0, 1.0, None)[0],
        sampled_loss(h_s, h_s.detach(), s, s, ids, mask, 1.0, None)[0],
    ):
        assert abs(float(loss)) < 1e-6


def test_all_masked_is_a_finite_zero(setting):
    h_s, h_t, s, t, ids, mask = setting
    for loss, _, count in (
        full_loss(h_s, h_t, s, t, 0 * mask, 1.0, 1.0, None),
        sampled_loss(h_s, h_t, s, t, ids, 0 * mask, 1.0, None),
    ):
        assert float(loss) == 0.0 and count == 0


def test_padded_vocabulary_equals_the_cut_one():
    student, teacher = make_model(0, vocab_size=64), make_model(1, vocab_size=80)
    assert shared_vocab_size(student, teacher, 47) == 64
    with torch.no_grad():
        teacher.get_output_embeddings().weight[64:] += 100.0  # must not matter
    prompts, answers = [[5, 6], [7]], [[8, 9, 10], [11]]
    sums, counts = reverse_kl_of_completions(
        student, teacher, prompts, answers, vocab_size=64, pad_token_id=0, batch_size=2
    )
    assert counts == [3, 1]
    for prompt, answer, value in zip(prompts, answers, sums, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logp, logq = (m(ids).logits[0, len(prompt) - 1 : -1, :64].log_softmax(-1) for m in (student, teacher))
        assert value == pytest.approx(float((logp.exp() * (logp - logq)).sum()), rel=1e-4)


def test_batching_does_not_change_the_kl():
    student, teacher = make_model(0), make_model(1)
    prompts, answers = [[5, 6], [7], [8, 9, 10]], [[8, 9, 10], [11], [12, 13]]
    results = [
        reverse_kl_of_completions(student, teacher, prompts, answers, vocab_size=64, pad_token_id=0, batch_size=n)[0]
        for n in (1, 2, 3)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4) and results[0] == pytest.approx(results[2], rel=1e-4)


def test_too_small_vocabulary():
    with pytest.raises(CompatibilityError, match="the teacher has 32 vocabulary rows but the tokenizer has 47"):
        shared_vocab_size(make_model(0), make_model(1, vocab_size=32), 47)


def by_answer(value_N, valid, num_items=None):
    rows = value_N.new_zeros(valid.shape)
    rows[valid] = value_N
    lengths = valid.sum(1)
    return (rows.sum(1) / lengths.clamp(min=1)).sum() / (num_items or int((lengths > 0).sum()))


@pytest.mark.parametrize("num_items", [None, 7])
def test_answers_that_count_alike_match_the_dense_means_with_gradients(setting, num_items):
    h_s, h_t, s, t, ids, mask = setting
    logp, logq, targets, valid = dense(setting, 0.7)
    lp, lq = (x.gather(-1, targets[..., None])[..., 0][valid] for x in (logp, logq))
    losses = {
        "full": full_loss(h_s, h_t, s, t, mask, 1.0, 0.7, num_items, by_answer=True)[0],
        "sampled": sampled_loss(h_s, h_t, s, t, ids, mask, 0.7, num_items, by_answer=True)[0],
    }
    references = {
        "full": by_answer((logp.exp() * (logp - logq)).sum(-1)[valid], valid, num_items),
        "sampled": by_answer(-(lq - lp).detach() * lp, valid, num_items),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, references[name], rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(x, (h_s, s.weight), retain_graph=True) for x in (loss, references[name])]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_answer_without_tokens_counts_for_nothing(setting):
    h_s, h_t, s, t, _, mask = setting
    mask = mask.clone()
    mask[1] = 0
    loss, _, count = full_loss(h_s, h_t, s, t, mask, 1.0, 1.0, None, by_answer=True)
    logp, logq, _, _ = dense(setting, 1.0)
    kl, valid = (logp.exp() * (logp - logq)).sum(-1), mask.bool()
    torch.testing.assert_close(loss, (kl[0][valid[0]].mean() + kl[2][valid[2]].mean()) / 2, rtol=1e-5, atol=1e-6)
    assert count == 8


def test_importance_weights_are_capped_and_detached(setting):
    h_s, h_t, s, t, ids, mask = setting
    logp, logq, targets, valid = dense(setting, 1.0)
    lp, lq = (x.gather(-1, targets[..., None])[..., 0] for x in (logp, logq))
    sampler = lp.detach() - torch.linspace(-1.0, 4.0, lp.numel()).view_as(lp)  # ratios from 0.37 to 55
    sampler = torch.where(valid, sampler, torch.nan)
    loss, _, _ = sampled_loss(h_s, h_t, s, t, ids, mask, 1.0, None, sampler_logps_BT=sampler)
    weight = (lp.detach() - sampler).exp()[valid].clamp(max=5.0)
    assert (weight == 5.0).any() and (weight < 1.0).any()
    reference = -(weight * (lq - lp)[valid].detach() * lp[valid]).mean()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, (h_s, s.weight), retain_graph=True) for x in (loss, reference)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_tokens_outside_of_the_shared_vocabulary_are_an_error():
    with pytest.raises(CompatibilityError, match="token 63 is outside"):
        reverse_kl_of_completions(make_model(0), make_model(1), [[3, 4]], [[63]], vocab_size=63, pad_token_id=0)
