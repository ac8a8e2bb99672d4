"""`RayKL`: the predicted KL is the true one where hidden states are linear, and at known scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import linear

from effopd.models.head import Head
from effopd.models.polynomials import lagrange_weights, leading_weights, root_product
from effopd.models.ray import MovingHead, RayKL, newton_scale

N, H, V = 23, 6, 37
SCALES = [-1.0, 0.0, 0.3, 1.0, 4.0, 17.0]
#: (bias, factor, soft cap)
FORMS = [(False, 1.0, None), (True, 0.3, None), (True, 1.7, 2.5)]


class Line:
    """A softmax model whose hidden states are exactly linear in s; float64."""

    def __init__(self, seed=0, form=FORMS[0], moves=True, curved=0.0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape, size=1.0):
            return (size * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

        biased, self.scale, self.softcap = form
        self.h, self.dh, self.ddh = draw(N, H), draw(N, H, size=0.2), draw(N, H, size=curved)
        self.w, self.b = draw(V, H), draw(V) if biased else None
        self.dw = draw(V, H, size=0.1) if moves else None
        self.db = draw(V, size=0.3) if moves and biased else None
        self.teacher = Head(draw(V, H), draw(V) if biased else None, 1.3, None)
        self.h_teacher = draw(N, H)

    def hidden(self, s):
        return self.h + s * self.dh + s * s * self.ddh

    def logits(self, s, temperature=1.0):
        weight = self.w if self.dw is None else self.w + s * self.dw
        bias = self.b if self.db is None else self.b + s * self.db
        z = self.scale * linear(self.hidden(s), weight, bias)
        return (z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)) / temperature

    def kl(self, s, temperature=1.0):
        """Dense reference [N]."""
        p = self.logits(s, temperature).log_softmax(-1)
        z = self.teacher.scale * linear(self.h_teacher, self.teacher.weight, self.teacher.bias) / temperature
        return (p.exp() * (p - z.log_softmax(-1))).sum(-1)

    def ray(self, known=(0.0, 1.0), **settings):
        head = MovingHead(Head(self.w, self.b, self.scale, self.softcap), self.dw, self.db)
        ray = RayKL(head, self.teacher, self.h_teacher, **settings)
        for s in known:
            ray.add(s, self.hidden(s))
        return ray


@pytest.mark.parametrize(("form", "moves"), itertools.product(FORMS, [True, False]))
def test_linear_hidden_states_are_predicted_exactly(form, moves):
    line = Line(form=form, moves=moves)
    for temperature in (1.0, 0.7):
        for known in ((0.0, 1.0), (0.0, 2.0), (-1.0, 0.5, 3.0)):
            predicted = line.ray(known, temperature=temperature).kl(SCALES)
            true = torch.stack([line.kl(s, temperature) for s in SCALES])
            assert torch.allclose(predicted, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("form", "moves"), itertools.product(FORMS, [True, False]))
def test_slope_and_curvature_are_those_of_autograd(form, moves):
    line = Line(form=form, moves=moves, curved=0.05)
    ray = line.ray((0.0, 1.0, 3.0))  # a parabola through three scales is exact
    for at in (0.0, 0.6, 5.0):
        s = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(line.kl(s).mean(), s, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, s)
        found = ray.derivatives(at)
        assert found.kl.mean().item() == pytest.approx(line.kl(at).mean().item(), rel=1e-9)
        assert found.slope.mean().item() == pytest.approx(slope.item(), rel=1e-8)
        assert found.curvature.mean().item() == pytest.approx(curvature.item(), rel=1e-8)


def test_curvature_of_linear_logits_is_the_formula_of_slope_and_variance():
    line = Line(moves=False)
    p, r = line.logits(0.0).softmax(-1), line.logits(0.0).log_softmax(-1)
    r = r - (line.teacher.scale * linear(line.h_teacher, line.teacher.weight)).log_softmax(-1)
    d = line.logits(1.0) - line.logits(0.0)
    d = d - (p * d).sum(-1, keepdim=True)
    variance = (p * d * d).sum(-1)
    found = line.ray().derivatives()
    assert torch.allclose(found.slope, (p * d * r).sum(-1), rtol=1e-9)
    assert torch.allclose(found.gauss_newton, variance, rtol=1e-9)
    assert torch.allclose(found.curvature, variance + (p * d * d * r).sum(-1) - variance * (p * r).sum(-1), rtol=1e-8)


def test_the_optimum_of_a_line_takes_three_forwards():
    line = Line(seed=3)
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([s], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = line.kl(s).mean()
        value.backward()
        return value

    optimizer.step(closure)
    best = line.ray().best([-8, -4, -2, -1, 0, 1, 2, 4, 8], tolerance=1e-6)
    assert best == pytest.approx(s.item(), abs=1e-6) and abs(best) > 0.1
    assert line.kl(best).mean() <= line.kl(0.0).mean()


@pytest.mark.parametrize("known", [(0.0, 1.0), (0.0, 4.0), (0.0, 1.0, 8.0)])
def test_the_prediction_is_exact_at_every_known_scale(known):
    line = Line(form=FORMS[2], curved=0.3)
    predicted = line.ray(known).kl(known)
    assert torch.allclose(predicted, torch.stack([line.kl(s) for s in known]), rtol=1e-10)
    assert not torch.allclose(line.ray((0.0, 1.0)).kl([4.0])[0], line.kl(4.0), rtol=0.01)  # and nowhere else


def test_hidden_states_that_are_not_used_may_be_infinite():
    line = Line()
    ray = line.ray((0.0, 1.0))
    ray.add(64.0, torch.full((N, H), torch.inf, dtype=torch.float64))
    assert torch.allclose(ray.kl([1.0], nodes=(0.0, 1.0))[0], line.kl(1.0), rtol=1e-9)
    assert torch.allclose(ray.kl([0.0])[0], line.kl(0.0), rtol=1e-9)
    ray.drop(64.0)
    assert ray.known == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiles_do_not_change_the_result(dtype):
    line = Line(form=FORMS[2], dtype=dtype)
    whole, tolerance = line.ray(tile=(N, V)), 1e-11 if dtype is torch.float64 else 1e-4
    for tile in ((1, V), (N, 1), (5, 8), (1000, 1000)):
        cut = line.ray(tile=tile)
        assert torch.allclose(cut.kl(SCALES), whole.kl(SCALES), rtol=tolerance, atol=tolerance)
        for one, other in zip(cut.derivatives(0.3), whole.derivatives(0.3), strict=True):
            assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)
    assert whole.kl([1.0]).dtype == dtype


def test_a_common_shift_of_all_logits_cancels_in_float32():
    """A token direction that moves every logit alike changes no probability."""
    line = Line(moves=False, dtype=torch.float32)
    expected = line.ray(tile=(N, 5)).derivatives()
    line.db = torch.full((V,), 3e3)
    line.b = torch.zeros(V)
    found = line.ray(tile=(N, 5)).derivatives()
    assert torch.allclose(found.gauss_newton, expected.gauss_newton, rtol=5e-3, atol=1e-5)
    assert torch.allclose(found.curvature, expected.curvature, rtol=5e-3, atol=1e-3)


def test_the_nodes_around_a_scale():
    ray = Line().ray((0.0, 1.0, 4.0, 16.0))
    assert ray.around(2.0) == ray.around(4.0) == (0.0, 1.0, 4.0) and ray.around(64.0) == (0.0, 16.0)
    assert ray.around(0.5) == ray.around(0.0) == ray.around(-1.0) == (0.0, 1.0)
    line = Line(curved=0.02)
    ray = line.ray((0.0, 1.0, 4.0, 16.0))
    true = torch.stack([line.kl(s) for s in (2.0, 10.0)])
    assert torch.allclose(ray.kl([2.0, 10.0], nodes=ray.around), true, rtol=1e-9)  # parabolas are exact here


def test_a_known_scale_alone_moves_the_head_only():
    line = Line(form=FORMS[1])
    line.dh = torch.zeros_like(line.dh)
    predicted = line.ray((0.0,)).kl(SCALES)
    assert torch.allclose(predicted, torch.stack([line.kl(s) for s in SCALES]), rtol=1e-9, atol=1e-9)


def test_a_head_between_two_points():
    line = Line(form=FORMS[1])
    start = Head(line.w, line.b, 1.0, None)
    moved = MovingHead.between(Head(line.w - line.dw, line.b - line.db, 1.0, None), start)
    assert torch.allclose(moved.weight_delta, line.dw) and torch.allclose(moved.bias_delta, line.db)
    still = MovingHead.between(Head(line.w.clone(), line.b, 1.0, None), start)
    assert still.weight_delta is None and still.bias_delta is None


def test_the_best_scale_can_be_an_end_of_the_grid():
    line = Line(seed=3)
    best = line.ray().best([-8, 8], tolerance=1e-6)
    assert line.ray().best([best + 1, best + 2]) == best + 1
    assert line.ray().best([best - 2, best - 1]) == best - 1
    assert newton_scale(-2.0, 4.0) == 0.5 and newton_scale(1.0, 0.0) is None


def test_polynomials():
    x, nodes = 0.7, [0.0, 1.0, 2.5, -3.0]

    def f(x):
        return 2 * x**3 - x**2 + 5

    weights = lagrange_weights(x, nodes)
    assert sum(w.value * f(n) for w, n in zip(weights, nodes, strict=True)) == pytest.approx(f(x))
    assert sum(w.first * f(n) for w, n in zip(weights, nodes, strict=True)) == pytest.approx(6 * x * x - 2 * x)
    assert sum(w.second * f(n) for w, n in zip(weights, nodes, strict=True)) == pytest.approx(12 * x - 2)
    assert sum(w * f(n) for w, n in zip(leading_weights(nodes), nodes, strict=True)) == pytest.approx(2)
    assert [w.value for w in lagrange_weights(2.5, nodes)] == [0, 0, 1, 0]
    assert root_product(0.0, [0.0, 1.0]) == (0.0, -1.0, 2.0)
