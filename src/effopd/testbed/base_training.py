"""Base student: a random Qwen3 with 0.8M parameters, trained on partly falsified reasoning.

The training loop samples questions, writes their (partly falsified) reasoning, and takes an
optimizer step on the cross-entropy of the completions. With a progress file, an interrupted
training continues to the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from effopd.errors import ConfigError
from effopd.models.end_tokens import train_end_tokens
from effopd.tasks.base import Example
from effopd.tasks.generate import encode_prompts
from effopd.tasks.testbed_families import ALL_FAMILIES, worked_reasoning
from effopd.testbed.progress import Progress

_IGNORED = -100


@dataclass(frozen=True)
class ModelSettings:
    """Model dimensions; vocabulary and special tokens come from the tokenizer."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 128


@dataclass(frozen=True)
class BaseSettings:
    """Settings of the supervised training.

    Attributes:
        questions: training questions per family; falsified independently at every draw.
        steps: optimizer steps.
        batch_size: sequences per step, both families mixed.
        learning_rate: peak rate, after linear warm-up over `warmup_steps`; cosine decay to a tenth.
        optimizer: "adamw", or "muon": Muon for the layers' matrices, with AdamW's update size, and
            AdamW for all other parameters.
    """

    questions: int = 12_000
    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ConfigError(f"base.optimizer: expected adamw or muon, got {self.optimizer!r}.")
        for name in ("questions", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"base.{name}: expected at least 1, got {getattr(self, name)}. Raise it.")


def new_model(tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, seed: int) -> Qwen3ForCausalLM:
    """Randomly initialized fp32 model whose end token is the tokenizer's."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = Qwen3ForCausalLM(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def falsified(example: Example, rng: random.Random) -> str:
    """Reasoning for a question, with intermediate results falsified at its family's rate."""
    return worked_reasoning(example, rng, ALL_FAMILIES[example.metadata["family"]].corruption)


def train_base(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: BaseSettings,
    seed: int,
    log: Callable[[str], None] = print,
    write: Callable[[Example, random.Random], str] = falsified,
    progress: Progress | None = None,
) -> None:
    """Train `model` in place on the completions that `write` returns for the examples.

    The loss is the cross-entropy in nats per token, averaged over completion tokens including the
    end token.

    Args:
        progress: file from which an interrupted training continues; `None`: none is kept.
    """
    rng = random.Random(seed)
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    optimizers = _optimizers(model, settings)
    train_end_tokens(model, [tokenizer.eos_token_id])
    start = 0 if progress is None else progress.restore(model, optimizers, rng)
    model.train()
    for step in range(start, settings.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        chosen = rng.choices(range(len(examples)), k=settings.batch_size)
        loss = _loss(model, tokenizer, [prompts[i] for i in chosen], [write(examples[i], rng) for i in chosen])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        with _muon_precision():
            for optimizer in optimizers:
                optimizer.step()
        if (step + 1) % max(1, settings.steps // 20) == 0:
            log(f"base step {step + 1}/{settings.steps}: loss {loss.item():.4f}")
        if progress is not None:
            progress.after_step(step + 1, model, optimizers, rng)
    model.eval()


def _optimizers(model: Qwen3ForCausalLM, settings: BaseSettings) -> list[torch.optim.Optimizer]:
    adamw = partial(
        torch.optim.AdamW, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    if settings.optimizer == "adamw":
        return [adamw(model.parameters())]
    parameters = dict(model.named_parameters())
    matrices = {name for name, value in parameters.items() if value.ndim == 2 and ".layers." in name}
    muon = torch.optim.Muon(
        [parameters[name] for name in parameters if name in matrices],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw([parameters[name] for name in parameters if name not in matrices])]


def _muon_precision() -> AbstractContextManager[Any]:
    """Muon's Newton–Schulz iteration in float32 on CPUs without bfloat16 instructions.

    `torch.optim.Muon` casts the gradient to bfloat16. With AVX2, products of 256×256 and 256×768
    matrices take seven to nine times as long in bfloat16 as in float32. With AVX-512 it stays.
    """
    return nullcontext() if "AVX512" in torch.backends.cpu.get_cpu_capability() else _WithoutBfloat16()


class _WithoutBfloat16(TorchFunctionMode):
    """`Tensor.bfloat16()` returns a copy in the tensor's own dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


def _loss(model, tokenizer, prompts: list[list[int]], texts: list[str]) -> torch.Tensor:
    rows, labels = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        completion = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(prompt + completion)
        labels.append([_IGNORED] * len(prompt) + completion)
    width = max(map(len, rows))
    # padding is on the right and never a label, so causal attention needs no mask
    ids_BT = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=model.device)
    labels_BT = torch.tensor([row + [_IGNORED] * (width - len(row)) for row in labels], device=model.device)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_IGNORED)


def _schedule(step: int, settings: BaseSettings) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
