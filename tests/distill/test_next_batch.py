"""`scorer="next_batch_loss"`: its scores, and that the host trains as if nothing had happened."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.traces import Regression, parameters, same
from helpers.trl_hosts import dpo, sft
from transformers import Trainer, TrainingArguments

from effopd import EffOPDCallback, EffOPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.distill.batch_examples import scored_tokens, split_examples
from effopd.distill.host_rules import RULES, check_next_batch
from effopd.distill.next_batch import TrainerLoss
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.distill.served.trainer import ServedOPDTrainer
from effopd.errors import CheckpointError, ConfigError
from effopd.runs.records import SEARCHES

HOSTS = {"SFTTrainer": sft, "DPOTrainer": dpo}
MOVES = EffOPDConfig("line_search", schedule="every_step", min_z=0.0, score_rollouts=4)
#: Every candidate is rejected: none can be that much better.
STAYS = EffOPDConfig("effopd", schedule="every_step", gate="significant", min_z=1e9, score_rollouts=3)


def logs(trainer):
    """Logged rows without the look-ahead's and without times."""
    return [
        {k: v for k, v in row.items() if not any(word in k for word in ("effopd", "runtime", "second"))}
        for row in trainer.state.log_history
    ]


def searches(root):
    return list(read_rows(root / SEARCHES))


def decisions(root):
    """Searches without what depends on the clock."""
    times = ("seconds", "time")
    return [
        {k: v for k, v in row.items() if k not in times}
        | {"trials": [(t["scale"], t["score"]) for t in row["trials"]]}
        for row in searches(root)
    ]


def look(trainer, config):
    trainer.add_callback(EffOPDCallback(trainer, config, scorer="next_batch_loss"))
    return trainer


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.fixture(scope="module")
def moved(host, tmp_path_factory):
    root = tmp_path_factory.mktemp("moved")
    trainer = look(host(root, save_strategy="steps", save_steps=2), MOVES)
    trainer.train()
    return root, trainer


@pytest.mark.slow
def test_the_score_is_the_loss_of_the_next_step(moved):
    """At the accepted weights, which are those that the step trains."""
    root, trainer = moved
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert [row["step"] for row in searches(root)] == [2, 3, 4]
    for row in searches(root):
        accepted = next(t for t in row["trials"] if t["scale"] == row["accepted_scale"])
        assert -accepted["score"] == pytest.approx(losses[row["step"]], rel=1e-5)
        assert sum(accepted["per_example"]) / 4 == pytest.approx(accepted["score"])
    assert any(row["accepted_scale"] for row in searches(root))


@pytest.mark.slow
def test_the_cost_counts_every_forward_pass(moved, host):
    root, _ = moved
    for row in searches(root):
        tokens = {trial["forward_tokens"] for trial in row["trials"]}
        assert len(tokens) == 1 and min(tokens) > 0
        assert row["forward_tokens"] == min(tokens) * len(row["trials"])
        # DPO's loss has a reference model of the same size
        assert row["teacher_tokens"] == (row["forward_tokens"] / 2 if host is dpo else 0)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(moved, host):
    root, trainer = moved
    whole, rows = parameters(trainer), decisions(root)
    again = look(host(root, save_strategy="no"), MOVES)
    again.train(resume_from_checkpoint=str(root / "checkpoint-2"))
    assert same(whole, parameters(again)) and decisions(root) == rows
    other = look(host(root), EffOPDConfig("line_search", schedule="every_step", min_z=0.0, score_rollouts=3))
    with pytest.raises(CheckpointError, match="score_rollouts 4 → 3"):
        other.train(resume_from_checkpoint=str(root / "checkpoint-2"))


@pytest.mark.slow
def test_rejected_candidates_leave_no_trace(host, tmp_path):
    """Weights, metrics and counters are those of a run without a look-ahead, also with dropout."""
    plain = host(tmp_path / "plain", 0.1)
    plain.train()
    stays = look(host(tmp_path / "stays", 0.1), STAYS)
    stays.train()
    assert same(parameters(plain), parameters(stays)) and logs(plain) == logs(stays)
    assert [len(row["trials"]) for row in searches(tmp_path / "stays")] == [2, 2, 2]
    assert all(len(row["trials"][0]["per_example"]) == 3 for row in searches(tmp_path / "stays"))
    assert not any(name in vars(stays) for name in ("get_batch_samples", "_prepare_inputs"))


