"""Health metrics on cases with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from effopd.distill import token_rows
from effopd.distill.divergence import Answers, Head, Predictions
from effopd.distill.health import HealthProbe, health_metrics, spread_subset

N, V = 12, 40


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, V, generator=g), torch.randn(N, V, generator=g), torch.randint(0, V, (N,), generator=g)


POSITION = torch.arange(N) / N


def test_identical_models(logits):
    student, _, targets = logits
    m = health_metrics(student, student, targets, POSITION)
    assert m["overlap_ratio"] == pytest.approx(1.0)
    for name in ("reverse_kl", "sampled_reverse_kl", "entropy_gap", "overlap_advantage", "reverse_kl_q3"):
        assert m[name] == pytest.approx(0.0, abs=1e-6)
    assert m["student_overlap_mass"] == pytest.approx(m["teacher_overlap_mass"])


def test_against_dense_definitions(logits):
    student, teacher, targets = logits
    m = health_metrics(student, teacher, targets, POSITION)
    p, q = student.softmax(-1), teacher.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert m["reverse_kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert m["reverse_kl_q2"] == pytest.approx(float(kl[3:6].mean()), rel=1e-5)
    assert m["teacher_entropy"] == pytest.approx(float(-(q * q.log()).sum(-1).mean()), rel=1e-5)
    gap = torch.stack([(p[i, y] / q[i, y]).log() for i, y in enumerate(targets)])
    assert m["sampled_reverse_kl"] == pytest.approx(float(gap.mean()), rel=1e-4)
    overlaps = [set(p[i].topk(16).indices.tolist()) & set(q[i].topk(16).indices.tolist()) for i in range(N)]
    assert m["overlap_ratio"] == pytest.approx(sum(map(len, overlaps)) / (16 * N))
    mass = sum(float(p[i, list(o)].sum()) for i, o in enumerate(overlaps)) / N
    assert m["student_overlap_mass"] == pytest.approx(mass, rel=1e-5)


def test_tiles_and_functions_of_rows_change_nothing(logits, monkeypatch):
    student, teacher, targets = logits
    whole = health_metrics(student, teacher, targets, POSITION)
    monkeypatch.setattr(token_rows, "_TILE", 5 * V)
    tiled = health_metrics(student.__getitem__, teacher.__getitem__, targets, POSITION)
    assert tiled == pytest.approx(whole, rel=1e-6)


def test_vocabulary_order_does_not_matter(logits):
    student, teacher, targets = logits
    order = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    shuffled = health_metrics(student[:, order], teacher[:, order], order.argsort()[targets], POSITION)
    for name, value in health_metrics(student, teacher, targets, POSITION).items():
        assert shuffled[name] == pytest.approx(value, rel=1e-4)


def test_disjoint_supports_have_no_advantage():
    student, teacher = torch.full((2, 40), -50.0), torch.full((2, 40), -50.0)
    student[:, :16], teacher[:, 16:32] = 0.0, 0.0
    m = health_metrics(student, teacher, torch.zeros(2, dtype=torch.long), torch.zeros(2))
    assert m["overlap_ratio"] == 0.0 and math.isnan(m["overlap_advantage"])


def test_spread_subset_is_valid_deterministic_and_bounded():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    index, position = spread_subset(mask, 3)
    assert len(index) == 3 and mask.reshape(-1)[index].all()
    everything, position = spread_subset(mask, 100)
    assert everything.tolist() == [0, 1, 2, 3, 6, 7]
    assert position.tolist() == [0, 0.25, 0.5, 0.75, 0, 0.5]
    assert torch.equal(spread_subset(mask, 3)[0], index)


class State:
    logging_steps = 2
    global_step = 0


def probed(tokens: int = 100, **answers):
    """A probe, and the arguments of a micro-batch of two rows of three answer tokens."""
    g = torch.Generator().manual_seed(0)
    heads = [Head(torch.randn(V, 4, generator=g), None, 1.0, None) for _ in range(2)]
    student, teacher = (Predictions(torch.randn(2, 3, 4, generator=g), head) for head in heads)
    ids_BT, mask_BT = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    micro_batch = torch.nn.Identity(), student, teacher, Answers(ids_BT, mask_BT, **answers)
    return HealthProbe(tokens, 0.5), micro_batch, tuple(heads)


def test_a_probe_measures_the_first_micro_batch_of_logged_steps():
    probe, micro_batch, heads = probed()
    state = State()
    assert [probe.due(state) for state.global_step in range(4)] == [False, True, False, True]
    probe.after_loss(*micro_batch, due=False)
    assert probe.after_step(lambda: heads) == {}
    probe.after_loss(*micro_batch, due=True)
    other = (micro_batch[0], micro_batch[1].to("cpu")._replace(hidden_BTH=torch.zeros(2, 3, 4)), *micro_batch[2:])
    probe.after_loss(*other, due=True)  # a later one of the step changes nothing
    measured = probe.after_step(lambda: heads)
    valid = micro_batch[3].mask_BT.bool()
    rows = [heads[i].logits(micro_batch[i + 1].hidden_BTH[valid], 0.5) for i in range(2)]
    position = torch.tensor([0, 1 / 3, 2 / 3, 0, 0.5])
    expected = health_metrics(*rows, micro_batch[3].ids_BT[valid], position)
    assert measured == pytest.approx({f"health/{name}": value for name, value in expected.items()}, nan_ok=True)
    assert probe.after_step(lambda: heads) == {}
    assert not HealthProbe(0, 1.0).due(state)


def test_a_probe_compares_the_sampler_over_all_micro_batches_of_a_step():
    sampler_BT = torch.full((2, 3), math.nan)
    sampler_BT[0] = torch.tensor([-1.0, -2.0, -3.0])
    sampler_BT[1, 2] = 5.0  # masked
    probe, micro_batch, heads = probed(sampler_logps_BT=sampler_BT)
    for _ in range(2):
        probe.after_loss(*micro_batch, due=False)
    logp = heads[0].logits(micro_batch[1].hidden_BTH[0], 0.5).log_softmax(-1)
    gaps = [abs(float(logp[i, y]) - float(sampler_BT[0, i])) for i, y in enumerate((3, 4, 5))]
    assert probe.after_step(lambda: heads) == {"health/sampler_logp_gap": pytest.approx(sum(gaps) / 3, rel=1e-5)}
    assert probe.after_step(lambda: heads) == {}
