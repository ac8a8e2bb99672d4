"""Prune-OPD: known answers, the length controller, and its state in runs with a look-ahead."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_run import make_trainer
from helpers.traces import Interrupt, parameters, same, with_rejecting_search

from effopd import OPDConfig
from effopd.common.files import read_rows
from effopd.distill.divergence import Head, full_loss
from effopd.distill.policy_gradient import sampled_loss
from effopd.distill.prune import (
    Controller,
    Limits,
    reliability,
    reliable_lengths,
    token_weights,
    top_k_overlap,
)
from effopd.distill.prune_callback import PRUNE_FILE
from effopd.distill.top_k import top_k_loss
from effopd.errors import CheckpointError, ConfigError

B, T, H, V = 3, 5, 8, 20
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
SETTINGS = {
    "rollout_horizon": "prune", "prune_min_length": 2, "prune_start_length": 5, "prune_step": 2, "prune_margin": 0,
    "prune_patience": 1, "prune_threshold": 0.6, "prune_drop": 0.3, "prune_top_k": 4,
}  # fmt: skip
RUN = {"max_steps": 6, "save_steps": 2, "eval_strategy": "no", "max_completion_length": 10}


# -- formulas --------------------------------------------------------------------------------------


def test_known_answers():
    overlap = torch.tensor([[1, 1, 0.5, 1, 0.5]])
    r = reliability(overlap < 0.7, 0.01)
    torch.testing.assert_close(r, torch.tensor([[1, 1, 0.99, 0.99, 0.98]]))
    torch.testing.assert_close(token_weights(r, 0.5, normalize=False), r + 0.5)
    torch.testing.assert_close(token_weights(r, 0.5), (r + 0.5) / 1.5)
    r = reliability(torch.ones(1, 120, dtype=torch.bool), 0.01)  # the hundredth bad token ends the reliable part
    assert r[0, 98] > 1e-3 and r[0, 99] == 0 and token_weights(r, 0.5, normalize=False)[0, 99] == 0.5
    assert reliable_lengths(r, torch.ones(1, 120, dtype=torch.bool)).tolist() == [99]
    none = reliability(torch.zeros(2, 4, dtype=torch.bool), 0.01)
    assert token_weights(none, 0.5).eq(1).all() and token_weights(none, 0.0, normalize=False).eq(1).all()


def test_overlap_against_sets():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    student, teacher = Head(draw(V, H), None, 1.0, None), Head(draw(V, H), draw(V), 0.5, 20.0)
    own, other = draw(6, H), draw(6, H)
    sets = [
        [set(row.topk(7).indices.tolist()) for row in head.logits(hidden)]
        for head, hidden in ((student, own), (teacher, other))
    ]
    wanted = torch.tensor([len(a & b) / 7 for a, b in zip(*sets, strict=True)])
    assert top_k_overlap(own, other, student, teacher, 7).equal(wanted) and 0 < wanted.mean() < 1
    assert top_k_overlap(own, own, student, student, 7).eq(1).all()
    assert top_k_overlap(own, other, student, teacher, 99).eq(1).all()  # the whole vocabulary
    assert len(top_k_overlap(own[:0], other[:0], student, teacher, 7)) == 0


def test_the_length_follows_the_hits():
    state, limits, seen = Controller(2048), Limits(1024, 2300), []
    for share in (0.1, 1.0, 0.5, 0, 0.09, 0, 0, 0, 0.2, 0, 0, 0):
        state = state.next(share, limits)
        seen.append(state.length)
    assert seen == [2148, 2248, 2300, 2300, 2300, 2200, 2200, 2200, 2300, 2300, 2300, 2200]
    assert limits.hit_length(2048) == 1948 and limits.hit_length(1024) == 1024
    for _ in range(99):
        state = state.next(0, limits)
    assert state.length == 1024


def test_weights_in_every_loss():
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    student, teacher = Head(draw(V, H), None, 1.0, None), Head(draw(V, H), None, 1.0, None)
    h_s, h_t, ids = draw(B, T, H).requires_grad_(), draw(B, T, H), torch.randint(0, V, (B, T), generator=g)
    losses = {
        "full": lambda mask, **more: full_loss(h_s, h_t, student, teacher, mask, 1.0, 0.7, 7, **more),
        "sampled": lambda mask, **more: sampled_loss(h_s, h_t, student, teacher, ids, mask, 0.7, 7, **more),
        "top_k": lambda mask, **more: top_k_loss(h_s, h_t, student, teacher, ids, mask, 0.7, 7, top_k=4, **more)[0],
    }
    for loss in losses.values():
        for by_answer in (False, True):
            gradient = lambda mask, **more: torch.autograd.grad(loss(mask, **more)[0], h_s)[0]  # noqa: B023, E731
            weight = torch.where(torch.arange(T) < 2, 1.5, 0.0).expand(B, T)
            whole, weighted = gradient(MASK, by_answer=by_answer), gradient(
                MASK, by_answer=by_answer, weight_BT=weight
            )  # fmt: skip
            torch.testing.assert_close(weighted, whole * weight[..., None], rtol=1e-5, atol=1e-7)
            assert weighted.abs().sum() > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"rollout_horizon": "prune"}, "prune_start_length=2048.*max_completion_length=256"),
        ({"prune_drop": 0.1}, "is read only with rollout_horizon='prune'"),
        ({**SETTINGS, "prune_min_length": 6, "max_completion_length": 10}, "prune_min_length=6"),
        ({**SETTINGS, "max_completion_length": 10, "loss_type": "negative_advantage"}, "has no teacher"),
        ({**SETTINGS, "max_completion_length": 10, "prune_threshold": 1.5}, "prune_threshold"),
        ({**SETTINGS, "max_completion_length": 10, "generation_kwargs": {"max_length": 5}}, "max_length"),
    ],
)
def test_bad_settings(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(output_dir=str(tmp_path), use_cpu=True, **{"max_completion_length": 256} | flags)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run; the same with rejected searches, interrupted and resumed in the middle."""
    root = tmp_path_factory.mktemp("prune")
    whole = make_trainer(root / "whole", **RUN, **SETTINGS)
    whole.train()
    part = with_rejecting_search(make_trainer(root / "part", **RUN, **SETTINGS))
    part.add_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        part.train()
    resumed = with_rejecting_search(make_trainer(root / "part", **RUN, **SETTINGS))
    resumed.train(resume_from_checkpoint=True)
    return root, whole, resumed


