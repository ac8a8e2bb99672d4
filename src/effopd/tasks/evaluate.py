"""Generate, verify, and say how sure: pass@1 / avg@n with an interval.

The one place that samples answers outside of training. Trainers, scorers and `effopd eval` all call `generate` and
`evaluate`, so an accuracy means the same everywhere: the share of answers whose verifier score is 1. Partial credit
(reasoning-gym gives some) is kept in `mean_score` and counts as wrong in the accuracy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.isolation import evaluating, isolated_rng
from effopd.common.statistics import Interval, accuracy_interval
from effopd.errors import ConfigError, TaskError, finite_predictions
from effopd.models.sampler_check import generate_groups, own_sampling_aside
from effopd.tasks.base import Example, Prompt, Task
from effopd.tasks.prompts import prompt_ids
from effopd.tasks.reasoning import decode_marked, opened_by_ids
from effopd.tasks.verify import check_score

#: A verifier score at or above this counts as correct.
CORRECT = 1.0 - 1e-9


@dataclass(frozen=True)
class Completion:
    """One sampled answer: token ids up to and including the end token, and whether the length limit cut it.

    `text` is decoded without special tokens, except marks of reasoning; `opened` is the mark with which the prompt itself
    opened the reasoning, such as `<think>`, or "".
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    truncated: bool
    opened: str = ""

    @property
    def marked(self) -> str:
        """The text that verifiers grade: with the mark that the prompt opened the reasoning with, if it did."""
        return self.opened + self.text


