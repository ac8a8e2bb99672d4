"""Mixing of on-policy rollouts and given answers: the choice, the answers, refusals and runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from transformers import TrainerCallback

from effopd import EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.distill.mixing import chosen_rows, given_answer, on_policy, read_traces
from effopd.distill.offline_cache import collect
from effopd.distill.offline_store import Header, ModelIdentity, RolloutStore, prompts_sha256
from effopd.errors import CompatibilityError, ConfigError, TaskError
from effopd.models.fingerprint import tokenizer_sha256
from effopd.tasks.generate import encode_prompts

LENGTH = 6
SETTINGS = {"eval_strategy": "no", "max_steps": 6, "health_tokens": 0}


def test_the_choice_is_a_function_of_seed_and_step():
    kinds = [on_policy(0.3, 1, step) for step in range(4000)]
    assert kinds == [on_policy(0.3, 1, step) for step in range(4000)]
    assert sum(kinds) / 4000 == pytest.approx(0.3, abs=0.03)
    assert all(on_policy(1.0, 0, step) for step in range(20)) and not any(on_policy(0.0, 0, s) for s in range(20))
    rows = chosen_rows(50, 8, 0, 3)
    assert rows == chosen_rows(50, 8, 0, 3) != chosen_rows(50, 8, 0, 4) and len(set(rows)) == 8 and max(rows) < 50


def test_answers_of_the_dataset_end_with_the_end_token():
    tokenizer = make_tokenizer()
    row = {"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "completion": "2 is it"}
    given = given_answer(row, tokenizer, 20, None)
    assert tokenizer.decode(given.completion_ids, skip_special_tokens=True) == "2 is it"
    assert given.completion_ids[-1] == tokenizer.eos_token_id
    assert given.prompt_ids == encode_prompts(tokenizer, [row["prompt"]])[0]
    chat = given_answer(row | {"completion": [{"role": "assistant", "content": "2 is it"}]}, tokenizer, 3, None)
    assert chat.completion_ids == given.completion_ids[:3]
    assert given_answer(row | {"completion": "2 is it" + tokenizer.eos_token}, tokenizer, 20, None) == given
    assert given_answer(row | {"completion": ""}, tokenizer, 20, None).completion_ids == [tokenizer.eos_token_id]


@pytest.mark.parametrize("answer", [None, [], [{"role": "assistant", "content": None}], 3])
def test_rows_without_an_answer_are_named(answer):
    with pytest.raises(TaskError, match="expected text or chat messages that end with text in 'completion'"):
        given_answer({"prompt": "1", "completion": answer}, make_tokenizer(), 20, None)


@pytest.mark.parametrize(("settings", "message"), [
    ({"lmbda": 0.5, "loss_type": "sampled"}, "rollouts of the present weights"),
    ({"lmbda": 0.5, "loss_type": "negative_advantage"}, "rollouts of the present weights"),
    ({"traces": "x"}, "only with lmbda < 1"),
    ({"lmbda": 1.5}, "lmbda"), ({"lmbda": -0.1}, "lmbda"),
    ({"lmbda": 0.5, "rollouts": "x"}, "lmbda=0.5"),
    ({"lmbda": 0.5, "traces": " "}, "expected a folder"),
])  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(use_cpu=True, report_to="none", **settings)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    task = dataclasses.replace(make_task(24), verify=lambda text, example: 1.0)
    prompts = encode_prompts(make_tokenizer(), [example.prompt for example in task.examples])
    header = Header(
        teacher=ModelIdentity("t", None, "b"), student=ModelIdentity("s", None, "a"), sft_teacher=None,
        tokenizer=tokenizer_sha256(make_tokenizer()), vocab_size=64, temperature=1.0, max_completion_length=LENGTH,
        seed=3, batch_size=24, dtype="auto", top_k=0, prompts=24, prompts_sha256=prompts_sha256(prompts),
        rows_per_file=24, sampler="teacher",
    )  # fmt: skip
    store = RolloutStore(tmp_path_factory.mktemp("traces") / "traces")
    store.open(header)
    collect(store, header, make_model(0), make_model(1), make_tokenizer(), task)
    return store


def test_answers_that_do_not_fit_are_refused(tmp_path, traces):
    def build(**settings):
        return make_trainer(tmp_path / "run", lmbda=0.5, **SETTINGS, **settings)

    with pytest.raises(ConfigError, match="column 'completion'"):
        build()
    with pytest.raises(ConfigError, match="Set --max_completion_length 6"):
        build(traces=str(traces.folder), max_completion_length=5)
    with pytest.raises(ConfigError, match=r"takes 32 answers, but .* has 24"):
        build(traces=str(traces.folder), per_device_train_batch_size=32)
    trainer = build(traces=str(traces.folder), charge_rollouts=True)
    assert trainer.ledger.snapshot()["cost/net_generated_tokens"] == traces.read()[1].generated_tokens
    trainer.vocab_size = 40
    with pytest.raises(CompatibilityError, match="share 40 tokens"):
        trainer._open_mixing()
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(CompatibilityError, match="another tokenizer"):
        read_traces(trainer.args, other)


class Batches(TrainerCallback):
    """Answers that each step trains on."""

    def __init__(self, trainer):
        self.seen = []
        loss = trainer.distillation_loss

        def record(student, inputs, num_items):
            mask = inputs["completion_mask"].bool()
            rows = [ids[m].tolist() for ids, m in zip(inputs["completion_ids"], mask, strict=True)]
            self.seen.append((trainer.state.global_step, rows))
            return loss(student, inputs, num_items)

        trainer.distillation_loss = record


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, traces, one_thread):
    """λ = 1/2 whole and resumed, λ = 0 with a look-ahead on rollouts."""
    root = tmp_path_factory.mktemp("runs")
    mixed = {**SETTINGS, "lmbda": 0.5, "traces": str(traces.folder), "save_steps": 3, "save_total_limit": None}
    searching = {"effopd": EffOPDConfig("line_search", score_rollouts=4), "lmbda": 0.0}
    made, batches = {}, {}
    for name, settings in {"whole": mixed, "resumed": mixed, "searching": mixed | searching}.items():
        made[name] = make_trainer(root / name, **settings)
        batches[name] = Batches(made[name])
        made[name].train(
            resume_from_checkpoint=str(root / "whole/checkpoints/step-000003") if name == "resumed" else None
        )
    return made, batches


def test_a_mixed_run(runs, traces):
    made, batches = runs
    stored = [list(row.completion_ids) for row in traces.read()[0]]
    kinds = [on_policy(0.5, 42, step) for step in range(6)]
    assert set(kinds) == {True, False}
    for step, rows in batches["whole"].seen:
        assert all(row in stored for row in rows) != kinds[step]
    rows = list(read_rows(made["whole"].run_dir.root / "metrics.jsonl"))
    assert [row["rollouts/on_policy"] for row in rows] == [float(kind) for kind in kinds]
    sampled = [row["cost/rollout_generated_tokens"] for row in rows]
    new = [later - sooner for sooner, later in zip([0, *sampled], sampled, strict=False)]
    assert [count > 0 for count in new] == kinds  # given answers are not charged as sampled
    assert all(row["cost/teacher_forward_tokens"] > 0 for row in rows)
    assert torch.equal(weights(made["resumed"]), weights(made["whole"]))


def test_searches_score_on_policy_rollouts_only(runs, traces):
    """At λ = 0 only the steps of a search sample; every other step trains on traces."""
    made, batches = runs
    stored = [list(row.completion_ids) for row in traces.read()[0]]
    searches = {row["step"] for row in read_rows(made["searching"].run_dir.root / "searches.jsonl")}
    assert searches
    for step, rows in batches["searching"].seen:
        assert all(row in stored for row in rows) != (step + 1 in searches)


def test_the_search_that_finds_the_rate_scores_on_policy_rollouts(tmp_path, traces, one_thread):
    """At λ = 0 with two steps per batch, the first batch is sampled, because step 2 scores it."""
    search = EffOPDConfig("newton_search", score_rollouts=4)
    trainer = make_trainer(
        tmp_path,
        **SETTINGS | {"max_steps": 2},
        lmbda=0.0,
        traces=str(traces.folder),
        updates_per_rollouts=2,
        effopd=search,
    )
    seen = Batches(trainer).seen
    trainer.train()
    stored = [list(row.completion_ids) for row in traces.read()[0]]
    assert [row["step"] for row in read_rows(trainer.run_dir.root / "searches.jsonl")] == [2]
    assert seen and not any(all(row in stored for row in rows) for _, rows in seen)


def test_answers_of_the_dataset(tmp_path):
    """λ = 0 with a column `completion` is the same loss on these answers."""
    data = make_task(16).to_dataset().add_column("completion", ["ab"] * 16)
    trainer = OPDTrainer(
        make_model(0), make_model(1),
        OPDConfig(
            output_dir=str(tmp_path), lmbda=0.0, max_steps=1, per_device_train_batch_size=8, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, max_completion_length=LENGTH, learning_rate=1e-3,
            activation_checkpointing=False,
        ),
        train_dataset=data, processing_class=make_tokenizer(),
    )  # fmt: skip
    seen = Batches(trainer).seen
    trainer.train()
    tokenizer = make_tokenizer()
    expected = [*tokenizer("ab")["input_ids"][-2:], tokenizer.eos_token_id]
    assert [row for _, rows in seen for row in rows] == [expected] * 8
    trainer.train_dataset = make_task(16).to_dataset().add_column("completion", ["ab"] * 15 + [None])
    with pytest.raises(TaskError, match="row 15 of train_dataset: expected text"):
        trainer._open_mixing()
