"""What a search shares: the teacher's predictions with the loss, its logits among candidates."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.tiny_models import make_model

from effopd.distill import search_kl
from effopd.distill.search_kl import Target, in_float32_on_cpu, reverse_kl
from effopd.distill.served.support import Support
from effopd.distill.served.teacher import scored_part, scored_support
from effopd.distill.teachers.kept import Kept, for_checkpoint, from_checkpoint, kept_or_made, make_ahead, share
from effopd.distill.teachers.manifest import ONLY
from effopd.distill.teachers.several import Part, TeacherSet, answered, answered_in, rows_by_teacher
from effopd.models.head import Head
from effopd.models.token_batch import TokenBatch

N, H, V = 7, 6, 23


@pytest.mark.parametrize(("scale", "softcap", "temperature", "bias"), [(1.0, None, 1.0, False), (0.7, 3.0, 0.8, True)])
def test_the_kl_from_kept_logits_is_that_of_the_dense_formula(scale, softcap, temperature, bias, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(search_kl, "TILE", (3, 5))  # several tiles, the last ones smaller
    heads = [Head(torch.randn(V, H), torch.randn(V) if bias else None, scale, softcap) for _ in range(2)]
    hidden = [torch.randn(N, H) for _ in range(2)]
    logp, logq = (
        head.logits(h.double(), temperature).double().log_softmax(-1) for head, h in zip(heads, hidden, strict=True)
    )
    target = Target(hidden[1])
    target.keep_logits(heads[1], temperature)
    logits = target.logits
    value_N = reverse_kl(hidden[0], heads[0], logits, temperature)
    torch.testing.assert_close(value_N.double(), (logp.exp() * (logp - logq)).sum(-1), rtol=1e-5, atol=1e-6)
    assert reverse_kl(hidden[0][:0], heads[0], (logits[0][:0], logits[1][:0]), temperature).shape == (0,)


def test_logits_are_kept_up_to_a_size_where_the_loss_projects_in_float32(monkeypatch):
    head, hidden = Head(torch.randn(V, H), None, 1.0, None), torch.randn(N, H)
    for size, kept in ((4 * N * V - 1, False), (4 * N * V, True)):
        monkeypatch.setattr(search_kl, "MOST_BYTES", size)
        target = Target(hidden)
        target.keep_logits(head, 1.0)
        assert (target.logits is not None) == kept
    assert in_float32_on_cpu(hidden) and not in_float32_on_cpu(hidden.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not in_float32_on_cpu(hidden)


def test_predictions_are_released_after_the_last_reader():
    parts, other, rollouts = [Part(ONLY, None, object())], [Part(ONLY, None, object())], {}
    assert kept_or_made(rollouts, lambda: other) is other
    assert make_ahead(rollouts, lambda: parts) is parts and make_ahead(rollouts, lambda: other) is parts
    (kept,) = rollouts.values()
    assert isinstance(kept, Kept)  # no tensor, list or mapping, so that no wrapper copies or casts what is in it
    assert kept_or_made(rollouts, lambda: other) is parts and kept.parts is None
    assert kept_or_made(rollouts, lambda: other) is other

    shared = {"completion_ids": 1}
    share(shared, 2)
    assert kept_or_made(shared, lambda: parts) is parts and kept_or_made(shared, lambda: other) is parts
    free = []  # released predictions have their price again
    assert kept_or_made(shared, lambda: other, lambda: nullcontext(free.append(True))) is other and not free
    assert for_checkpoint(shared) == {"completion_ids": 1}
    make_ahead(shared, lambda: parts)
    saved = for_checkpoint(shared)
    assert saved == {"completion_ids": 1, "teacher_parts_made": True}
    assert for_checkpoint({"completion_ids": 1}) == {"completion_ids": 1}
    restored = from_checkpoint(saved, 2)
    assert restored.keys() == {"completion_ids", *rollouts} and restored["completion_ids"] == 1
    for _ in range(3):  # the first two losses share those that were kept, the third is charged
        kept_or_made(restored, lambda: parts, lambda: nullcontext(free.append(True)))
    assert free == [True]


def batch_of(rows: int) -> TokenBatch:
    torch.manual_seed(1)
    prompts = [torch.randint(4, 40, (2 + row % 3,)).tolist() for row in range(rows)]
    answers = [torch.randint(4, 40, (1 + (5 * row) % 4,)).tolist() for row in range(rows)]
    return TokenBatch.of(prompts, answers, 0).with_teachers(torch.tensor([1, 0, 2, 1, 0, 2, 1])[:rows])


@pytest.mark.parametrize("scored", [1, 4, 7])
def test_of_several_teachers_the_first_rows_are_those_asked_for(scored):
    """Teacher c has rows 2 and 5 only, so it has none among one scored row."""
    models = {"a": make_model(1).eval(), "b": make_model(2).eval(), "c": make_model(3).eval()}
    teachers = TeacherSet(models, "teacher", lambda model: model)
    whole = batch_of(7)
    first, parts = whole.first(scored), []
    for index, rows_B in rows_by_teacher(whole.teacher_B):
        model, (own, _) = teachers.model(teachers.labels[index]), whole.of_teacher(index)
        with torch.no_grad():
            hidden_N = own.hidden(model)
        hidden_BTH = hidden_N.new_zeros(*own.scored_BT.shape, hidden_N.shape[-1])
        hidden_BTH[own.scored_BT] = hidden_N
        predictions = type("Predictions", (), {"hidden_BTH": hidden_BTH, "head": Head.of(model, 64)})()
        parts.append(Part(teachers.labels[index], rows_B, predictions))
    made = [each for part in parts if (each := answered_in(part, first, teachers.labels.index(part.label)))]
    (expected,) = answered(teachers, lambda model: model, [first], 64)
    assert [each.label for each in made] == [each.label for each in expected]
    for ours, its in zip(made, expected, strict=True):
        assert torch.equal(ours.index_N, its.index_N)
        torch.testing.assert_close(ours.hidden_NH, its.hidden_NH, rtol=1e-5, atol=1e-6)


def test_of_a_servers_reply_the_first_rows_are_those_asked_for():
    whole = batch_of(5)
    shape = whole.scored_BT.shape
    reply = Support(torch.arange(5 * shape[1] * 2).reshape(*shape, 2), torch.rand(*shape, 2), torch.rand(shape))
    first = whole.first(3)

    class Server:
        def support(self, batch):
            return Support(*(each[:3] for each in reply))

    expected, tokens = scored_support(Server(), first)
    support, targets = scored_part(reply, first)
    assert torch.equal(targets, tokens) and len(targets) == sum(first.lengths)
    assert all(torch.equal(ours, its) for ours, its in zip(support, expected, strict=True))
