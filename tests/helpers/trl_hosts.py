"""Tiny trainers of TRL, for tests of the look-ahead on hosts other than this package's."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from helpers.tiny_models import make_model, make_tokenizer

ROWS = 32
FAST = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
    "logging_steps": 1, "gradient_checkpointing": False,
}  # fmt: skip


def rows(*columns: str) -> Dataset:
    """Prompts with completions of different lengths."""
    every = {
        "prompt": [f"{i} + {i % 3} = ?" for i in range(ROWS)],
        "completion": ["abcdefgh"[i % 8] * (1 + i % 5) for i in range(ROWS)],
        "chosen": ["abcdefgh"[i % 8] * (1 + i % 5) for i in range(ROWS)],
        "rejected": ["z" * (1 + i % 3) for i in range(ROWS)],
        "answer": ["abcdefgh"[i % 8] for i in range(ROWS)],
        "privileged_context": [f"it is {'abcdefgh'[i % 8]}" for i in range(ROWS)],
        "messages": [
            [{"role": "user", "content": f"{i} + 1 = ?"}, {"role": "assistant", "content": "ab"[i % 2] * (1 + i % 4)}]
            for i in range(ROWS)
        ],
    }
    return Dataset.from_dict({name: every[name] for name in columns})


def settings(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    return {"output_dir": str(output_dir), **FAST, **overrides}


def student(dropout: float = 0.0) -> Any:
    model = make_model(0)
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    return model


def sft(output_dir: Any, dropout: float = 0.0, **overrides: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(max_length=32, **settings(output_dir, **overrides))
    data = rows("prompt", "completion")
    return SFTTrainer(student(dropout), args, train_dataset=data, processing_class=make_tokenizer())


def dpo(output_dir: Any, dropout: float = 0.0, **overrides: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(max_length=32, disable_dropout=not dropout, **settings(output_dir, **overrides))
    data = rows("prompt", "chosen", "rejected")
    return DPOTrainer(student(dropout), make_model(0), args, train_dataset=data, processing_class=make_tokenizer())
