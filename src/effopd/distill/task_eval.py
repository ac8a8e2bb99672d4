"""How far the student is: held-out exact reverse KL and accuracy, on the same sampled answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.distill.divergence import reverse_kl_of_completions
from effopd.evaluate import EvalResult, evaluate
from effopd.restore import evaluating
from effopd.tasks.base import Task


def evaluate_task(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    args: Any,
    *,
    vocab_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[dict[str, float], int]:
    """Sample one answer a prompt, measure its KL to the teacher (if there is one) and its accuracy; then greedy, if asked.

    Always the same prompts and the same sampling noise (`args.eval_seed`), so a curve over training is paired.

    Returns:
        (`kl` in nats per token with its standard error `kl_se` over prompts, `loss` (= `kl`), `accuracy` with
        `accuracy_low` and `accuracy_high`, the same for `accuracy_greedy`, `response_length`, `truncated_share`,
        `runtime`; number of tokens generated). Without a teacher there is no `kl` and no `loss`.
    """
    start = time.perf_counter()

    def answer(temperature: float) -> EvalResult:
        with tqdm(total=len(task), desc="evaluate", leave=False, disable=args.disable_tqdm) as bar:
            return evaluate(
                student,
                tokenizer,
                task,
                temperature=temperature,
                max_new_tokens=args.max_completion_length,
                batch_size=args.per_device_eval_batch_size,
                chat_template_kwargs=args.chat_template_kwargs,
                seed=args.eval_seed,
                progress=bar.update,
            )

    results = {"accuracy": answer(args.eval_temperature)}
    metrics: dict[str, float] = {}
    if teacher is not None:
        metrics = _kl(student, teacher, results["accuracy"], args, vocab_size, tokenizer.pad_token_id, autocast)
    if args.eval_greedy:
        results["accuracy_greedy"] = answer(0.0)
    for name, result in results.items():
        interval = result.accuracy
        metrics |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    metrics |= {
        "response_length": float(np.mean(results["accuracy"].lengths)),
        "truncated_share": results["accuracy"].truncated_share,
        "runtime": time.perf_counter() - start,
    }
    return metrics, sum(result.generated_tokens for result in results.values())


def _kl(student, teacher, sampled: EvalResult, args, vocab_size: int, pad: int, autocast):
    answers = [row[0] for row in sampled.completions]
    with evaluating(student, teacher), autocast():
        sums, counts = reverse_kl_of_completions(
            student,
            teacher,
            [answer.prompt_ids for answer in answers],
            [answer.completion_ids for answer in answers],
            vocab_size=vocab_size,
            pad_token_id=pad,
            temperature=args.temperature,
            batch_size=args.per_device_eval_batch_size,
        )
    mean, error = ratio_with_error(sums, counts)
    return {"kl": mean, "kl_se": error, "loss": mean}


def ratio_with_error(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Token mean Σ sums / Σ counts, and its standard error over sequences (ratio estimator, delta method)."""
    s, c = np.asarray(sums), np.asarray(counts, dtype=np.float64)
    mean = s.sum() / c.sum()
    residual = s - mean * c
    error = np.sqrt(residual.var(ddof=1) / len(s)) / c.mean() if len(s) > 1 else 0.0
    return float(mean), float(error)
