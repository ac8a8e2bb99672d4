"""A model whose padding is its end token learns as one with a padding token of its own.

SmolLM2, Llama and GPT-2 are like this. Both models have the same weights and prompts, so rollouts,
losses, metrics and gradients are the same bit for bit.
"""

from __future__ import annotations

import random

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer, Sampling
from effopd.common.files import read_rows
from effopd.distill.rl import TaskGRPOTrainer, TaskRLOOTrainer
from effopd.distill.rl_config import TaskGRPOConfig, TaskRLOOConfig
from effopd.tasks.base import Example, Task
from effopd.tasks.evaluate import evaluate
from effopd.testbed import base_training

PAD, END = 0, 2
SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "max_completion_length": 6,
    "learning_rate": 2e-3, "report_to": "none", "activation_checkpointing": False, "eval_strategy": "steps",
    "eval_steps": 2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1,
    "dataloader_pin_memory": False,
}  # fmt: skip
#: Rows that a clock or the disk decides.
_NOT_COMPARED = ("seconds", "runtime", "per_second", "time")


def tokenizer_with(pad: int):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    assert tokenizer.pad_token_id == pad
    return tokenizer


def model_with(pad: int, seed: int = 0):
    """The same weights for any padding; a configured padding also goes into the embedding."""
    weights = make_model(seed).state_dict()
    config = make_model(seed).config
    config.pad_token_id = pad
    model = type(make_model(seed))(config)
    assert model.get_input_embeddings().padding_idx == pad
    model.load_state_dict(weights)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, pad
    return model


def uneven_task(size: int = 64) -> Task:
    """Prompts of unequal length with a system message: end tokens inside, left padding before."""
    prompts = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "1+" * (i % 5) + "a"}] for i in range(size)
    ]
    return Task("uneven", tuple(Example(str(i), each, "a") for i, each in enumerate(prompts)), make_task().verify)


def opd(path, pad, strategy=None, **settings):
    task = uneven_task()
    args = OPDConfig(output_dir=str(path), **SETTINGS | settings)
    trainer = OPDTrainer(
        model_with(pad), model_with(pad, 1), args, train_dataset=task.to_dataset(),
        processing_class=tokenizer_with(pad), eval_task=task.sample(12, 1),
    )  # fmt: skip
    if strategy is not None:
        trainer.add_callback(EffOPDCallback(trainer, strategy, task=task))
    return trainer


def grpo(path, pad, kind=TaskGRPOTrainer, config=TaskGRPOConfig, **settings):
    task, own = uneven_task(), {"num_generations": 4, "beta": 0.0} | settings
    args = config(output_dir=str(path), **SETTINGS | own)
    return kind(model_with(pad), args, task, task.sample(8, 1), processing_class=tokenizer_with(pad))


def rloo(path, pad, **settings):
    return grpo(path, pad, TaskRLOOTrainer, TaskRLOOConfig, **settings)


def without_clocks(value):
    if isinstance(value, list):
        return [without_clocks(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = [name for name in value if not any(word in name for word in _NOT_COMPARED)]
    return {name: without_clocks(value[name]) for name in kept}


def rows(path):
    files = ("metrics.jsonl", "evals.jsonl", "searches.jsonl")
    return [without_clocks(row) for file in files for row in read_rows(path / file)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (opd, {}),
        (opd, {"loss_type": "sampled"}),
        (opd, {"strategy": EffOPDConfig("line_search", score_rollouts=8)}),
        (opd, {"strategy": EffOPDConfig(validation_size=8)}),
        (grpo, {}),
        (grpo, {"mask_truncated_completions": True}),
        (rloo, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value) or "plain",
)
def test_training(tmp_path, make, settings):
    runs = {}
    for pad in (PAD, END):
        trainer = make(tmp_path / str(pad), pad, **settings)
        trainer.generation_config.suppress_tokens = [PAD]  # the hosts take it for the end of an answer
        trainer.train()
        runs[pad] = dict(trainer.model.named_parameters())
    assert rows(tmp_path / str(PAD)) == rows(tmp_path / str(END))
    for name, tensor in runs[PAD].items():
        assert torch.equal(tensor, runs[END][name]), name
    metrics = list(read_rows(tmp_path / str(END) / "metrics.jsonl"))
    assert 0 < metrics[0]["completions/clipped_ratio"] < 1  # some answers end, some do not
    start = model_with(END).get_input_embeddings().weight[END]
    assert not torch.equal(runs[END]["model.embed_tokens.weight"][END], start)


def test_answers():
    """The end token belongs to an answer that ended; an answer without one is cut."""
    task, sampling = uneven_task(24), Sampling(max_new_tokens=6, n=2, batch_size=7, seed=3)
    results = [evaluate(model_with(pad), tokenizer_with(pad), task, sampling) for pad in (PAD, END)]
    answers = [[answer for row in result.completions for answer in row] for result in results]
    assert answers[0] == answers[1]
    assert {answer.truncated for answer in answers[1]} == {True, False}
    for answer in answers[1]:
        assert answer.completion_ids.count(END) == (not answer.truncated)
        assert answer.truncated == (answer.completion_ids[-1] != END)
        assert len(answer.completion_ids) == 6 or not answer.truncated
    drop = {"seconds"}
    summaries = [{k: v for k, v in result.summary().items() if k not in drop} for result in results]
    assert summaries[0] == summaries[1] and 0 < summaries[1]["truncated_share"] < 1


def test_supervised_training():
    """The end token is a label and an input, the padding neither."""
    examples, weights = uneven_task(16).examples, {}
    for pad in (PAD, END):
        model = model_with(pad)
        base_training.train_base(
            model, tokenizer_with(pad), examples, base_training.BaseSettings(steps=3, batch_size=8, questions=16),
            seed=0, log=lambda line: None, write=lambda example, rng: "ab" * rng.randint(0, 4),
        )  # fmt: skip
        weights[pad] = model.state_dict()
    for name, tensor in weights[PAD].items():
        assert torch.equal(tensor, weights[END][name]), name


def test_supervised_loss_counts_the_end_once():
    """Cross-entropy over completion tokens with one end each, against rows on their own."""
    rng, tokenizer, model = random.Random(0), tokenizer_with(END), model_with(END)
    prompts = [[1, *[rng.randint(5, 30) for _ in range(rng.randint(1, 6))]] for _ in range(5)]
    texts = ["a" * rng.randint(0, 7) for _ in prompts]
    total, count = torch.zeros(()), 0
    for prompt, text in zip(prompts, texts, strict=True):
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
        logp = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total - logp.gather(1, torch.tensor(answer)[:, None]).sum()
        count += len(answer)
    torch.testing.assert_close(base_training._loss(model, tokenizer, prompts, texts), total / count)
