"""Collect rollouts: sample answers once, score them with student and teacher, and store them.

The student samples. With `Header.sampler` 'teacher', the teacher does, and a verifier grades its
answers: these are traces, as DisCorD and the mixing of `lmbda` use them.

Every file of the store has random numbers of its own, drawn from the seed and the file's number, so
an interrupted collection continues with the rollouts of an uninterrupted one.

Differs from the released code of arXiv 2604.13010: the sampled token ids are stored, not text; the
end token belongs to the answer, so stopping is trained; and both log-probabilities are at the
sampling temperature, so training starts exactly on-policy.

Shapes: N answer tokens, V shared vocabulary, K teacher tokens per position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effopd.common.distributed import rank
from effopd.common.isolation import evaluating
from effopd.distill.divergence import Head, token_logprobs
from effopd.distill.offline_store import CollectCosts, Header, RolloutStore, StoredRollout
from effopd.errors import NonFiniteLossError
from effopd.models.token_batch import TokenBatch
from effopd.runs.ledger import CostLedger
from effopd.tasks.base import Example, Task
from effopd.tasks.evaluate import CORRECT
from effopd.tasks.generate import Completion, generate
from effopd.tasks.sampling import Sampling

#: Positions per tile of dense teacher logits, for the top-K.
_TILE = 256


def collect(
    store: RolloutStore,
    header: Header,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    task: Task,
    *,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda new: None,
) -> CollectCosts:
    """Sample and score the files that the store lacks; return the cost of this call.

    Args:
        store: opened with `header`.
        task: the prompts, in the order of `header.prompts_sha256`, and the verifier of traces.
        progress: called with the number of new rollouts.

    Raises:
        NonFiniteLossError: a model's log-probabilities are not finite.
    """
    total = CollectCosts()
    for index in store.missing(header):
        start, start_cpu = time.perf_counter(), time.process_time()
        part = task.examples[index * header.rows_per_file : (index + 1) * header.rows_per_file]
        seed = int(np.random.SeedSequence([header.seed, index]).generate_state(1)[0])
        sampling = Sampling(
            temperature=header.temperature,
            max_new_tokens=header.max_completion_length,
            batch_size=header.batch_size,
            seed=seed,
            chat_template_kwargs=chat_template_kwargs,
        )
        prompts = [example.prompt for example in part]
        model = teacher if header.sampler == "teacher" else student
        answers = generate(model, tokenizer, prompts, sampling, vocab_size=header.vocab_size, progress=progress)
        rows: list[StoredRollout] = []
        forward = 0
        for first in range(0, len(part), header.batch_size):
            batch = slice(first, first + header.batch_size)
            new, tokens = score(student, teacher, tokenizer, header, part[batch], answers[batch])
            rows += new
            forward += tokens
        if header.sampler == "teacher":
            scores = task.verify_batch([answer.marked for answer in answers], part)
            rows = [replace(row, score=float(score)) for row, score in zip(rows, scores, strict=True)]
        generated = sum(len(answer.completion_ids) for answer in answers)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        costs = CollectCosts(seconds, generated, forward, forward, cpu)
        store.write(index, header, rows, costs)
        total += costs
    return total


def score(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    header: Header,
    examples: Sequence[Example],
    answers: Sequence[Completion],
) -> tuple[list[StoredRollout], int]:
    """Answers of one batch with their log-probabilities, and the number of forward tokens."""
    batch = TokenBatch.of(
        [answer.prompt_ids for answer in answers],
        [answer.completion_ids for answer in answers],
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    target_N = torch.cat([torch.tensor(answer.completion_ids) for answer in answers])
    with torch.no_grad(), evaluating(student, teacher):
        student_NH, teacher_NH = batch.hidden(student), batch.hidden(teacher)
        heads = [Head.of(model, header.vocab_size) for model in (student, teacher)]
        logp_N, _ = token_logprobs(student_NH, heads[0], target_N.to(student_NH.device), header.temperature)
        logq_N, _ = token_logprobs(teacher_NH, heads[1], target_N.to(teacher_NH.device), header.temperature)
        top_ids_NK, top_NK = top_logprobs(teacher_NH, heads[1], header.top_k, header.temperature)
    for role, values in (("student", logp_N), ("teacher", logq_N)):
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteLossError(
                f"the {role}'s log-probabilities are not finite. Check its weights and its dtype (float16 overflows "
                "earlier than bfloat16). The files written so far are complete."
            )
    lengths = batch.lengths
    columns = [each.float().cpu().split(lengths) for each in (logq_N, logp_N)]
    top_ids, top = top_ids_NK.cpu().split(lengths), top_NK.cpu().split(lengths)
    rows = [
        StoredRollout(
            id=str(example.id),
            prompt_ids=answer.prompt_ids,
            completion_ids=answer.completion_ids,
            finish_reason="length" if answer.truncated else "stop",
            teacher_logprobs=columns[0][i].tolist(),
            student_logprobs=columns[1][i].tolist(),
            teacher_topk_ids=top_ids[i].flatten().tolist(),
            teacher_topk_logprobs=top[i].flatten().tolist(),
        )
        for i, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]
    return rows, batch.tokens


def top_logprobs(hidden_NH: Tensor, head: Head, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids [N, K] and log-probabilities [N, K] of the K likeliest tokens, likeliest first."""
    if k == 0:
        empty = hidden_NH.new_zeros((len(hidden_NH), 0), dtype=torch.float32)
        return empty.long(), empty
    tops = [head.logits(tile, temperature).log_softmax(-1).topk(k) for tile in hidden_NH.split(_TILE)]
    return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])


def charge(ledger: CostLedger, costs: CollectCosts, clock: str) -> None:
    """Add the cost of collecting answers to a new run's ledger; a resume replaces the totals.

    Only rank 0 adds, because the tokens of all ranks are summed.

    Args:
        clock: the ledger's `cost_clock`, 'wall' or 'cpu'.
    """
    if rank() == 0:
        ledger.count("rollout", generated=costs.generated_tokens, forward=costs.student_forward_tokens)
        ledger.count("teacher", forward=costs.teacher_forward_tokens)
        ledger.seconds["rollout"] += (costs.cpu_seconds if clock == "cpu" else 0) or costs.seconds


def correct_rows(rows: Sequence[StoredRollout]) -> list[StoredRollout]:
    """The rows that are not graded, or graded as correct."""
    return [row for row in rows if row.score is None or row.score >= CORRECT]
