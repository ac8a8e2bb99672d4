"""The comparison's task and its teacher, a copy of the student trained on worked sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effopd.tasks.builtin_models import smollm2_path, student_path
from effopd.testbed.base_training import BaseSettings
from effopd.testbed.sft import SYSTEM_PROMPT, TASKS, VERIFIER, SFTSettings, start
from gpu_parts.plan import REHEARSAL
from gpu_parts.results import device

NAME = "chain_sum"
#: Settings of the task as flags of `effopd train`.
TASK: dict[str, Any] = {
    "task": f"reasoning-gym:{NAME}",
    "task_args": dict(TASKS[NAME].args),
    "prompt_suffix": "",
    "system_prompt": SYSTEM_PROMPT,
    "verifier": VERIFIER,
}
QUESTIONS, TEST_QUESTIONS = (16, 4) if REHEARSAL else (2048, 256)
SETTINGS = SFTSettings(
    questions=QUESTIONS,
    test_questions=TEST_QUESTIONS,
    training=BaseSettings(
        questions=QUESTIONS, steps=2 if REHEARSAL else 150, batch_size=4 if REHEARSAL else 16, learning_rate=1e-4,
        warmup_steps=10, weight_decay=0.0,
    ),
)  # fmt: skip


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
    card = start(NAME, str(student), out, seed, SETTINGS, device=device())
    training = SETTINGS.training
    return {"steps": training.steps, "batch_size": training.batch_size, "accuracy": card["accuracy"]}
