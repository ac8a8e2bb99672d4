"""`accuracy`: the share of validation prompts that a candidate answers correctly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.distributed import all_gather_or_raise, merge_from_ranks, rank, split_between_ranks, world_size
from effopd.errors import NonFiniteLossError, TaskError
from effopd.extrapolate.search import Score
from effopd.tasks.base import Example, Task, Verifier
from effopd.tasks.evaluate import evaluate
from effopd.tasks.generate import encode_prompts
from effopd.tasks.sampling import Sampling


class AccuracyScorer:
    """Accuracy of sampled answers on D_v, the paper's gate (arXiv 2605.11739).

    The look-ahead seeds every call of one search alike, so all candidates share the sampling noise.
    Several processes answer a share each; all of them get the whole score. A candidate whose
    predictions are not finite scores NaN, which no gate lets pass.

    Args:
        task: D_v: examples with answers and their verifier.
        tokenizer: encodes prompts and decodes answers.
        sampling: how answers are drawn. Its `seed` is not used: the search seeds every call.
        progress: show a bar for each candidate.
        vocab_size: only tokens below it are sampled; `None`: all.

    Raises:
        TaskError: D_v is empty, an example has no answer, or the chat template refuses a prompt.
        CompatibilityError: plain prompts end with an end token.
    """

    #: Settings of `EffOPDConfig` that this scorer is built from.
    reads = ("validation_size", "temperature", "batch_size", "max_completion_length")

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        progress: bool = False,
        vocab_size: int | None = None,
    ):
        if not task.verifiable:
            raise TaskError(
                f"the accuracy gate needs validation prompts with answers, but task '{task.name}' has "
                + ("none at all." if not task.examples else "prompts without an answer.")
                + " Give every row an `answer`, or pass a scorer of your own (a callable model → number)."
            )
        encode_prompts(
            tokenizer, [example.prompt for example in task.examples], sampling.template
        )  # refused now, if at all
        self.task, self.sampling, self.vocab_size = task, sampling, vocab_size
        self.tokenizer, self._progress = tokenizer, progress

    @property
    def validation_ids(self) -> list[str]:
        """Ids of the D_v examples, in order; saved with checkpoints so that a resume can prove it
        has the same D_v.
        """
        return [example.id for example in self.task.examples]

    def __call__(self, model: PreTrainedModel) -> Score:
        start, examples = time.perf_counter(), self.task.examples
        mine = self.task if world_size() == 1 else self.task.subset(split_between_ranks(examples))
        # The search has seeded, every rank alike: the ranks' answers must not share their noise.
        seed = None if world_size() == 1 else (torch.initial_seed() + rank()) % 2**63
        sampling = replace(self.sampling, seed=seed)
        silent = not self._progress or rank() > 0

        def answer() -> tuple[list[float] | None, int]:
            try:
                with tqdm(total=len(mine), desc="look ahead", leave=False, disable=silent or None) as bar:
                    result = evaluate(
                        model, self.tokenizer, mine, sampling, vocab_size=self.vocab_size, progress=bar.update
                    )
            except NonFiniteLossError:
                return None, 0
            return [sum(row) / len(row) for row in result.correct], result.generated_tokens

        parts = all_gather_or_raise(answer)
        shares = [grades for grades, _ in parts if grades is not None]
        per_example = tuple(merge_from_ranks(shares, len(examples))) if len(shares) == len(parts) else ()
        return Score(
            mean=sum(per_example) / len(per_example) if per_example else math.nan,
            per_example=per_example,
            seconds=time.perf_counter() - start,
            generated_tokens=sum(tokens for _, tokens in parts),
        )


def training_task(dataset: Any, verify: Verifier | None) -> Task:
    """A task made of a trainer's own training rows.

    Args:
        dataset: rows with `prompt` and `answer`, and `id` and `metadata` if they have them.
        verify: grades an answer; default: `math-verify`.

    Raises:
        TaskError: there is no dataset, it has no length (a stream), or it lacks a column.
    """
    kind, columns = type(dataset).__name__, list(getattr(dataset, "column_names", None) or [])
    if dataset is None:
        reason = "this trainer has none"
    elif not hasattr(dataset, "__len__"):
        reason = f"this one is a stream ({kind}), whose rows can be neither counted nor chosen"
    else:
        if not columns and len(dataset) and isinstance(dataset[0], Mapping):
            columns = list(dataset[0])
        missing = [name for name in ("prompt", "answer") if name not in columns]
        reason = f"it needs its columns 'prompt' and 'answer'; got {columns or kind}" if missing else ""
    if reason:
        raise TaskError(
            f"the accuracy gate draws D_v from the training set: {reason}. Train on a dataset "
            "with a length and an `answer` column, "
            "or pass task=… or scorer=… to EffOPDCallback."
        )
    if verify is None:
        from effopd.tasks import MathVerifier

        verify = MathVerifier()
    rows = (dataset[i] for i in range(len(dataset)))
    examples = (
        Example(
            str(row.get("id", index)),
            row["prompt"],
            _answer(row["answer"], index),
            _metadata(row.get("metadata")),
        )
        for index, row in enumerate(rows)
    )
    return Task("training set", tuple(examples), verify)


def _answer(value: Any, index: int) -> str | None:
    from effopd.tasks.reference import UnusableAnswer, reference_text

    try:
        return reference_text(value)
    except UnusableAnswer as error:
        raise TaskError(
            f"row {index} of the training set: expected {error} in 'answer', got {type(value).__name__} "
            f"{str(value)[:60]!r}. {error.fix}"
        ) from error


def _metadata(value: Any) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) and value else dict(value or {})
