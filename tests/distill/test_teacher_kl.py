"""The scorer on rollouts: the exact KL on the very tokens training is about to use, charged,
without a trace.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer

from effopd import EffOPDCallback, EffOPDConfig
from effopd.common.files import read_rows
from effopd.distill.divergence import reverse_kl_of_completions
from effopd.distill.scoring import text_batch, wanted_rollouts
from effopd.distill.teachers.kept import Kept
from effopd.errors import CompatibilityError, ConfigError
from effopd.extrapolate.anchored import bit_sum
from effopd.models.token_batch import TokenBatch

pytestmark = pytest.mark.slow


FAST = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
LOOK = EffOPDConfig("line_search", score_rollouts=5)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def scorer_of(trainer):
    return next(
        callback.scorer for callback in trainer.callback_handler.callbacks if isinstance(callback, EffOPDCallback)
    )


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_score_is_the_exact_kl_of_the_steps_own_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, effopd=LOOK, **FAST)
    scorer, seen = scorer_of(trainer), []
    take = scorer.take

    def spy(batches, **_):
        (batch,) = batches = list(batches)
        take(batches)
        score = scorer(trainer.model)
        answer_length = batch.scored_BT.shape[1]
        prompts, answers = (
            [row[mask.bool()].tolist() for row, mask in zip(ids, masks, strict=True)][:5]
            for ids, masks in (
                (batch.ids_BL[:, :-answer_length], batch.mask_BL[:, :-answer_length]),
                (batch.ids_BL[:, -answer_length:], batch.mask_BL[:, -answer_length:]),
            )
        )
        sums, counts = reverse_kl_of_completions(
            trainer.model.eval(),
            trainer.teacher_model,
            prompts,
            answers,
            vocab_size=trainer.vocab_size,
            pad_token_id=0,
        )
        trainer.model.train()
        seen.append((score, sums, counts, prompts, answers))

    scorer.take = spy
    trainer.train()
    assert len(seen) == 4
    for score, sums, counts, prompts, answers in seen:
        assert score.mean == pytest.approx(-sum(sums) / sum(counts), rel=1e-4)
        assert score.per_example == pytest.approx([-s * len(counts) / sum(counts) for s in sums], rel=1e-4)
        assert score.mean == pytest.approx(sum(score.per_example) / len(score.per_example))
        assert score.generated_tokens == 0
        tokens = sum(map(len, prompts)) + sum(map(len, answers))
        assert score.forward_tokens == 2 * tokens  # student, and once a search the teacher


def dense_divergence(student, teacher, batch, beta, temperature):
    """Σ over the tokens of each rollout, from whole [V] distributions in float64."""
    width = batch.scored_BT.shape[1]
    with torch.no_grad():
        s, t = (
            (
                model.eval()(batch.ids_BL, attention_mask=batch.mask_BL).logits[:, -width - 1 : -1].double()
                / temperature
            ).log_softmax(-1)
            for model in (student, teacher)
        )

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    if beta in (0.0, 1.0):
        tokens = kl(s, t) if beta else kl(t, s)
    else:
        mixture = ((1 - beta) * s.exp() + beta * t.exp()).log()
        tokens = beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
    return (tokens * batch.scored_BT).sum(1).tolist()


@pytest.mark.parametrize("host", ["ours", "trl"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_score_is_the_divergence_that_is_trained(tmp_path, host, beta):
    """… so at the start it is the negative loss of the step; against whole distributions."""
    settings = {"max_steps": 3, "beta": beta, "temperature": 0.8, "logging_steps": 1}
    whole_batch = EffOPDConfig("line_search", score_rollouts=8)
    if host == "ours":
        trainer = make_trainer(tmp_path, effopd=whole_batch, **FAST | settings)
    else:
        trainer = plain_host(tmp_path, **settings)
        trainer.add_callback(EffOPDCallback(trainer, whole_batch))
    scorer, seen = scorer_of(trainer), []
    take = scorer.take

    def spy(batches, **_):
        (batch,) = batches = list(batches)
        take(batches)
        score = scorer(trainer.model.eval())
        sums = dense_divergence(trainer.model, trainer.teacher_model, batch, beta, 0.8)
        trainer.model.train()
        seen.append((score, sums, int(batch.scored_BT.sum())))

    scorer.take = spy
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(seen) == len(losses) == 3
    for score, sums, tokens in seen:
        assert score.mean == pytest.approx(-sum(sums) / tokens, rel=1e-4)
        assert score.per_example == pytest.approx([-s * len(sums) / tokens for s in sums], rel=1e-4, abs=1e-6)
    assert -seen[0][0].mean == pytest.approx(losses[0], rel=1e-3)  # nothing has moved before the first step


def two_teachers():
    """Two teachers, and a task whose rows name one of them."""
    task = make_task(64)
    rows = [replace(e, metadata={"teacher": "ab"[i % 3 == 0]}) for i, e in enumerate(task.examples)]
    return {"teacher": {"a": make_model(1), "b": make_model(2)}, "task": task.subset(rows)}


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "activation_checkpointing": True}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        ACCUMULATED,
        {"loss_type": "teacher_top_k", "teacher_top_k": 4, "several": True},
        {"loss_type": "sampled"},
    ],
    ids=["full", "accumulated", "several-top-k", "sampled"],
)
def test_looking_without_jumping_leaves_no_trace(tmp_path, settings):
    """The loss reads what the search asked the teacher: bit for bit the same, and charged once."""
    settings = FAST | {"max_steps": 3} | settings
    several = settings.pop("several", False)
    plain = make_trainer(tmp_path / "plain", **settings | (two_teachers() if several else {}))
    plain.train()
    config = EffOPDConfig("noop", score_rollouts=6, schedule="every_step")
    looked = make_trainer(tmp_path / "looked", effopd=config, **settings | (two_teachers() if several else {}))
    looked.train()
    assert same(weights(plain), weights(looked))
    rows = list(read_rows(tmp_path / "looked" / "searches.jsonl"))
    assert [row["step"] for row in rows] == [2, 3]  # whose rollouts they use; step 1 has no displacement
    last, alone = (list(read_rows(tmp_path / name / "metrics.jsonl"))[-1] for name in ("looked", "plain"))
    assert last["loss"] == alone["loss"] and last["cost/search_generated_tokens"] == 0
    assert last["cost/search_forward_tokens"] == sum(row["forward_tokens"] for row in rows) > 0
    for part in ("teacher", "update"):
        assert last[f"cost/{part}_forward_tokens"] == alone[f"cost/{part}_forward_tokens"]
    if settings.get("loss_type") == "sampled":  # a jump drops the rollouts of this loss
        assert last["cost/search_teacher_tokens"] == sum(row["teacher_tokens"] for row in rows) > 0
    else:
        assert last["cost/search_teacher_tokens"] == 0
        assert all(len({trial["forward_tokens"] for trial in row["trials"]}) == 1 for row in rows)
    kept = [value for rollouts in looked._buffered_inputs for value in rollouts.values() if isinstance(value, Kept)]
    assert all(each.parts is None for each in kept)  # released by the loss


def test_accumulated_micro_batches_are_looked_at_once_a_step(tmp_path):
    """… on rollouts of all of them, in pieces of a micro-batch."""
    config = EffOPDConfig("noop", schedule="every_step", score_rollouts=6)
    make_trainer(
        tmp_path, effopd=config, **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | FAST
    ).train()
    rows = list(read_rows(tmp_path / "searches.jsonl"))
    assert [row["step"] for row in rows] == [2, 3, 4]
    assert all(len(trial["per_example"]) == 6 for row in rows for trial in row["trials"])


@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_pieces_do_not_change_a_score(tmp_path, pieces):
    trainer = make_trainer(tmp_path, effopd=LOOK, **FAST)
    scorer, scores = scorer_of(trainer), []
    take = scorer.take

    def spy(batches, **_):
        (whole,) = batches
        take([whole])
        scores.append(scorer(trainer.model))
        size = -(-8 // pieces)
        columns = (whole.ids_BL, whole.mask_BL, whole.scored_BT)
        take(TokenBatch(*(column[i : i + size] for column in columns)) for i in range(0, 8, size))
        scores.append(scorer(trainer.model))
        take([whole])

    scorer.take = spy
    trainer.train()
    for one, other in zip(scores[::2], scores[1::2], strict=True):
        assert one.per_example == pytest.approx(other.per_example, rel=1e-4)
        assert (one.mean, one.forward_tokens) == (pytest.approx(other.mean, rel=1e-4), other.forward_tokens)


def test_it_jumps_and_gets_closer_to_the_teacher(tmp_path):
    plain = make_trainer(
        tmp_path / "plain", **FAST | {"eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1e-4}
    )
    ahead = make_trainer(
        tmp_path / "ahead", effopd=LOOK, **FAST | {"eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1e-4}
    )
    for trainer in (plain, ahead):
        trainer.train()
    kl = [list(read_rows(tmp_path / name / "evals.jsonl"))[-1]["eval_kl"] for name in ("plain", "ahead")]
    assert kl[1] < kl[0]
    assert any(row["accepted_scale"] > 1 for row in read_rows(tmp_path / "ahead" / "searches.jsonl"))


def test_the_sampled_loss_gets_rollouts_of_the_weights_that_it_updates(tmp_path):
    """Its gradient is an estimate only for answers of the policy itself; after a jump the step's
    rollouts are not.
    """
    for loss in ("full", "sampled"):
        trainer = make_trainer(tmp_path / loss, effopd=LOOK, **FAST | {"loss_type": loss, "learning_rate": 1e-4})
        sampled, updated = spy(trainer, "_generate_and_score_completions"), spy(trainer, "compute_loss")
        trainer.train()
        moved = [row["step"] for row in read_rows(tmp_path / loss / "searches.jsonl") if row["accepted_scale"]]
        assert moved and len(updated) == 4
        if loss == "full":
            assert len(sampled) == 4 and all(
                (sampled[step - 1] != updated[step - 1]) == (step in moved) for step in (1, 2, 3, 4)
            )
        else:
            assert len(sampled) == 4 + len(moved) and set(updated) <= set(sampled)


def spy(trainer, method):
    """Checksums of the weights at every call of a method."""
    seen, real = [], getattr(trainer, method)

    def spied(*args, **kwargs):
        seen.append(sum(bit_sum(p) for p in trainer.model.parameters()))
        return real(*args, **kwargs)

    setattr(trainer, method, spied)
    return seen


def test_needs_no_answers(tmp_path):
    task = make_task(64)
    unanswered = type(task)(
        task.name, tuple(type(e)(e.id, e.prompt, None, e.metadata) for e in task.examples), task.verify
    )
    trainer = make_trainer(tmp_path, task=task, **FAST)
    trainer.add_callback(EffOPDCallback(trainer, LOOK, task=unanswered))
    trainer.train()
    assert list(read_rows(tmp_path / "searches.jsonl"))


def plain_host(tmp_path, **overrides):
    return DistillationTrainer(
        make_model(0), make_model(1),
        DistillationConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            **{"max_completion_length": 6, "learning_rate": 2e-3, "activation_checkpointing": False,
               "per_device_train_batch_size": 8, "max_steps": 6, "save_strategy": "no"} | overrides,
        ),
        train_dataset=make_task(64).to_dataset(), processing_class=make_tokenizer(),
    )  # fmt: skip


def test_an_unmodified_trl_trainer_looks_ahead_like_ours(tmp_path):
    ours = make_trainer(tmp_path / "ours", effopd=LOOK, **FAST | {"lr_scheduler_type": "constant"})
    theirs = plain_host(tmp_path / "theirs", max_steps=4, lr_scheduler_type="constant", beta=1.0)
    theirs.add_callback(EffOPDCallback(theirs, LOOK))  # nothing but the trainer: no answers, no task
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    found, expected = weights(ours), weights(theirs)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
    one, other = (list(read_rows(tmp_path / name / "searches.jsonl")) for name in ("ours", "theirs"))
    assert any(row["accepted_scale"] for row in one)
    volatile = {"seconds", "trials", "forward_tokens", "teacher_tokens"}
    for row, its in zip(one, other, strict=True):
        assert {k: v for k, v in row.items() if k not in volatile} == pytest.approx(
            {k: v for k, v in its.items() if k not in volatile}, rel=1e-5
        )
        # TRL's loss asks its teacher again; ours reads what the search has made
        assert row["forward_tokens"] == its["forward_tokens"] - its["teacher_tokens"] and row["teacher_tokens"] == 0


def test_an_unmodified_trl_trainer_resumes_to_the_same_weights(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = plain_host(tmp_path, **settings)
    whole.add_callback(EffOPDCallback(whole, LOOK))
    whole.train()
    searches = (tmp_path / "searches.jsonl").read_text().splitlines()
    again = plain_host(tmp_path, **settings)
    again.add_callback(EffOPDCallback(again, LOOK))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(again))
    assert len((tmp_path / "searches.jsonl").read_text().splitlines()) == len(searches)


@pytest.mark.parametrize(
    ("micro_batch", "accumulated", "world_size", "asked", "wanted"),
    [
        (256, 1, 1, 0.25, 32),
        (4, 16, 1, 0.25, 16),
        (8, 4, 2, 0.25, 16),
        (8, 4, 1, 0.25, 8),
        (8, 1, 1, 0.25, 4),  # half of a small batch
        (4, 3, 1, 0.25, 6),
        (4, 1, 1, 0.25, 4),
        (1, 1, 2, 0.25, 4),
        (8, 1, 1, 0.75, 6),
        (8, 4, 1, 5, 5),
        (8, 4, 1, 128, 128),
    ],
)
def test_a_quarter_of_the_rollouts_is_scored_and_half_of_few(micro_batch, accumulated, world_size, asked, wanted):
    args = SimpleNamespace(
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulated, world_size=world_size
    )
    assert wanted_rollouts(args, asked) == wanted


def test_by_default_that_many_are_scored(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 5, "max_steps": 2}
    trainer = make_trainer(tmp_path, effopd=EffOPDConfig("line_search"), **FAST | sizes)
    trainer.train()
    (search,) = read_rows(tmp_path / "searches.jsonl")
    assert {len(trial["per_example"]) for trial in search["trials"]} == {10}


def test_hosts_without_a_teacher_other_targets_few_rollouts_and_images(tmp_path, caplog):
    host = Trainer(make_model(0), TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ConfigError, match=r"expected an OPDTrainer or a trl\.DistillationTrainer.* got Trainer"):
        EffOPDCallback(host, LOOK)
    with pytest.raises(ConfigError, match="another target"):
        make_trainer(tmp_path / "x", effopd=LOOK, lambda_extrapolation=1.25, reference_model=make_model(2), **FAST)
    with pytest.raises(ConfigError, match="at least 2 rollouts per step"):
        make_trainer(tmp_path / "z", effopd=LOOK, per_device_train_batch_size=1, **FAST)
    make_trainer(tmp_path / "y", effopd=LOOK, **FAST)
    assert "noisier" not in caplog.text
    by_default = EffOPDConfig("line_search")
    make_trainer(tmp_path / "enough", effopd=by_default, gradient_accumulation_steps=1, **FAST)
    assert "noisier" not in caplog.text
    make_trainer(
        tmp_path / "few", effopd=by_default, per_device_train_batch_size=3, gradient_accumulation_steps=1, **FAST
    )
    assert "set to score 4 rollouts per step (--effopd.score_rollouts) but a step samples 3" in caplog.text
    caplog.clear()
    asked = EffOPDConfig("line_search", score_rollouts=32)
    make_trainer(tmp_path / "asked", effopd=asked, gradient_accumulation_steps=2, **FAST)
    assert "set to score 32 rollouts per step (--effopd.score_rollouts) but a step samples 16" in caplog.text
    assert "--per_device_train_batch_size 8 × --gradient_accumulation_steps 2 × 1 process(es)" in caplog.text
    with pytest.raises(ConfigError, match="rollouts have pixel_values"):
        text_batch({"pixel_values": torch.zeros(1), "completion_ids": torch.zeros(2, 3)})


@pytest.mark.parametrize("kind", ["recurrent_gemma", "modernbert-decoder"])
def test_a_host_whose_loss_leaves_something_out_is_refused(tmp_path, kind):
    def make(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64}
        if kind == "recurrent_gemma":
            sizes |= {"lru_width": 32, "attention_window_size": 64, "head_dim": 8, "num_key_value_heads": 2}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **special))

    settings = {"per_device_train_batch_size": 8, "max_completion_length": 6, "report_to": "none", "use_cpu": True}
    host = DistillationTrainer(
        make(0), make(1), DistillationConfig(output_dir=str(tmp_path), max_steps=1, bf16=False, **settings),
        train_dataset=make_task(16).to_dataset(), processing_class=make_tokenizer(),
    )  # fmt: skip
    with pytest.raises(CompatibilityError, match=r"leaves out.*Use OPDTrainer"):
        EffOPDCallback(host, LOOK, task=make_task(16))
    ours = make_trainer(tmp_path / "ours", student=make(0), teacher=make(1), effopd=LOOK, **FAST | {"max_steps": 1})
    ours.train()
