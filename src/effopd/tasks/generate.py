"""Sampling of answers for evaluation and scoring; training rollouts are sampled elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.isolation import evaluating, isolated_rng
from effopd.errors import finite_predictions
from effopd.models.sampler_check import generate_groups, ignore_sampling_defaults
from effopd.tasks.base import Prompt
from effopd.tasks.prompts import prompt_ids
from effopd.tasks.reasoning import decode_marked, opened_by_ids
from effopd.tasks.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        prompt_ids: token ids of the prompt.
        completion_ids: token ids up to and including the end token.
        text: decoded text without special tokens, but with reasoning tags.
        truncated: whether the length limit cut the answer.
        opened: tag with which the prompt opens the reasoning, such as `<think>`; "": none.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    truncated: bool
    opened: str = ""

    @property
    def marked(self) -> str:
        """Text for verifiers, including the reasoning tag that the prompt opened, if any."""
        return self.opened + self.text


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, encoded as TRL's trainers do.

    Chat messages get the chat template and the generation prompt; plain text gets the tokenizer's
    special tokens.

    Raises:
        TaskError, CompatibilityError: see `effopd.tasks.prompts.prompt_ids`.
    """
    return [
        prompt_ids(tokenizer, prompt, chat_template_kwargs, origin=f"prompt {number}")
        for number, prompt in enumerate(prompts, start=1)
    ]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of an answer, sorted: the model's declared ones and the tokenizer's."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def tokens_beyond(model: PreTrainedModel, vocab_size: int | None) -> list[int] | None:
    """Token ids to suppress: those from `vocab_size` to the model's own size; `None`: none."""
    rows = model.config.get_text_config().vocab_size
    return list(range(vocab_size, rows)) if vocab_size is not None and vocab_size < rows else None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    seen: Callable[[Sequence[Completion]], object] | None = None,
) -> list[Completion]:
    """Sample `sampling.n` answers per prompt with `model.generate`, in order and in fixed batches.

    Of the model's `generation_config`, only the end tokens are used, not the sampling defaults
    (repetition penalty, min_p, …).

    The caller's random state is not changed. The same `sampling.seed`, prompts and batch size give
    the same noise for any weights, because torch draws one exponential per row and vocabulary entry
    and picks argmax p/noise. The answers of two models are thus coupled as closely as possible.

    Args:
        vocab_size: only tokens below it are sampled; `None`: the model's whole vocabulary.
        progress: called after each batch with its number of answers.
        seen: called after each batch with its answers.

    Raises:
        TaskError, CompatibilityError: see `encode_prompts`.
        CompatibilityError: left padding changes the model's predictions, and the weights are
            sharded.
    """
    config = _generation_config(model, tokenizer, sampling, vocab_size)
    repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
    encoded = encode_prompts(tokenizer, repeated, sampling.template)
    completions: list[Completion] = []
    with evaluating(model), isolated_rng(sampling.seed), ignore_sampling_defaults(model):
        for start in range(0, len(encoded), sampling.batch_size):
            batch = encoded[start : start + sampling.batch_size]
            answers: dict[int, Completion] = {}
            for group in generate_groups(model, batch):
                rows = _generate_batch(model, tokenizer, [batch[i] for i in group], config)
                answers |= dict(zip(group, rows, strict=True))
            completions += [answers[i] for i in range(len(batch))]
            if seen is not None:
                seen(completions[start:])
            if progress is not None:
                progress(len(batch))
    return completions


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, vocab_size: int | None
) -> GenerationConfig:
    eos, pad = eos_token_ids(model, tokenizer), tokenizer.pad_token_id
    distribution = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        **(distribution if sampling.temperature > 0 else {"do_sample": False}),
        max_new_tokens=sampling.max_new_tokens,
        use_cache=True,
        eos_token_id=eos or None,
        pad_token_id=pad if pad is not None else (eos[0] if eos else None),
        suppress_tokens=tokens_beyond(model, vocab_size),
    )


def _generate_batch(model, tokenizer, prompt_ids: list[list[int]], config: GenerationConfig) -> list[Completion]:
    width = max(map(len, prompt_ids))
    input_ids = torch.full((len(prompt_ids), width), config.pad_token_id or 0)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    with finite_predictions():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
        )
    rows = output[:, width:].tolist()
    eos = config.eos_token_id or []
    ended = [next((i + 1 for i, token in enumerate(row) if token in eos), None) for row in rows]
    answers = [row[:end] for row, end in zip(rows, ended, strict=True)]
    texts = decode_marked(tokenizer, answers)
    opened = {ids: opened_by_ids(tokenizer, ids) for ids in set(map(tuple, prompt_ids))}
    return [
        Completion(ids, row, text, end is None, opened[tuple(ids)])
        for ids, row, text, end in zip(prompt_ids, answers, texts, ended, strict=True)
    ]
