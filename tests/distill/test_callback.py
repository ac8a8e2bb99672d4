"""The callback on our trainer, on plain TRL, and on any transformers Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import contains, make_model, make_task, make_tokenizer
from helpers.tiny_run import EFFOPD, make_trainer
from helpers.traces import Regression, parameters, same
from transformers import Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer

from effopd import EffOPDCallback, EffOPDConfig
from effopd.common.files import read_rows
from effopd.errors import CheckpointError, ConfigError, ScorerError, TaskError
from effopd.tasks.base import Example, Task

FAST = {"max_steps": 5, "save_strategy": "no", "eval_strategy": "no"}


def plain_trl(output_dir, dataset=None, **overrides):
    settings = {
        "max_steps": 5, "per_device_train_batch_size": 8, "max_completion_length": 6, "learning_rate": 2e-3,
        "report_to": "none", "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "bf16": False,
    }  # fmt: skip
    return DistillationTrainer(
        make_model(0), make_model(1), DistillationConfig(output_dir=str(output_dir), **(settings | overrides)),
        train_dataset=dataset if dataset is not None else make_task(64).to_dataset(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


@pytest.mark.slow
def test_noop_is_bit_identical_to_no_callback(tmp_path):
    without = make_trainer(tmp_path / "without", **FAST)
    without.train()
    noop = make_trainer(tmp_path / "noop", effopd=EffOPDConfig(strategy="noop", validation_size=12), **FAST)
    noop.train()
    assert same(parameters(without), parameters(noop))
    drop = ("second", "time", "effopd", "cost/search", "cost/net_generated")
    rows = [
        [{k: v for k, v in row.items() if not any(d in k for d in drop)} for row in read_rows(root / "metrics.jsonl")]
        for root in (tmp_path / "without", tmp_path / "noop")
    ]
    assert rows[0] == rows[1]
    last = list(read_rows(tmp_path / "noop" / "metrics.jsonl"))[-1]
    assert last["cost/search_generated_tokens"] > 0


@pytest.mark.slow
def test_search_costs_are_in_the_ledger_and_the_rows(tmp_path):
    trainer = make_trainer(tmp_path, effopd=EFFOPD, **FAST)
    trainer.train()
    searches = list(read_rows(tmp_path / "searches.jsonl"))
    assert [row["step"] for row in searches] == [1, 2, 4]
    last = list(read_rows(tmp_path / "metrics.jsonl"))[-1]
    assert last["cost/search_generated_tokens"] == sum(row["generated_tokens"] for row in searches)
    assert last["cost/search_seconds"] == pytest.approx(sum(row["seconds"] for row in searches), rel=0.05, abs=0.02)
    assert last["cost/net_generated_tokens"] > last["cost/rollout_generated_tokens"]
    for row in searches:
        for trial in row["trials"]:
            assert len(trial["per_example"]) == EFFOPD.validation_size
            assert trial["score"] == pytest.approx(sum(trial["per_example"]) / EFFOPD.validation_size)
    logged = [row for row in read_rows(tmp_path / "metrics.jsonl") if "effopd/accepted_scale" in row]
    assert [row["effopd/accepted_scale"] for row in logged] == [row["accepted_scale"] for row in searches]


def test_dv_is_drawn_from_the_training_prompts_by_seed(tmp_path):
    task = make_task(64)
    ids = []
    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path, task=task, **FAST)
        callback = EffOPDCallback(trainer, EffOPDConfig(validation_size=20, seed=seed), task=task)
        ids.append(callback.scorer.validation_ids)
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 20 and set(ids[0]) <= {e.id for e in task.examples}


@pytest.mark.slow
def test_plain_trl_with_its_own_dataset(tmp_path):
    trainer = plain_trl(tmp_path, logging_steps=1)
    config = EffOPDConfig(validation_size=12, args={"scales": [2.0]})
    trainer.add_callback(EffOPDCallback(trainer, config, verify=contains))
    trainer.train()
    assert [row["step"] for row in read_rows(tmp_path / "searches.jsonl")] == [1, 2, 4]
    logs = [row for row in trainer.state.log_history if "effopd/accepted_scale" in row]
    assert [row["step"] for row in logs] == [1, 2, 4] and all("loss" in row for row in logs)


@pytest.mark.slow
def test_plain_trl_resumes_bit_identically(tmp_path):
    def run(name, resume=None, **overrides):
        trainer = plain_trl(tmp_path / name, save_strategy="steps", save_steps=3, max_steps=8, **overrides)
        config = EffOPDConfig(validation_size=12)
        trainer.add_callback(EffOPDCallback(trainer, config, verify=contains))
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer)

    whole = run("run")
    resumed = run("run", resume=str(tmp_path / "run" / "checkpoint-3"))
    assert same(whole, resumed)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "searches.jsonl")] == [1, 2, 4, 8]
    (tmp_path / "run" / "checkpoint-3" / "effopd_state.json").unlink()
    with pytest.raises(CheckpointError, match="no look-ahead state"):
        run("run", resume=str(tmp_path / "run" / "checkpoint-3"))


@pytest.mark.slow
def test_a_resume_takes_the_anchor_of_the_checkpoint_that_is_loaded(tmp_path):
    """Not that of the same step in the output directory, which another run may have left there."""

    def run(name, resume=None, **overrides):
        trainer = plain_trl(tmp_path / name, save_strategy="steps", save_steps=3, max_steps=6, **overrides)
        trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(validation_size=12), verify=contains))
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer)

    whole = run("run")
    run("other", learning_rate=3e-3)
    assert same(whole, run("other", resume=str(tmp_path / "run" / "checkpoint-3")))


def test_default_verifier_is_math(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}], "answer": str(i + 1)} for i in range(64)]
    trainer = plain_trl(tmp_path, Dataset.from_list(rows))
    callback = EffOPDCallback(trainer, EffOPDConfig(validation_size=4))
    example = callback.scorer.task.examples[0]
    assert callback.scorer.task.verify(f"so it is \\boxed{{{example.answer}}}", example) == 1.0
    assert callback.scorer.task.verify("so it is \\boxed{999}", example) == 0.0


@pytest.mark.slow
def test_any_transformers_trainer_given_a_scorer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    data = Dataset.from_dict({"x": x.tolist(), "labels": (x @ torch.tensor([1.0, -2.0, 0.5, 3.0])).tolist()})
    losses = []
    for ahead in (False, True):
        args = TrainingArguments(
            output_dir=str(tmp_path / str(ahead)), max_steps=16, report_to="none", learning_rate=5e-3,
            save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(Regression(), args, train_dataset=data)

        @torch.no_grad()
        def score(model):
            return -float(model(x, torch.tensor(data["labels"]))["loss"])

        if ahead:
            callback = EffOPDCallback(trainer, EffOPDConfig(parameters="all"), scorer=score)
            trainer.add_callback(callback)
        trainer.train()
        losses.append(-score(trainer.model))
    assert losses[1] < 0.9 * losses[0]
    rows = trainer.state.log_history
    assert [row["step"] for row in rows if "effopd/accepted_scale" in row] == [1, 2, 4, 8, 16]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 17))  # no row of the host is lost


@pytest.mark.slow
def test_a_scorer_that_raises_stops_with_the_weights_restored(tmp_path):
    reference = make_trainer(tmp_path / "a", **FAST | {"max_steps": 2})
    reference.train()
    trainer = make_trainer(tmp_path / "b", **FAST)
    calls = []

    def scorer(model):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return 0.0 if len(calls) != 2 else -1.0  # the first search rejects, the second breaks at its first candidate

    trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(), scorer=scorer))
    with pytest.raises(ScorerError, match="out of luck"):
        trainer.train()
    assert same(parameters(reference), parameters(trainer))


def test_unusable_validation_sets(tmp_path):
    trainer = make_trainer(tmp_path, **FAST)
    without = Task("t", tuple(Example(str(i), "x") for i in range(60)), contains)
    for task, message in (
        (without, "prompts without an answer"),
        (make_task(20), "50 validation prompts are drawn from the training prompts but there are 20"),
        (Task("t", (), contains), "there are 0"),
    ):
        with pytest.raises(TaskError, match=message):
            EffOPDCallback(trainer, EffOPDConfig(), task=task)
    bare = plain_trl(tmp_path / "bare", make_task(64).to_dataset().remove_columns("answer"))
    with pytest.raises(TaskError, match="needs its columns 'prompt' and 'answer'"):
        EffOPDCallback(bare, EffOPDConfig())


def test_unsupported_hosts_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **FAST)
    trainer.is_fsdp_enabled = True  # but not accelerate's is_fsdp2
    with pytest.raises(ConfigError, match="FSDP1"):
        EffOPDCallback(trainer, EffOPDConfig(), task=make_task(64))
    trainer.is_fsdp_enabled = False
    config = {"zero_optimization": {"stage": 0}}
    trainer.args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    with pytest.raises(ConfigError, match="stage=0: expected 1, 2 or 3"):
        EffOPDCallback(trainer, EffOPDConfig(), task=make_task(64))


@pytest.mark.parametrize("loss", [{"loss_type": "full"}, {"loss_type": "sampled"}])
def test_engine_and_rollouts_that_a_loss_cannot_use_are_invalidated_after_a_jump(tmp_path, loss):
    trainer = make_trainer(tmp_path, effopd=EFFOPD, **FAST | loss)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback))
    trainer.use_vllm, trainer._last_loaded_step, trainer._buffered_inputs = True, 4, [{}]
    trainer._last_vllm_sync_step = 4  # as GOLD and IW-OPD count, with an interval
    callback._weights_moved()
    assert trainer._last_loaded_step == -1
    assert trainer._buffered_inputs == (None if loss["loss_type"] == "sampled" else [{}])
    assert trainer._last_vllm_sync_step + 1000 <= 4