@pytest.mark.slow
def test_rejected_jumps_and_an_interruption_leave_no_trace(runs):
    root, whole, resumed = runs
    assert same(parameters(whole), parameters(resumed))
    searches = list(read_rows(root / "part" / "searches.jsonl"))
    assert [row["step"] for row in searches] == [1, 2, 4] and not any(row["accepted_scale"] for row in searches)
    rows = [list(read_rows(root / name / "metrics.jsonl")) for name in ("whole", "part")]
    for name in ("horizon", "prune/hit_share", "prune/weight", "prune/overlap", "prune/bad_share"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]], name


@pytest.mark.slow
def test_rows_follow_the_formulas(runs):
    root, whole, _ = runs
    state, limits = Controller(5), Limits(2, 10, 2, 0, 0.1, 1)
    rows = list(read_rows(root / "whole" / "metrics.jsonl"))
    for row in rows:
        assert row["horizon"] == state.length and row["completions/max_length"] <= state.length
        assert row["prune/reliable_length"] <= state.length and 0.5 / 1.5 <= row["prune/weight"] < 1
        state = state.next(row["prune/hit_share"], limits)
    assert len({row["horizon"] for row in rows}) > 1
    assert whole.generation_config.max_new_tokens == 10
    saved = json.loads((root / "whole" / "checkpoints" / "step-000006" / PRUNE_FILE).read_text())
    assert saved["length"] == state.length
    # an update does not span lengths that differ by more than 20 %
    anchors = {row["step"]: row["anchor_step"] for row in read_rows(root / "part" / "searches.jsonl")}
    lengths = [row["horizon"] for row in rows]
    for step, anchor in anchors.items():
        assert all(abs(each - lengths[anchor]) <= 0.2 * lengths[anchor] for each in lengths[anchor:step])


@pytest.mark.slow
def test_without_a_bad_token_it_is_plain_opd(tmp_path):
    flags = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "gradient_accumulation_steps": 2}
    plain = make_trainer(tmp_path / "plain", **flags)
    plain.train()
    never = SETTINGS | {"prune_threshold": 0.0, "prune_start_length": 6, "prune_margin": 9}
    pruned = make_trainer(tmp_path / "pruned", **flags, **never)
    pruned.train()
    assert same(parameters(plain), parameters(pruned))


def test_a_checkpoint_without_the_length_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, **RUN, **SETTINGS)
    with pytest.raises(CheckpointError, match="without --rollout_horizon prune"):
        trainer.prune.check_resume(tmp_path)
    (tmp_path / PRUNE_FILE).write_text('{"length": 4}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.prune.check_resume(tmp_path)