def regression(root, config, **overrides):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"x": x.tolist(), "labels": (x @ torch.tensor([1.0, -2.0, 0.5, 3.0])).tolist()})
    args = TrainingArguments(
        output_dir=str(root), max_steps=4, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to="none", learning_rate=5e-3, save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
        **overrides,
    )  # fmt: skip
    return look(Trainer(Regression(), args, train_dataset=data), config)


def test_any_transformers_trainer(tmp_path):
    trainer = regression(tmp_path, EffOPDConfig("line_search", schedule="every_step", min_z=0.0, score_rollouts=16))
    trainer.train()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    for row in searches(tmp_path):
        accepted = next(t for t in row["trials"] if t["scale"] == row["accepted_scale"])
        assert len(accepted["per_example"]) == 16
        assert -accepted["score"] == pytest.approx(losses[row["step"]], rel=1e-5)


def test_newton_search_without_a_slope(tmp_path):
    """The scorer knows no slope, so the search doubles the scale as `line_search` does."""
    trainer = regression(tmp_path, EffOPDConfig("newton_search", schedule="every_step", min_z=0.0))
    trainer.train()
    assert [t["scale"] for t in searches(tmp_path)[0]["trials"]][:3] == [0.0, 1.0, 2.0]


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected 'next_batch_loss' or a callable"):
        EffOPDCallback(regression(tmp_path, MOVES), MOVES, scorer="loss_on_the_moon")
    for config, why in (
        (EffOPDConfig("fixed"), "does not score"),
        (EffOPDConfig("alpha_opd", args={"target": 0.5}), "predicts from accuracies"),
        (EffOPDConfig("effopd", validation_size=20), "validation_size is read by the built-in"),
    ):
        with pytest.raises(ConfigError, match=why):
            regression(tmp_path, config)
    with pytest.raises(ConfigError, match="this run has 16 and scores 1"):
        regression(tmp_path, EffOPDConfig("line_search", score_rollouts=1))


def stand_in(name, **args):
    return type(name, (), {"args": SimpleNamespace(**args), "teacher_model": object()})()


SELF = {"distillation_mode": "full_logits", "teacher_model_kind": "base"}


@pytest.mark.parametrize(
    ("trainer", "why"),
    [
        (stand_in("GRPOTrainer"), "policy-gradient surrogate"),
        (stand_in("RLOOTrainer"), "policy-gradient surrogate"),
        (stand_in("AsyncGRPOTrainer"), "another process"),
        (stand_in("AsyncDistillationTrainer"), "another process"),
        (stand_in("OnlineDPOTrainer"), "inside training_step"),
        (stand_in("DistillationTrainer"), "default scorer 'teacher_kl'"),
        (stand_in("OPDTrainer", lambda_extrapolation=1), "default scorer 'teacher_kl'"),
        (stand_in("OPDTrainer", lambda_extrapolation=1.25), r"lambda_extrapolation=1.25 .*Score by answers"),
        (
            stand_in("Subclass", loss_type="sampled", on_sampled_tokens=True),
            "loss_type='sampled' is a policy-gradient",
        ),
        (stand_in("Subclass", on_sampled_tokens=False, updates_per_rollouts=2), r"updates_per_rollouts=2 .*Set up"),
        (stand_in("SDFTTrainer", **SELF | {"distillation_mode": "sampled_token"}), "policy-gradient surrogate"),
        (stand_in("SDFTTrainer", **SELF | {"teacher_model_kind": "live"}), "no fixed target"),
        (stand_in("SDFTTrainer", **SELF, num_iterations=2), "num_iterations=2"),
        (stand_in("SDPOTrainer", **SELF, distillation_weight=0.5), "distillation_weight=0.5"),
        (stand_in("IWOPDTrainer", distillation_objective="iw_opd"), "policy-gradient surrogate"),
    ],
)
def test_losses_that_rank_no_weights(trainer, why):
    with pytest.raises(ConfigError, match=why) as error:
        check_next_batch(trainer)
    assert type(trainer).__name__ in str(error.value)


def test_this_packages_trainers_are_refused_without_a_teacher_in_memory():
    """Several teachers, a teacher server and stored rollouts have no `teacher_model`."""
    for kind, fix in (
        (OPDTrainer, "Leave out scorer="),
        (ServedOPDTrainer, "Leave out"),
        (OfflineOPDTrainer, "answers"),
    ):
        trainer = object.__new__(kind)
        trainer.args, trainer.teacher_model = SimpleNamespace(updates_per_rollouts=2), None
        with pytest.raises(ConfigError, match=rf"does not work on {kind.__name__}: .*{fix}"):
            check_next_batch(trainer)


