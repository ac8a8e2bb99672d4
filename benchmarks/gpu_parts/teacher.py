"""The comparison's task and its teacher, a copy of the student trained on worked sums."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effopd import Example, Sampling, TaskConfig, evaluate, load_task
from effopd.tasks.builtin_models import smollm2_path, student_path
from effopd.testbed.base_training import BaseSettings, train_base
from gpu_parts.plan import REHEARSAL
from gpu_parts.results import device

#: Settings of the task as flags of `effopd train`.
TASK: dict[str, Any] = {
    "task": "reasoning-gym:chain_sum",
    "task_args": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "prompt_suffix": "",
    "system_prompt": "Answer briefly.",
    "verifier": "gpu_parts.teacher:last_number",
}
QUESTIONS, TEST_QUESTIONS = (16, 4) if REHEARSAL else (2048, 256)
#: Longest answer in tokens.
TOKENS = 6 if REHEARSAL else 128
TRAINING = BaseSettings(
    questions=QUESTIONS, steps=2 if REHEARSAL else 150, batch_size=4 if REHEARSAL else 16, learning_rate=1e-4,
    warmup_steps=10, weight_decay=0.0,
)  # fmt: skip
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def last_number(completion: str, example: Example) -> float:
    """1.0 if the last number in the completion equals the reference answer, otherwise 0.0."""
    found = _NUMBER.findall(completion.replace(",", ""))
    return float(bool(found) and float(found[-1]) == float(str(example.answer)))


def worked_sum(entry: Mapping[str, Any]) -> str:
    """One line per sum of two numbers: "12 + 5 = 17", then "17 - 3 = 14"."""
    tokens = entry["metadata"]["expression"].split()
    total, lines = int(tokens[0]), []
    for sign, term in zip(tokens[1::2], tokens[2::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join(lines)


def student_folder(state: Path) -> Path:
    """SmolLM2-135M-Instruct; in a rehearsal a tiny random model of its class."""
    if not REHEARSAL:
        return smollm2_path()
    folder = state / "student"
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(student_path())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_teacher(student: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train a copy of the student on worked sums, save it in `out`; accuracies before and after."""
    config = TaskConfig(**TASK, train_size=QUESTIONS, eval_size=TEST_QUESTIONS, task_seed=seed)
    examples, test = load_task(config, "train").examples, load_task(config, "eval")
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device())
    sampling = Sampling(max_new_tokens=TOKENS, batch_size=TEST_QUESTIONS, seed=seed)

    def accuracy() -> dict[str, float]:
        measured = evaluate(model, tokenizer, test, sampling).accuracy
        return {"mean": measured.mean, "low": measured.low, "high": measured.high, "n": measured.n}

    def write(example: Example, _: Random) -> str:
        return worked_sum(example.metadata["entry"])

    torch.manual_seed(seed)
    before = accuracy()
    train_base(model, tokenizer, examples, TRAINING, seed, write=write)
    after = accuracy()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"steps": TRAINING.steps, "batch_size": TRAINING.batch_size, "accuracy": {"before": before, "after": after}}
