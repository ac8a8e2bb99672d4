"""Rollout horizons: the schedule, what is generated, what is not touched, and resuming in the
middle.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_model
from helpers.tiny_run import make_trainer
from helpers.traces import parameters, same

from effopd import EffOPDConfig, OPDConfig
from effopd.common.files import read_rows
from effopd.distill.divergence import answer_kls, reverse_kl_of_completions
from effopd.distill.horizon import HorizonCallback, esr, popd, topd
from effopd.errors import ConfigError

FAST = {"max_steps": 6, "save_strategy": "no", "eval_strategy": "no"}


def rows(root):
    return list(read_rows(root / "metrics.jsonl"))


def test_schedules():
    assert [topd(24, f) for f in (0.01, 0.1, 0.25, 1.0)] == [1, 3, 6, 24]
    tokens = OPDConfig(rollout_horizon="esr", use_cpu=True).horizon_tokens
    assert [esr(length, tokens) for length in (64, 256)] == [64, 100]
    assert [popd(s, 12, 6, 1 / 3, 2, 0.5) for s in range(8)] == [2, 2, 2, 4, 4, 4, 6, 6]
    for total in (1, 5, 96, 1000):
        for stages in (1, 3, 8):
            lengths = [popd(s, total, 4096, 0.125, stages, 0.5) for s in range(total + 1)]
            assert lengths == sorted(lengths) and lengths[-1] == 4096
            assert lengths[0] == 512 or total == 1
            assert len(set(lengths)) <= stages + 1


def test_rounding_makes_no_token_and_no_step():
    for percent in range(1, 101):
        assert topd(100, percent / 100) == percent
        late = [popd(step, 100, 64, 0.125, 1, percent / 100) for step in range(101)]
        assert late == [8] * percent + [64] * (101 - percent)


@pytest.mark.parametrize(("kind", "setting"), [("topd", {"horizon_fraction": 0.5}), ("esr", {"horizon_tokens": 4})])
def test_every_limit_of_the_host_is_set_and_restored(kind, setting):
    args = OPDConfig(rollout_horizon=kind, max_completion_length=8, use_cpu=True, **setting)
    trainer = SimpleNamespace(
        args=args, use_vllm=True, generation_config=SimpleNamespace(max_new_tokens=8), max_completion_length=8,
        vllm_generation=SimpleNamespace(max_completion_length=8), _metrics={"train": {"horizon": []}},
    )  # fmt: skip
    callback, state = HorizonCallback(trainer), SimpleNamespace(global_step=0, max_steps=4)
    for event, length in ((callback.on_step_begin, 4), (callback.on_step_end, 8)):
        event(args, state, None)
        host = trainer.vllm_generation.max_completion_length, trainer.max_completion_length
        assert (trainer.generation_config.max_new_tokens, *host) == (length, length, length)
    assert trainer._metrics["train"]["horizon"] == [4.0]


@pytest.mark.slow
def test_topd_rollouts_are_short_and_evaluations_are_not(tmp_path):
    trainer = make_trainer(
        tmp_path, rollout_horizon="topd", horizon_fraction=1 / 3, max_steps=3, save_strategy="no", eval_steps=1,
        effopd=EffOPDConfig(validation_size=12),
    )  # fmt: skip
    trainer.train()
    assert all(row["completions/max_length"] <= 2 and row["horizon"] == 2 for row in rows(tmp_path))
    evaluations = list(read_rows(tmp_path / "evals.jsonl"))
    assert max(row["eval_response_length"] for row in evaluations) > 2
    tokens = [trial["generated_tokens"] for s in read_rows(tmp_path / "searches.jsonl") for trial in s["trials"]]
    assert max(tokens) > 2 * 12  # the gate answers at full length
    assert trainer.generation_config.max_new_tokens == 6
    assert all(0 < row["eval_kl_beyond_horizon"] < 1 for row in evaluations)


def test_the_kl_beyond_the_horizon_is_that_of_the_answer_without_its_start():
    student, teacher = make_model(0), make_model(1)
    prompts, answers, common = [[5, 6, 7], [8]], [[8, 9, 10, 11], [12]], {"vocab_size": 64, "pad_token_id": 0}
    whole = answer_kls(student, teacher, prompts, answers, horizon=2, **common)
    start = answer_kls(student, teacher, prompts, [answer[:2] for answer in answers], **common)
    for each, first in zip(whole, start, strict=True):
        assert each.late == pytest.approx(each.kl - first.kl, rel=1e-4, abs=1e-6)
        assert first.late == first.kl  # without a horizon


@pytest.mark.parametrize(("settings", "warns"), [({}, True), ({"horizon_whole_share": 0.5}, False)])
def test_a_horizon_that_leaves_most_of_the_kl_out_is_named(caplog, settings, warns):
    args = OPDConfig(rollout_horizon="esr", horizon_tokens=4, max_completion_length=8, use_cpu=True, **settings)
    callback = HorizonCallback(SimpleNamespace(args=args, state=SimpleNamespace(global_step=0, max_steps=4)))
    for share in (0.4, 0.6, 0.7):
        callback.see(share)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns and all("60 %" in text and "--horizon_tokens" in text for text in said)


@pytest.mark.slow
def test_evaluations_of_trl_are_full_length_too(tmp_path):
    flags = FAST | {"rollout_horizon": "topd", "horizon_fraction": 1 / 3, "max_steps": 2}
    trainer = make_trainer(tmp_path, **flags | {"eval_strategy": "steps", "eval_steps": 1})
    trainer.eval_task = None  # so that the host evaluates its dataset
    trainer.train()
    evaluations = list(read_rows(tmp_path / "evals.jsonl"))
    assert len(evaluations) == 2 and all(row["eval_loss"] > 0 for row in evaluations)
    logged = [row for row in trainer.state.log_history if "eval_completions/max_length" in row]
    assert len(logged) == 2 and max(row["eval_completions/max_length"] for row in logged) > 2
    assert max(row["completions/max_length"] for row in rows(tmp_path)) <= 2


@pytest.mark.slow
def test_popd_rollouts_follow_the_schedule(tmp_path):
    settings = {"rollout_horizon": "popd", "horizon_start": 1 / 3, "horizon_stages": 2, "horizon_growth": 0.7}
    make_trainer(tmp_path, **settings, **FAST).train()
    wanted = [popd(step, 6, 6, 1 / 3, 2, 0.7) for step in range(6)]
    assert [row["horizon"] for row in rows(tmp_path)] == wanted
    assert all(row["completions/max_length"] <= limit for row, limit in zip(rows(tmp_path), wanted, strict=True))
    assert len(set(wanted)) == 3


@pytest.mark.slow
def test_popd_from_the_full_length_is_plain_opd(tmp_path):
    plain = make_trainer(tmp_path / "plain", **FAST)
    plain.train()
    full = make_trainer(tmp_path / "full", rollout_horizon="popd", horizon_start=1.0, **FAST)
    full.train()
    assert same(parameters(plain), parameters(full))


@pytest.mark.slow
def test_the_first_tokens_of_a_cut_answer_are_those_of_the_whole(tmp_path):
    """Same seed, same start: the same tokens up to the horizon."""
    arms = {"whole": {}, "cut": {"rollout_horizon": "topd", "horizon_fraction": 0.5}}
    seen = {}
    for name, flags in arms.items():
        trainer = make_trainer(tmp_path / name, **flags, **FAST | {"max_steps": 1})
        original = trainer._compute_loss

        def spy(student, inputs, count, name=name, original=original):
            seen.setdefault(name, inputs["completion_ids"].clone())
            return original(student, inputs, count)

        trainer._compute_loss = spy
        trainer.train()
    assert seen["cut"].shape[1] == 3
    assert sorted(seen["cut"].tolist()) == sorted(seen["whole"][:, :3].tolist())  # TRL shuffles the rows


def test_the_kl_of_a_token_does_not_depend_on_what_was_cut_off():
    student, teacher = make_model(0), make_model(1)
    prompt, answer = [5, 6, 7], [8, 9, 10, 11, 12, 13]
    kl = [  # summed over the first h tokens
        reverse_kl_of_completions(student, teacher, [prompt], [answer[:h]], vocab_size=64, pad_token_id=0)[0][0]
        for h in range(1, 7)
    ]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        own, target = (model(ids).logits[0, 2:-1, :64].log_softmax(-1) for model in (student, teacher))
    whole = (own.exp() * (own - target)).sum(-1).cumsum(0)
    torch.testing.assert_close(torch.tensor(kl), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("effopd", [None, EffOPDConfig(validation_size=12, parameters="all", args={"scales": [2.0]})])
def test_resumed_is_uninterrupted_also_where_the_horizon_changes(tmp_path, effopd):
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "eval_strategy": "no",
        "rollout_horizon": "popd",
        "horizon_start": 0.5,
        "horizon_stages": 1,
        "effopd": effopd,
    }
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    assert [row["horizon"] for row in rows(tmp_path)] == [3, 3, 3, 6, 6, 6]
    anchors = [row["anchor_step"] for row in read_rows(tmp_path / "searches.jsonl")]
    assert anchors == ([] if effopd is None else [0, 1, 3])  # the change at step 3 set the anchor anew
    again = make_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000003"))
    assert same(parameters(whole), parameters(again))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"rollout_horizon": "half"}, "must be one of"),
        ({"horizon_fraction": 0.5}, "is read only with"),
        ({"rollout_horizon": "topd", "horizon_start": 0.5}, "is read only with"),
        ({"rollout_horizon": "topd", "horizon_fraction": 0.0}, r"horizon_fraction.*in \(0, 1\]"),
        ({"rollout_horizon": "popd", "horizon_growth": 1.5}, r"horizon_growth.*in \(0, 1\]"),
        ({"rollout_horizon": "popd", "horizon_stages": 0}, "at least 1"),
        ({"rollout_horizon": "topd", "generation_kwargs": {"max_new_tokens": 5}}, "max_new_tokens"),
    ],
)
def test_bad_settings(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(output_dir=str(tmp_path), **flags)
