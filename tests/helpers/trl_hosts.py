"""Tiny trainers of TRL, for tests of the look-ahead on hosts other than this package's."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch
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


def saved(folder: Any, seed: int) -> str:
    """A model with its tokenizer on disk, for trainers that load a model or a tokenizer again."""
    make_model(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def longest(completions: Any, **_: Any) -> list[float]:
    """Reward: share of letters in the completion."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in texts]


def sdft(output_dir: Any, **overrides: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    own = {"distillation_mode": "full_logits", "max_completion_length": 4, "num_generations": 1}
    args = SDFTConfig(num_loss_tokens_to_skip=0, **settings(output_dir, **own | overrides))
    data = rows("prompt", "privileged_context")
    model = saved(f"{output_dir}-student", 0)
    return SDFTTrainer(model, args, train_dataset=data, processing_class=make_tokenizer())


def sdpo(output_dir: Any, **overrides: Any) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    own = {"distillation_mode": "full_logits", "max_completion_length": 4, "num_generations": 2}
    args = SDPOConfig(success_reward_threshold=0.0, **settings(output_dir, **own | overrides))
    data = rows("prompt", "privileged_context")
    model = saved(f"{output_dir}-student", 0)
    return SDPOTrainer(model, longest, args, train_dataset=data, processing_class=make_tokenizer())


def gold(output_dir: Any, **overrides: Any) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    own = {"max_length": 48, "max_completion_length": 4, "lmbda": 1.0, "use_extended_uld": False}
    args = GOLDConfig(**settings(output_dir, **own | overrides))
    data = rows("messages")
    return GOLDTrainer(make_model(0), make_model(1), args, train_dataset=data, processing_class=make_tokenizer())


def iw_opd(output_dir: Any, **overrides: Any) -> Any:
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    args = IWOPDConfig(max_length=48, max_completion_length=4, **settings(output_dir, **overrides))
    data = rows("messages")
    teacher = saved(f"{output_dir}-teacher", 1)
    return IWOPDTrainer(make_model(0), teacher, args, train_dataset=data, processing_class=make_tokenizer())


def gkd(output_dir: Any, **overrides: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(max_length=48, max_new_tokens=4, lmbda=1.0, **settings(output_dir, **overrides))
    data = rows("messages")
    return GKDTrainer(make_model(0), make_model(1), args, train_dataset=data, processing_class=make_tokenizer())


def grpo(output_dir: Any, **overrides: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(num_generations=2, max_completion_length=4, **settings(output_dir, **overrides))
    data = rows("prompt", "answer")
    return GRPOTrainer(make_model(0), longest, args, train_dataset=data, processing_class=make_tokenizer())


class TeacherServer:
    """Stands for TRL's client of a vLLM server: the same answers, from a model in this process."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.model, self.requests = make_model(1), 0

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float = 1.0
    ) -> dict[str, Any]:
        self.requests += 1
        answer: dict[str, Any] = {"actual_logprobs": [], "logprobs": [], "logprob_token_ids": []}
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            tokens = torch.tensor(ids)
            with torch.no_grad():
                logits = self.model(tokens[None]).logits[0, start - 1 : -1]
            logp = (logits / temperature).log_softmax(-1)
            top, top_ids = logp.topk(top_logprobs)
            answer["actual_logprobs"].append(logp.gather(-1, tokens[start:, None]).tolist())
            answer["logprobs"].append(top.tolist())
            answer["logprob_token_ids"].append(top_ids.tolist())
        return answer


def server(output_dir: Any, **overrides: Any) -> Any:
    """`ServerDistillationTrainer` with `TeacherServer` in the place of its client."""
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
    from trl.generation import vllm_client

    own = {"max_completion_length": 4, "teacher_model_server_url": "http://nowhere", "beta": 0.0, "loss_top_k": 8}
    args = ServerDistillationConfig(**settings(output_dir, **own | overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_client, "VLLMClient", TeacherServer)
        return ServerDistillationTrainer(
            make_model(0), args, train_dataset=rows("prompt"), processing_class=make_tokenizer()
        )


class Idle:
    """A rollout worker and a weight transfer of `AsyncDistillationTrainer` that do nothing."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def asynchronous(output_dir: Any) -> Any:
    """`AsyncDistillationTrainer`, which can be built without a GPU but not trained."""
    from trl.experimental.async_distillation import (
        AsyncDistillationConfig,
        AsyncDistillationTrainer,
        async_distillation_trainer,
    )

    args = AsyncDistillationConfig(
        output_dir=str(output_dir), use_cpu=True, bf16=False, report_to="none", max_steps=1,
        teacher_server_urls={"teacher": "http://nowhere"}, model_init_kwargs={"attn_implementation": "eager"},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_distillation_trainer, "get_peak_flops_per_device", lambda *_: None)
        return AsyncDistillationTrainer(
            saved(f"{output_dir}-student", 0), args, train_dataset=rows("prompt"), processing_class=make_tokenizer(),
            rollout_worker=Idle(), weight_transfer=Idle(),
        )  # fmt: skip
