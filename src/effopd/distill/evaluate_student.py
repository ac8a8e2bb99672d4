"""How far the student is: held-out exact reverse KL and accuracy, on the same sampled answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.distributed import all_gather_or_raise, merge_from_ranks, rank, split_between_ranks
from effopd.common.isolation import evaluating
from effopd.common.statistics import accuracy_interval, ratio_with_error
from effopd.distill.divergence import reverse_kl_of_completions
from effopd.tasks.base import Task
from effopd.tasks.evaluate import EvalResult, evaluate


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

    Always the same prompts and the same sampling noise (`args.eval_seed`), so a curve over training is paired. Several
    processes answer a share each, with noise of their own; all of them get the whole result.

    Returns:
        (`kl` in nats per token with its standard error `kl_se` over prompts, `loss` (= `kl`), `accuracy` with
        `accuracy_low` and `accuracy_high`, the same for `accuracy_greedy`, `response_length`, `truncated_share`,
        the counts `answers`, `answers_found` (if the verifier can tell), `answers_cut` and `answers_empty` of the sampled
        ones, `runtime`; number of tokens generated). Without a teacher there is no `kl` and no `loss`.
    """
    start = time.perf_counter()

    def answer(temperature: float, against: PreTrainedModel | None) -> list[_Answer]:
        def share() -> list[_Answer]:
            mine = task.subset(split_between_ranks(task.examples))
            silent = args.disable_tqdm or rank() > 0
            with tqdm(total=len(mine), desc="evaluate", leave=False, disable=silent or None) as bar:
                result = evaluate(
                    student,
                    tokenizer,
                    mine,
                    temperature=temperature,
                    max_new_tokens=args.max_completion_length,
                    batch_size=args.per_device_eval_batch_size,
                    chat_template_kwargs=args.chat_template_kwargs,
                    seed=args.eval_seed + rank(),  # the ranks' answers must not share their noise
                    progress=bar.update,
                    vocab_size=vocab_size or None,
                )
            kl = [0.0] * len(mine)
            if against is not None:  # not its truth: a compiled model asks its module for a length then
                kl = _kl(student, against, result, args, vocab_size, tokenizer.pad_token_id, autocast)
            can_tell = mine.answers_found([said.marked for (said,) in result.completions])
            found: Sequence[bool | None] = [None] * len(mine) if can_tell is None else can_tell
            graded = zip(result.completions, result.correct, kl, found, strict=True)
            return [
                _Answer(right, len(said.completion_ids), said.truncated, sums, has, not said.text.strip())
                for (said,), (right,), sums, has in graded
            ]

        return merge_from_ranks(all_gather_or_raise(share), len(task))

    sampled = answer(args.eval_temperature, teacher)
    results = {"accuracy": sampled}
    metrics: dict[str, float] = {}
    if teacher is not None:
        kl, error = ratio_with_error([one.kl for one in sampled], [one.tokens for one in sampled])
        metrics = {"kl": kl, "kl_se": error, "loss": kl}
    if args.eval_greedy:
        results["accuracy_greedy"] = answer(0.0, None)
    for name, answers in results.items():
        interval = accuracy_interval([[one.correct] for one in answers])
        metrics |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    metrics |= {
        "response_length": float(np.mean([one.tokens for one in sampled])),
        "truncated_share": float(np.mean([one.truncated for one in sampled])),
        "answers": len(sampled),
        **({"answers_found": sum(bool(one.found) for one in sampled)} if sampled[0].found is not None else {}),
        "answers_cut": sum(one.truncated for one in sampled),
        "answers_empty": sum(one.empty for one in sampled),
        "runtime": time.perf_counter() - start,
    }
    return metrics, sum(one.tokens for answers in results.values() for one in answers)


class _Answer(NamedTuple):
    correct: bool
    tokens: int
    truncated: bool
    kl: float  # summed over its tokens, in nats
    found: bool | None  # something to grade; `None` where the verifier cannot tell
    empty: bool


def _kl(student, teacher, sampled: EvalResult, args, vocab_size: int, pad: int, autocast) -> list[float]:
    answers = [row[0] for row in sampled.completions]
    with evaluating(student, teacher), autocast():
        sums, _ = reverse_kl_of_completions(
            student,
            teacher,
            [answer.prompt_ids for answer in answers],
            [answer.completion_ids for answer in answers],
            vocab_size=vocab_size,
            pad_token_id=pad,
            temperature=args.temperature,
            batch_size=args.per_device_eval_batch_size,
        )
    return sums
