"""Rollouts: the sampler's own log-probabilities, the shared vocabulary, models that padding
changes, another engine.
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer, of_type
from helpers.tiny_run import make_trainer
from torch import nn

from effopd.common.files import read_rows
from effopd.distill import rollouts
from effopd.distill import trainer as trainer_module
from effopd.distill.sampled_logps import recording
from effopd.errors import CompatibilityError, NonFiniteLossError
from effopd.models.logit_path import completion_hidden_states
from effopd.tasks.base import Example, Task
from effopd.tasks.evaluate import evaluate

pytestmark = pytest.mark.slow

FAST = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}


def uneven_task(size=32):
    """Prompts of 3 to 30 tokens."""
    prompts = ["1 + 1 = ?" * (1 + i % 3) + "x" * (i % 4) for i in range(size)]
    return Task(
        "uneven",
        tuple(Example(str(i), [{"role": "user", "content": text}], "a") for i, text in enumerate(prompts)),
        lambda completion, example: float("a" in completion),
    )


def gpt2(seed):
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return of_type("gpt2", seed, n_embd=32, n_layer=2, n_head=4, n_positions=128, **rates)


def rwkv(seed):
    return of_type("rwkv", seed, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)


def gap_of(path, **settings):
    trainer = make_trainer(path, task=uneven_task(), **FAST | settings)
    trainer.train()
    (row,) = read_rows(path / "metrics.jsonl")
    return row["health/sampler_logp_gap"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_the_gap_is_that_of_generates_own_scores(tmp_path, monkeypatch, bf16, sampling):
    trainer = make_trainer(
        tmp_path, student=gpt2(0), teacher=gpt2(1), task=uneven_task(), bf16=bf16, **FAST | sampling
    )
    model, generate, seen = trainer.model, trainer.model.generate, {}

    def scored(**arguments):
        out = generate(**arguments, output_scores=True, return_dict_in_generate=True)
        width = arguments["input_ids"].shape[1]
        logp = torch.stack(out.scores, dim=1).float().log_softmax(-1)
        answers = out.sequences[:, width:]
        seen["sampler"] = logp.gather(-1, answers[..., None])[..., 0]
        seen["ids"], seen["mask"], seen["width"] = out.sequences, arguments["attention_mask"], width
        return out.sequences

    monkeypatch.setattr(model, "generate", scored, raising=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    model.load_state_dict(before)
    model.eval()
    answers = seen["ids"][:, seen["width"] :]
    kept = ((answers == 2).long().cumsum(1) - (answers == 2).long()) == 0  # up to and with the end token
    mask = torch.cat([seen["mask"], kept.long()], dim=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = completion_hidden_states(model, seen["ids"], mask, answers.shape[1])
    weight = model.get_output_embeddings().weight.detach()
    if bf16:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = (hidden @ weight.T).float() / trainer.temperature
    train = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    gaps = (seen["sampler"] - train)[kept].abs().tolist()  # all 8 rows are recorded
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    expected = sum(gaps) / len(gaps)
    assert row["health/sampler_logp_gap"] == pytest.approx(expected, rel=0.02, abs=1e-6)
    if sampling:
        assert expected > 0.05  # what top_p renormalizes
    else:
        assert (1e-4 < expected < 0.1) if bf16 else expected < 1e-5


def test_the_gap_is_rounding_where_prompts_differ_in_length(tmp_path):
    assert gap_of(tmp_path / "table", student=gpt2(0), teacher=gpt2(1)) < 1e-5
    assert gap_of(tmp_path / "recurrent", student=rwkv(0), teacher=rwkv(1)) < 1e-4


def test_the_gap_sees_a_loss_with_shifted_positions(tmp_path, monkeypatch):
    def shifted(model, ids, mask, keep, **_):  # the padded forward as it comes, without positions
        return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1][
            :, -keep:
        ]

    monkeypatch.setattr(trainer_module, "completion_hidden_states", shifted)
    assert gap_of(tmp_path, student=gpt2(0), teacher=gpt2(1)) > 0.05


def test_the_gap_sees_a_sampler_that_padding_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "generate_groups", lambda model, ids: [list(range(len(ids)))])
    assert gap_of(tmp_path, student=rwkv(0), teacher=rwkv(1)) > 0.05


def test_the_gap_is_kept_with_gradient_accumulation_and_costs_no_random_numbers(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "bf16": True}
    assert gap_of(tmp_path / "a", **settings) > 1e-4
    losses = []
    for tokens in (0, 256):
        make_trainer(tmp_path / str(tokens), **FAST | {"max_steps": 3, "health_tokens": tokens}).train()
        losses.append([row["loss"] for row in read_rows(tmp_path / str(tokens) / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_nothing_is_left_on_the_model(student):
    with recording(student, 2):
        assert "_get_logits_processor" in vars(student)
    assert "_get_logits_processor" not in vars(student)


def test_the_sampling_that_a_student_brings_along_is_not_used(tmp_path, monkeypatch):
    """As of published models: min_p, penalties and lengths of their `generation_config`."""
    losses, notices = [], []
    for module in ("utils", "configuration_utils"):
        logger = f"transformers.generation.{module}.logger.warning_once"
        monkeypatch.setattr(logger, lambda text, *rest: notices.append(text))
    for name in ("plain", "own"):
        student = make_model(0)
        if name == "own":
            settings = {
                "do_sample": True,
                "temperature": 0.3,
                "min_p": 0.9,
                "no_repeat_ngram_size": 1,
                "max_length": 99,
            }
            student.generation_config.update(**settings)
        trainer = make_trainer(tmp_path / name, student=student, **FAST)
        trainer.train()
        losses += [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")]
    assert losses[0] == losses[1]
    assert student.generation_config.min_p == 0.9
    assert not notices


def wider(likely=50.0):
    """A student with 16 rows more than the teacher, all of them far likelier than the rest."""
    student = make_model(0, vocab_size=80)
    student.config.tie_word_embeddings = False
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
    student.lm_head.bias = nn.Parameter(torch.cat([torch.zeros(64), torch.full((16,), likely)]))
    return student


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_rows_that_the_teacher_lacks_are_never_sampled(tmp_path, loss):
    trainer = make_trainer(
        tmp_path,
        student=wider(),
        loss_type=loss,
        **FAST | {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    )
    assert trainer.vocab_size == 64
    rows, generate = [], trainer._generate_and_score_completions

    def watched(inputs):
        output = generate(inputs)
        rows.append(output["completion_ids"])
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    assert rows and max(int(ids.max()) for ids in rows) < 64
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["health/sampler_logp_gap"] < 1e-5  # the sampler's distribution is the loss's, over 64 rows
    assert all(0 < row["eval_kl"] < 100 for row in read_rows(tmp_path / "evals.jsonl"))


def test_an_engine_that_would_sample_them_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, student=wider(), **FAST)
    trainer.use_vllm = True
    with pytest.raises(CompatibilityError, match=r"16 vocabulary rows \(from id 64\)"):
        trainer._open_rollouts()


def test_the_scorer_samples_what_training_samples(tmp_path):
    from effopd import EffOPDCallback, EffOPDConfig

    trainer = make_trainer(tmp_path, student=wider(), **FAST)
    callback = EffOPDCallback(trainer, EffOPDConfig("effopd", validation_size=4), task=uneven_task(8))
    assert callback.scorer.vocab_size == 64
    result = evaluate(trainer.model, make_tokenizer(), uneven_task(4), callback.scorer.sampling, vocab_size=64)
    assert max(max(row[0].completion_ids) for row in result.completions) < 64


@pytest.mark.parametrize("kind", [gpt2, rwkv])
def test_evaluation_does_not_depend_on_the_batch(tmp_path, kind):
    kls = []
    for size in (1, 12):
        trainer = make_trainer(
            tmp_path / str(size), student=kind(0), teacher=kind(1), task=uneven_task(), eval_temperature=0.0, **FAST,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        kls.append(trainer.evaluate()["eval_kl"])
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_answers_that_count_alike_do_so_across_micro_batches(tmp_path, loss):
    rows = {}
    for weighting, size in (("answer", 8), ("answer", 2), ("token", 8)):
        path = tmp_path / f"{weighting}-{size}"
        trainer = make_trainer(
            path, **FAST, loss_type=loss, loss_weighting=weighting, per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size, max_completion_length=16,
        )  # fmt: skip
        trainer.train()
        ((rows[weighting, size]),) = read_rows(path / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert rows["answer", 8][name] == pytest.approx(rows["answer", 2][name], rel=1e-3, abs=1e-6)
    lengths = [rows["answer", 8][f"completions/{name}_length"] for name in ("min", "max")]
    assert lengths[0] < lengths[1] and rows["token", 8]["loss"] != pytest.approx(rows["answer", 8]["loss"], rel=1e-4)


class Engine:
    """Stands in for TRL's vLLM: samples from the student at another temperature, and says with what
    log-probability.
    """

    logprobs = None
    max_completion_length = 6

    def __init__(self, trainer, flatten):
        self._model, self._flatten, self.asked = trainer.accelerator.unwrap_model(trainer.model), flatten, []
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self, -1

    def sync_weights(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler):
        self.asked.append(self.logprobs)
        answers, logps = [], []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=True,
                output_scores=True,
                temperature=self._flatten,
                top_k=0,
                return_dict_in_generate=True,
            )
            answer = out.sequences[0, len(prompt) :]
            logp = torch.stack(out.scores, dim=1)[0].log_softmax(-1).gather(-1, answer[:, None])
            answers.append(answer.tolist())
            logps.append(logp.tolist())
        return None, answers, logps if self.logprobs is not None else None, None


def with_engine(path, flatten, **settings):
    trainer = make_trainer(path, loss_type="sampled", **FAST | {"max_steps": 2} | settings)
    engine = Engine(trainer, flatten)
    engine.logprobs = 0
    ratios, real = [], trainer_module.sampled_loss

    def spy(h_student, h_teacher, head, *args, **kwargs):
        ids, mask = args[1:3]
        valid = mask != 0
        logp = (
            (h_student[valid].detach() @ head.weight.detach().T).log_softmax(-1).gather(-1, ids[valid][:, None])[:, 0]
        )
        ratios.append((logp - kwargs["sampler_logps_BT"][valid]).exp())
        return real(h_student, h_teacher, head, *args, **kwargs)

    return trainer, engine, ratios, spy


@pytest.mark.parametrize(("flatten", "accumulation"), [(1.0, 1), (3.0, 1), (3.0, 4)])
def test_another_engines_answers_are_weighted_by_the_ratio(tmp_path, monkeypatch, flatten, accumulation):
    trainer, engine, ratios, spy = with_engine(
        tmp_path, flatten, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    monkeypatch.setattr(trainer_module, "sampled_loss", spy)
    trainer.train()
    assert engine.asked == [0, 0] and len(ratios) == 2 * accumulation
    for ratio in ratios:
        assert torch.isfinite(ratio).all()
        assert float((ratio - 1).abs().max()) < 1e-3 if flatten == 1 else float((ratio - 1).abs().max()) > 0.1


def test_an_engine_without_log_probs_is_refused(tmp_path):
    trainer, engine, *_ = with_engine(tmp_path, 1.0)
    engine.logprobs = None
    with pytest.raises(CompatibilityError, match="returned no log-probabilities"):
        trainer.train()


def test_a_log_prob_that_is_none_stops_the_run(tmp_path):
    trainer, engine, *_ = with_engine(tmp_path, 1.0)
    generate = type(engine).generate

    def broken(*args, **kwargs):
        out = generate(engine, *args, **kwargs)
        out[2][0][0] = [None]
        return out

    engine.generate = broken
    with pytest.raises(NonFiniteLossError):
        trainer.train()