def test_losses_that_rank_weights():
    for trainer in (
        stand_in("Subclass", loss_type="full", on_sampled_tokens=False, updates_per_rollouts=1),
        stand_in("SFTTrainer"),
        stand_in("SDFTTrainer", **SELF),
        stand_in("SDPOTrainer", **SELF, distillation_weight=1.0, num_iterations=1),
        stand_in("IWOPDTrainer", distillation_objective="jsd"),
    ):
        check_next_batch(trainer)
    assert set(RULES) >= {"GRPOTrainer", "SDFTTrainer"}


# -- examples of a micro-batch ---------------------------------------------------------------------


def test_rows_of_a_batch():
    ids = torch.arange(6).reshape(3, 2)
    batch = {
        "input_ids": ids, "lengths": torch.tensor([2, 1, 2]), "texts": ["a", "b", "c"], "scale": torch.tensor(5.0),
        "name": "x", "nothing": None,
    }  # fmt: skip
    parts = split_examples(batch)
    assert [part["input_ids"].tolist() for part in parts] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [part["texts"] for part in parts] == [["a"], ["b"], ["c"]]
    assert [part["lengths"].tolist() for part in parts] == [[2], [1], [2]]
    assert all(part["scale"] == 5 and part["name"] == "x" and part["nothing"] is None for part in parts)


def test_pairs_of_a_batch():
    batch = {"input_ids": torch.arange(4)[:, None], "ref_chosen_logps": torch.tensor([0.5, 0.25])}
    first, second = split_examples(batch, pairs=True)
    assert first["input_ids"].tolist() == [[0], [2]] and second["input_ids"].tolist() == [[1], [3]]
    assert first["ref_chosen_logps"].tolist() == [0.5] and second["ref_chosen_logps"].tolist() == [0.25]


@pytest.mark.parametrize("extra", [torch.zeros(5, 2), ["one", "two"], {"nested": 1}])
def test_what_cannot_be_split_stays_whole(extra):
    batch = {"input_ids": torch.zeros(3, 2), "extra": extra}
    (part,) = split_examples(batch)
    assert part == batch


def test_sequences_of_a_packed_row():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100, -100]])  # the last two are padding
    batch = {
        "input_ids": torch.arange(7)[None], "labels": labels, "position_ids": positions,
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 7], dtype=torch.int32), "max_length_q": 3,
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 3]], dtype=torch.int32),
    }  # fmt: skip
    first, second = split_examples(batch)
    assert first["input_ids"].tolist() == [[0, 1, 2]] and second["input_ids"].tolist() == [[3, 4]]
    assert second["cu_seq_lens_q"].tolist() == [0, 2] and second["cu_seq_lens_q"].dtype == torch.int32
    assert second["max_length_q"] == 2 and second["seq_idx"].tolist() == [[0, 0]]
    assert [scored_tokens(part) for part in (first, second)] == [2, 1]


@pytest.mark.parametrize(
    ("batch", "num_items", "steps_scaled", "factors"),
    [
        # tokens of the step divide the loss: the parts add up
        ({"labels": torch.tensor([[0, 1, 1], [0, 1, -100]])}, 3, None, [1.0, 1.0]),
        # a mean over the tokens of the micro-batch, of two micro-batches
        ({"labels": torch.tensor([[0, 1, 1], [0, 1, -100]])}, None, None, [2 / 3 / 2, 1 / 3 / 2]),
        # a mean over examples, divided by the trainer
        ({"labels": torch.tensor([0.5, 1.5])}, None, False, [0.25, 0.25]),
        ({}, None, True, [0.5, 0.5]),
    ],
)
def test_factors_of_the_examples(batch, num_items, steps_scaled, factors):
    trainer = SimpleNamespace(
        loss_is_scaled_for_ga=steps_scaled, model_accepts_loss_kwargs=True, compute_loss_func=None
    )
    batch = {"input_ids": torch.zeros(2, 3)} | batch
    selected = TrainerLoss(trainer, 3).select([batch, batch], num_items)
    assert [example.factor for example in selected.examples] == pytest.approx((factors * 2)[:3])
    assert selected.total == 4