def pass_at_k(n: int, correct: int, k: int) -> float:
    r"""Unbiased estimate of P(at least one of k samples is right): $1 - \binom{n-c}{k} / \binom{n}{k}$.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), eq. 1.

    Raises:
        ValueError: k is not between 1 and n.

    Example:
        >>> pass_at_k(4, 2, 1), pass_at_k(4, 2, 3)
        (0.5, 1.0)
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k={k}, n={n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, the way TRL's trainers encode them: messages get the chat template and the generation
    prompt, plain text the tokenizer's own special tokens.

    Raises:
        TaskError, CompatibilityError: as `effopd.tasks.prompts.prompt_ids`.
    """
    return [
        prompt_ids(tokenizer, prompt, chat_template_kwargs, origin=f"prompt {number}")
        for number, prompt in enumerate(prompts, start=1)
    ]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's declared ones and the tokenizer's, sorted."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def beyond(model: PreTrainedModel, vocab_size: int | None) -> list[int] | None:
    """The tokens from `vocab_size` on that the model has rows for, to be suppressed; `None` if there are none."""
    rows = model.config.get_text_config().vocab_size
    return list(range(vocab_size, rows)) if vocab_size is not None and vocab_size < rows else None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Sample one answer a prompt with `model.generate`, in the given order and in fixed batches.

    Every token is drawn from softmax(logits / temperature), cut to `top_p`. The sampling defaults that a model brings
    along in its `generation_config` (repetition penalty, min_p, …) are not used; the end tokens declared there are.

    The random state is isolated: the caller's is untouched, and the same `seed` with the same prompts and batch size
    gives the same noise for any weights (torch draws one exponential per row and vocabulary entry and picks
    argmax p/noise), so two models' answers are coupled as closely as sampling allows.

    Args:
        temperature: 0 means greedy decoding.
        progress: called with the number of answers finished after each batch.
        vocab_size: only tokens below it are sampled; `None`: all that the model has a row for.

    Raises:
        CompatibilityError: left padding changes what the model predicts, and its weights are sharded.
    """
    eos, pad = eos_token_ids(model, tokenizer), tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=eos or None,
        pad_token_id=pad if pad is not None else (eos[0] if eos else None),
        suppress_tokens=beyond(model, vocab_size),
    )
    encoded = encode_prompts(tokenizer, prompts, chat_template_kwargs)
    completions: list[Completion] = []
    with evaluating(model), isolated_rng(seed), own_sampling_aside(model):
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            answers: dict[int, Completion] = {}
            for group in generate_groups(model, batch):
                rows = _generate_batch(model, tokenizer, [batch[i] for i in group], config, eos)
                answers |= dict(zip(group, rows, strict=True))
            completions += [answers[i] for i in range(len(batch))]
            if progress is not None:
                progress(len(batch))
    return completions


def _generate_batch(model, tokenizer, prompt_ids: list[list[int]], config: GenerationConfig, eos: list[int]):
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
    ended = [next((i + 1 for i, token in enumerate(row) if token in eos), None) for row in rows]
    kept = [row[:end] for row, end in zip(rows, ended, strict=True)]
    texts = decode_marked(tokenizer, kept)
    opened = {ids: opened_by_ids(tokenizer, ids) for ids in set(map(tuple, prompt_ids))}
    return [
        Completion(ids, row, text, end is None, opened[tuple(ids)])
        for ids, row, text, end in zip(prompt_ids, kept, texts, ended, strict=True)
    ]


@dataclass(frozen=True)
class EvalResult:
    """Graded answers: `completions[i][j]` and `scores[i][j]` belong to sample j of example i.

    `answers_found` is the number of answers in which the verifier found something to grade, over all samples; `None` where
    the verifier cannot tell.
    """

    examples: tuple[Example, ...]
    completions: list[list[Completion]]
    scores: list[list[float]]
    seconds: float
    answers_found: int | None = None

    @property
    def correct(self) -> list[list[bool]]:
        """Whether each answer's verifier score is 1."""
        return [[score >= CORRECT for score in row] for row in self.scores]

    @property
    def accuracy(self) -> Interval:
        """avg@n (pass@1) with its 95 % interval over prompts."""
        return accuracy_interval(self.correct)

    @property
    def mean_score(self) -> float:
        """Mean verifier score, partial credit included."""
        return float(np.mean([np.mean(row) for row in self.scores]))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer, end token included."""
        return [len(c.completion_ids) for row in self.completions for c in row]

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled in all."""
        return sum(self.lengths)

    @property
    def truncated_share(self) -> float:
        """Share of answers cut at the length limit (0–1)."""
        return self.answers_cut / len(self.lengths)

    @property
    def answers_cut(self) -> int:
        """Number of answers cut at the length limit."""
        return sum(c.truncated for row in self.completions for c in row)

    @property
    def answers_empty(self) -> int:
        """Number of answers without any text."""
        return sum(not c.text.strip() for row in self.completions for c in row)

    def pass_at(self, k: int) -> float:
        """Mean unbiased pass@k over the prompts."""
        return float(np.mean([pass_at_k(len(row), sum(row), k) for row in self.correct]))

    def summary(self) -> dict[str, Any]:
        """A JSON-ready summary; `pass@k` for k = 1, 2, 4, … up to the number of samples."""
        n = min(len(row) for row in self.scores)
        ks = [2**i for i in range(n.bit_length())]
        interval = self.accuracy
        return {
            "prompts": len(self.examples),
            "samples_per_prompt": n,
            f"avg@{n}": interval.mean,
            "ci95_low": interval.low,
            "ci95_high": interval.high,
            **{f"pass@{k}": self.pass_at(k) for k in ks},
            "mean_score": self.mean_score,
            "mean_length": float(np.mean(self.lengths)),
            "max_length": max(self.lengths),
            "truncated_share": self.truncated_share,
            "answers_found": self.answers_found,
            "answers_cut": self.answers_cut,
            "answers_empty": self.answers_empty,
            "generated_tokens": self.generated_tokens,
            "seconds": self.seconds,
        }

    def rows(self):
        """One JSON-ready dictionary an answer."""
        for example, completions, scores in zip(self.examples, self.completions, self.scores, strict=True):
            for sample, (completion, score) in enumerate(zip(completions, scores, strict=True)):
                yield {
                    "id": example.id,
                    "sample": sample,
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "completion": completion.text,
                    "tokens": len(completion.completion_ids),
                    "truncated": completion.truncated,
                    "score": score,
                    "correct": score >= CORRECT,
                }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int | None = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
    vocab_size: int | None = None,
) -> EvalResult:
    """Answer every example `n` times, sampled as `generate` does (not by the model's own sampling defaults), and grade the
    answers. `vocab_size` and the other arguments are those of `generate`.

    Raises:
        ConfigError: `n < 1`, or several greedy samples (they would all be the same).
        TaskError: the task is empty or an example has no answer to verify against.
    """
    if n < 1 or (n > 1 and temperature == 0):
        raise ConfigError(f"n={n} at temperature {temperature}: expected n >= 1, and n = 1 for greedy decoding.")
    if not task.verifiable:
        missing = next((example.id for example in task.examples if example.answer is None), None)
        raise TaskError(
            f"task '{task.name}' cannot be evaluated: "
            + (f"example '{missing}' has no answer." if missing is not None else "it has no examples.")
            + " Expected examples that all have an answer; use another task or fill in the `answer` column."
        )
    start = time.perf_counter()
    flat = generate(
        model,
        tokenizer,
        [example.prompt for example in task.examples for _ in range(n)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
        progress=progress,
        vocab_size=vocab_size,
    )
    repeated = [example for example in task.examples for _ in range(n)]
    texts = [completion.marked for completion in flat]
    values = task.verify_batch(texts, repeated)
    grades = [check_score(value, example, task.name) for value, example in zip(values, repeated, strict=True)]
    completions = [flat[i : i + n] for i in range(0, len(flat), n)]
    scores = [grades[i : i + n] for i in range(0, len(flat), n)]
    found = task.answers_found(texts)
    return EvalResult(
        task.examples, completions, scores, time.perf_counter() - start, None if found is None else sum(found)
    )
