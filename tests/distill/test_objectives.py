"""The objectives against brute force in float64: values, gradients, expectations and variances over
all actions, masks and settings.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.tiny_models import make_tokenizer

from effopd import OPDConfig
from effopd.commands.main import main
from effopd.distill.divergence import Head, full_loss, interior_factor
from effopd.distill.methods import KINDS, METHODS, NEEDS
from effopd.distill.objective_config import LOSSES, ONLY_FOR
from effopd.distill.policy_gradient import (
    baseline_of,
    entropy_factor,
    lowest_share,
    mixture_weight,
    negative_advantage_loss,
    sampled_loss,
)
from effopd.distill.rollouts import first_occurrences
from effopd.distill.token_rows import row_logits, support_kl
from effopd.distill.top_k import top_k_loss
from effopd.errors import ConfigError

B, T, H, V = 3, 5, 8, 20
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


@pytest.fixture
def setting():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    student = Head(draw(V, H).requires_grad_(), draw(V).requires_grad_(), 0.5, 20.0)
    teacher = Head(draw(V, H), None, 1.0, None)
    return draw(B, T, H).requires_grad_(), draw(B, T, H), student, teacher, torch.randint(0, V, (B, T), generator=g)


def logits(hidden, head, temperature=1.0):
    z = hidden.double() @ head.weight.double().T
    z = head.scale * (z if head.bias is None else z + head.bias.double())
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / temperature


def gradients(loss, h_s, student):
    made = torch.autograd.grad(loss, (h_s, student.weight, student.bias), retain_graph=True)
    return [each.double() for each in made]


def close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)


# -- the teacher's top k ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_items", [None, 40])
def test_top_k_equals_the_dense_form_with_gradients(setting, temperature, num_items):
    h_s, h_t, s, t, ids = setting
    (loss, _, count), metrics = top_k_loss(h_s, h_t, s, t, ids, MASK, temperature, num_items, top_k=4)
    z_s, z_t = (logits(h, head, temperature)[MASK.bool()] for h, head in ((h_s, s), (h_t, t)))
    support = z_t.topk(4).indices
    own, other = (z.gather(1, support).log_softmax(-1) for z in (z_s, z_t))
    dense = (own.exp() * (own - other)).sum() / (num_items or 7)
    torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=1e-6)
    assert count == 7
    close(gradients(loss, h_s, s), gradients(dense, h_s, s))
    p = z_s.softmax(-1)
    assert metrics["support_mass"] == pytest.approx(float(p.detach().gather(1, support).sum(-1).mean()), rel=1e-4)
    outside = (support != ids[MASK.bool()][:, None]).all(-1).double().mean()
    assert metrics["outside_support"] == pytest.approx(float(outside))


def test_top_k_of_the_whole_vocabulary_is_the_full_reverse_kl(setting):
    h_s, h_t, s, t, ids = setting
    ours = top_k_loss(h_s, h_t, s, t, ids, MASK, 0.7, None, top_k=V + 5)[0]
    full = full_loss(h_s, h_t, s, t, MASK, 1.0, 0.7, None)
    for mine, theirs in zip(ours, full, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)
    close(gradients(ours[0], h_s, s), gradients(full[0], h_s, s))


def test_top_k_gradient_stays_inside_the_support_and_sums_to_zero():
    z_t = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z_s = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    support = z_t.topk(4).indices
    (grad,) = torch.autograd.grad(support_kl(z_s.gather(1, support), z_t.gather(1, support)).sum(), z_s)
    outside = torch.ones(V, dtype=torch.bool)
    outside[support[0]] = False
    assert bool((grad[0, outside] == 0).all()) and bool((grad[0, support[0]] != 0).all())
    assert abs(float(grad.sum())) < 1e-12
    assert float(support_kl(z_t, z_t)) == 0.0  # equal models
    assert float(support_kl(z_s[:, :1], z_t[:, :1])) == 0.0  # k = 1 has no gradient, so k ≥ 2 is required


def test_the_advantage_form_of_the_top_k_loss_has_no_expected_gradient():
    """Σ_y p(y)·A·∇log p(y) with A = −KL on the support, which does not depend on y."""
    g = torch.Generator().manual_seed(3)
    z_s, z_t = torch.randn(1, V, dtype=torch.float64, generator=g).requires_grad_(), torch.randn(1, V, generator=g)
    support = z_t.topk(4).indices
    kl = support_kl(z_s.gather(1, support), z_t.double().gather(1, support))
    p = z_s.softmax(-1).detach()
    wrong = (p * kl.detach() * z_s.log_softmax(-1)).sum()
    assert float(torch.autograd.grad(wrong, z_s, retain_graph=True)[0].abs().max()) < 1e-15
    assert float(torch.autograd.grad(kl.sum(), z_s)[0].abs().max()) > 1e-2


def test_row_logits_tile_with_every_input_type(setting, monkeypatch):
    h_s, _, s, _, _ = setting
    monkeypatch.setattr("effopd.distill.token_rows._TILE", 3 * H)  # one position per tile
    ids = torch.tensor([[1, 1, 3], [0, 2, 19], [5, 5, 5]])  # rows can repeat
    for kind, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        h = h_s[0, :3].detach().to(kind).requires_grad_()
        head = Head(s.weight.detach().to(kind).requires_grad_(), s.bias.detach().to(kind).requires_grad_(), 0.5, 20.0)
        made, dense = row_logits(h, head, ids, 0.7), logits(h, head, 0.7).gather(1, ids)
        torch.testing.assert_close(made.double(), dense, rtol=tolerance, atol=tolerance)
        weights = torch.arange(9.0).view(3, 3)
        pair = [torch.autograd.grad((z * weights).sum(), (h, head.weight, head.bias)) for z in (made, dense)]
        for mine, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=10 * tolerance)
        frozen = Head(head.weight.detach(), None, 0.5, 20.0)  # as with adapters
        assert torch.autograd.grad(row_logits(h, frozen, ids, 0.7).sum(), h)[0].dtype == kind


def test_entropy_share_trains_the_tokens_with_the_largest_entropy(setting):
    h_s, h_t, s, t, ids = setting
    part, whole = (
        top_k_loss(h_s, h_t, s, t, ids, MASK, 1.0, None, top_k=4, entropy_share=share)[0] for share in (0.4, 1.0)
    )
    logp = logits(h_s, s).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = torch.zeros_like(MASK)
    for row, size in ((0, 2), (1, 1)):  # ⌈0.4 · 5⌉ and ⌈0.4 · 2⌉
        length = int(MASK[row].sum())
        chosen[row, entropy[row, :length].topk(size).indices] = 1
    wanted = top_k_loss(h_s, h_t, s, t, ids, chosen, 1.0, None, top_k=4)[0]
    assert torch.equal(part[0], wanted[0]) and part[2] == 3 and whole[2] == 7


# -- control variates ------------------------------------------------------------------------------


def tables(far: float, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    logp = torch.randn(6, V, dtype=torch.float64, generator=g).log_softmax(-1)
    other = (logp + far * torch.randn(6, V, dtype=torch.float64, generator=g)).log_softmax(-1)
    return logp, other - logp


def moments(logp, gap, b):
    """Mean and total variance of the logit gradient −(R − b)∇log p(y) over all y, per prefix."""
    p = logp.exp()
    score = torch.eye(V, dtype=torch.float64) - p[:, None]  # [N, y, logit]
    g = -(gap - b[:, None])[..., None] * score
    mean = (p[..., None] * g).sum(1)
    return mean, (p * ((g - mean[:, None]) ** 2).sum(-1)).sum(-1)


@pytest.mark.parametrize("far", [0.1, 1.0, 3.0])
def test_no_baseline_moves_the_mean_and_the_optimal_one_has_the_least_variance(far):
    logp, gap = tables(far)
    plain, loudest = moments(logp, gap, torch.zeros(6, dtype=torch.float64))
    p = logp.exp()
    exact = p * (-gap - (p * -gap).sum(-1, keepdim=True))  # ∇_z KL(p ‖ q)
    torch.testing.assert_close(plain, exact, rtol=1e-10, atol=1e-12)
    _, least = moments(logp, gap, baseline_of(logp, gap, "optimal"))
    for kind, top_k in (("value", 0), ("value", 1), ("value", 3), ("value", V), ("value", V + 9), ("optimal", 0)):
        b = baseline_of(logp, gap, kind, top_k)
        mean, variance = moments(logp, gap, b)
        torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-12)
        assert bool((least <= variance + 1e-12).all())
    value = baseline_of(logp, gap, "value")
    assert bool((least <= loudest + 1e-12).all())
    torch.testing.assert_close((p * (gap - value[:, None])).sum(-1), torch.zeros(6, dtype=torch.float64))
    if far >= 1:  # models far apart: −KL is far from 0, and the order of the total is none ≥ value ≥ optimal
        assert loudest.sum() >= moments(logp, gap, value)[1].sum() >= least.sum()
    for move in (-0.1, 0.1):  # a minimum
        assert bool((moments(logp, gap, baseline_of(logp, gap, "optimal") + move)[1] >= least).all())


def test_value_on_one_token_is_no_baseline_and_on_all_is_minus_the_kl():
    logp, gap = tables(1.0)
    assert bool((baseline_of(logp, gap, "value", 1) == 0).all())
    kl = torch.nn.functional.kl_div((logp + gap), logp, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(baseline_of(logp, gap, "value"), -kl)
    sure = torch.full((1, V), -torch.inf, dtype=torch.float64)
    sure[0, 2] = 0.0
    assert float(baseline_of(sure, torch.ones(1, V, dtype=torch.float64), "optimal")) == 0.0  # no 0 / 0


@pytest.mark.parametrize("kind", ["none", "value", "optimal"])
@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_loss_equals_its_formula_with_gradients(setting, kind, samples, monkeypatch):
    h_s, h_t, s, t, ids = setting
    drawn = torch.randint(0, V, (7, samples - 1), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, *args, **kwargs: drawn)
    loss, _, count = sampled_loss(
        h_s, h_t, s, t, ids, MASK, 0.7, 40, baseline=kind, baseline_top_k=4 if kind == "value" else 0, samples=samples
    )
    valid = MASK.bool()
    logp, logq = (logits(h, head, 0.7)[valid].log_softmax(-1) for h, head in ((h_s, s), (h_t, t)))
    gap = (logq - logp).detach()
    b = torch.zeros(7) if kind == "none" else baseline_of(logp.detach(), gap, kind, 4 if kind == "value" else 0)
    every = torch.cat([ids[valid][:, None], drawn], dim=1)
    dense = -((gap.gather(1, every) - b[:, None]) * logp.gather(1, every)).sum() / samples / 40
    torch.testing.assert_close(loss.double(), dense, rtol=1e-4, atol=1e-6)
    assert count == 7 and not t.weight.requires_grad
    close(gradients(loss, h_s, s), gradients(dense, h_s, s))


def test_defaults_are_bit_for_bit_the_plain_loss_and_draw_nothing(setting):
    h_s, h_t, s, t, ids = setting
    state = torch.get_rng_state()
    plain = sampled_loss(h_s, h_t, s, t, ids, MASK, 1.0, None)
    one = sampled_loss(h_s, h_t, s, t, ids, MASK, 1.0, None, baseline="value", baseline_top_k=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))  # a baseline of 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("kind", ["none", "optimal"])
def test_weights_of_the_mixed_sampler_give_the_exact_gradient(setting, alpha, kind):
    """Σ_y (α q(y) + (1−α) p(y)) · gradient of the loss with y sampled, over all y at one prefix."""
    h_s, h_t, s, t, _ = setting
    own, other = (h[:1, :1].detach().expand(V, 1, H) for h in (h_s, h_t))
    own = own.clone().requires_grad_()
    every, mask = torch.arange(V)[:, None], torch.ones(V, 1)
    p, q = (logits(h[:1, 0], head, 0.7).softmax(-1)[0] for h, head in ((own.detach(), s), (other, t)))
    drawn_V1 = (alpha * q + (1 - alpha) * p).detach().float()[:, None]
    made = sampled_loss(
        own, other, s, t, every, mask, 0.7, 1, baseline=kind, weight_BT=drawn_V1,
        teacher_share_B=torch.full((V,), alpha),
    )[0]  # fmt: skip
    exact = full_loss(own[:1], other[:1], s, t, mask[:1], 1.0, 0.7, 1)[0]
    close(
        torch.autograd.grad(made, (s.weight, s.bias), retain_graph=True),
        torch.autograd.grad(exact, (s.weight, s.bias), retain_graph=True),
    )
    (h_made,) = torch.autograd.grad(made, own, retain_graph=True)
    (h_exact,) = torch.autograd.grad(exact, own)
    close([h_made.sum(0)], [h_exact.sum(0)])
    if alpha == 0.2:  # without the weights, another gradient
        wrong = sampled_loss(own, other, s, t, every, mask, 0.7, 1, baseline=kind, weight_BT=drawn_V1)[0]
        away, right = (torch.autograd.grad(x, s.bias, retain_graph=True)[0] for x in (wrong, made))
        assert float((away - right).norm()) > 0.05 * float(right.norm())


def test_weights_of_the_mixed_sampler_are_bounded_and_1_without_a_teacher(setting):
    logp = torch.tensor([-100.0, -1e-3, -3.0, -90.0])
    logq = torch.tensor([-1e-3, -300.0, -3.0, -1e-6])
    weight = mixture_weight(logp, logq, torch.full((4,), 0.2))
    torch.testing.assert_close(weight, torch.tensor([0.0, 1.25, 1.0, 0.0]), rtol=1e-5, atol=1e-12)
    assert torch.equal(mixture_weight(logp, logq, torch.zeros(4)), torch.ones(4))
    h_s, h_t, s, t, ids = setting
    plain = sampled_loss(h_s, h_t, s, t, ids, MASK, 1.0, None)
    off = sampled_loss(h_s, h_t, s, t, ids, MASK, 1.0, None, teacher_share_B=torch.zeros(B))
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))


def test_more_samples_per_prefix_come_closer_to_the_exact_gradient(setting):
    h_s, h_t, s, t, ids = setting
    exact = gradients(full_loss(h_s, h_t, s, t, MASK, 1.0, 1.0, None)[0], h_s, s)[0]
    torch.manual_seed(0)
    apart = [
        float((gradients(sampled_loss(h_s, h_t, s, t, ids, MASK, 1.0, None, samples=m)[0], h_s, s)[0] - exact).norm())
        for m in (1, 4000)
    ]
    assert apart[1] < 0.15 * apart[0]


# -- masks, splits and ends ------------------------------------------------------------------------


def losses(setting, mask, num_items=None, by_answer=False):
    h_s, h_t, s, t, ids = setting
    ends = {"num_items": num_items, "by_answer": by_answer}
    return {
        "top_k": top_k_loss(h_s, h_t, s, t, ids, mask, 1.0, top_k=4, entropy_share=0.5, **ends)[0],
        "optimal": sampled_loss(h_s, h_t, s, t, ids, mask, 1.0, baseline="optimal", **ends),
        "negative": negative_advantage_loss(h_s, s, ids, mask, 1.0, size=0.5, share=0.4, **ends),
        "opsa": negative_advantage_loss(h_s, s, ids, mask, 1.0, size=0.5, share=0.6, by_entropy=True, **ends),
    }


def test_all_masked_is_a_finite_zero_with_a_gradient(setting):
    h_s, h_t, s, t, ids = setting
    made = losses(setting, 0 * MASK)
    made["drawn"] = sampled_loss(h_s, h_t, s, t, ids, 0 * MASK, 1.0, None, baseline="value", samples=3)
    for name, (loss, entropy, count) in made.items():
        assert float(loss) == 0.0 == float(entropy) and count == 0, name
        assert all(float(g.abs().sum()) == 0 for g in gradients(loss, h_s, s)), name


@pytest.mark.parametrize("by_answer", [False, True])
def test_micro_batches_add_up_to_the_batch(setting, by_answer):
    whole = losses(setting, MASK, 7, by_answer)
    rows = [
        losses((*(x[i : i + 1] for x in setting[:2]), *setting[2:4], setting[4][i : i + 1]), MASK[i : i + 1], 7,
               by_answer)
        for i in range(B)
    ]  # fmt: skip
    for name, (loss, entropy, count) in whole.items():
        torch.testing.assert_close(sum(row[name][0] for row in rows), loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sum(row[name][1] for row in rows), entropy, rtol=1e-5, atol=1e-5)
        assert sum(row[name][2] for row in rows) == count


def test_negative_advantage_lowers_the_least_likely_tokens_alone(setting):
    h_s, _, s, _, ids = setting
    loss, _, count = negative_advantage_loss(h_s, s, ids, MASK, 1.0, None, size=0.5, share=0.4)
    logp = logits(h_s, s).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    chosen = [logp[0, logp[0].argsort()[:2]].sum(), logp[1, :2].min()]
    dense = 0.5 * sum(chosen) / 7
    torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=1e-6)
    close(gradients(loss, h_s, s), gradients(dense, h_s, s))
    assert count == 7
    assert lowest_share(logp.detach(), MASK, 1.0).equal(MASK.bool())


def test_the_advantage_grows_with_the_entropy_of_the_chosen_tokens(setting):
    h_s, _, s, _, ids = setting
    loss = negative_advantage_loss(h_s, s, ids, MASK, 0.7, None, size=0.5, share=0.6, by_entropy=True)[0]
    logp_all = logits(h_s, s, 0.7).log_softmax(-1)
    logp, entropy = logp_all.gather(-1, ids[..., None])[..., 0], -(logp_all.exp() * logp_all).sum(-1).detach()
    dense = 0.0
    for row, length in ((0, 5), (1, 2)):
        chosen = logp[row, :length].argsort()[: math.ceil(0.6 * length)]
        h = entropy[row, chosen]
        dense = dense + (0.5 * (1 + (h - h.min()) / (h.max() - h.min())) * logp[row, chosen]).sum() / 7
    torch.testing.assert_close(loss.double(), dense, rtol=1e-4, atol=1e-6)
    close(gradients(loss, h_s, s), gradients(dense, h_s, s))
    chosen = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    factor = entropy_factor(torch.tensor([[1.0, 1.0, 3.0], [2.0, 1.0, 0.0], [1.0, 2.0, 3.0]]), chosen)
    assert factor.tolist() == [[2.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # all entropies agree


def test_first_occurrence_of_each_token_is_masked_once_per_answer():
    ids = torch.tensor([[7, 5, 7, 6, 6], [9, 7, 6, 7, 7], [5, 5, 5, 5, 5]])
    valid = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert first_occurrences(ids, valid, [[7], [6, 9]]).int().tolist() == [
        [1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert "<" in make_tokenizer().get_vocab()  # the runs of tests/distill/test_objective_runs.py mask it


# -- β, settings, and the table --------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_betas_are_the_generators_of_the_survey(setting, beta):
    """D_f(P ‖ Q) = E_Q f(P/Q), P the teacher, Q the student; its Jensen–Shannon is twice TRL's."""
    h_s, h_t, s, t, _ = setting
    p, q = (logits(h, head)[MASK.bool()].softmax(-1) for h, head in ((h_t, t), (h_s, s)))
    u = p / q
    mixed = beta * u + 1 - beta
    f = {0.0: u * u.log(), 1.0: -u.log()}.get(beta, beta * u * u.log() - mixed * mixed.log())
    loss = full_loss(h_s, h_t, s, t, MASK, beta, 1.0, None)[0]
    torch.testing.assert_close(loss.double(), (q * f).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    if beta == 0.5:
        survey = u * u.log() - (u + 1) * ((u + 1) / 2).log()
        torch.testing.assert_close(2 * loss.double(), (q * survey).sum(-1).mean(), rtol=1e-4, atol=1e-6)


def test_normalized_betas_tend_to_the_two_kls(setting):
    h_s, h_t, s, *_ = setting
    near_s = (h_s + 0.3 * h_t).detach()
    value = {
        beta: float(full_loss(h_s, near_s, s, s, MASK, beta, 1.0, None)[0].detach()) for beta in (0, 0.001, 0.999, 1)
    }
    for near, end in ((0.001, 0), (0.999, 1)):
        assert value[near] < 0.01 * value[end]
        assert value[near] * interior_factor(near) == pytest.approx(value[end], rel=0.03)
        assert interior_factor(end) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"baseline": "value"},
        {"samples_per_prefix": 2},
        {"teacher_top_k": 8},
        {"highest_entropy_share": 0.2},
        {"negative_advantage": 1.0},
        {"lowest_logp_share": 0.5},
        {"entropy_advantage": True},
        {"normalize_beta": True},
        {"normalize_beta": True, "loss_type": "teacher_top_k"},
        {"baseline_top_k": 5, "loss_type": "sampled"},
        {"baseline": "best", "loss_type": "sampled"},
        {"token_mask": "all"},
        {"teacher_top_k": 1, "loss_type": "teacher_top_k"},
        {"beta": 0.5, "loss_type": "teacher_top_k"},
        {"beta": 0.5, "loss_type": "negative_advantage"},
        {"lambda_extrapolation": 1.25, "loss_type": "negative_advantage"},
    ],
)
def test_flags_that_an_objective_does_not_read_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OPDConfig(**bad)


def test_top_k_without_its_sampler_warns(caplog):
    OPDConfig(loss_type="teacher_top_k", top_p=0.9)
    assert not caplog.records
    OPDConfig(loss_type="teacher_top_k")
    assert "--top_p 0.9" in caplog.text


def test_methods_lists_every_objective_and_filters(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(METHODS) == len({row["name"] for row in rows})
    flags = " ".join(row["flags"] for row in rows)
    assert all(f"--loss_type {loss}" in flags for loss in LOSSES)
    assert {"baseline", "samples_per_prefix", "normalize_beta"} <= {name for name in ONLY_FOR if f"--{name}" in flags}
    assert all(row["kind"] in KINDS and set(row["needs"]) <= set(NEEDS) for row in rows)
    assert main(["methods", "--kind", "objective", "--without", "teacher logits"]) == 0
    shown = capsys.readouterr().out
    assert "negative advantage" in shown and "2603.25562" in shown and "vOPD" not in shown and "GRPO" not in shown
