"""`accuracy` scorer: share of correct sampled answers to the validation prompts."""

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
from effopd.runs.missing_answers import AnswerWatch, Counts
from effopd.tasks.base import Example, Task, Verifier
from effopd.tasks.evaluate import EvalResult, evaluate
from effopd.tasks.generate import encode_prompts
from effopd.tasks.sampling import Sampling


class AccuracyScorer:
    """Accuracy of sampled answers to the validation prompts, 0–1 (arXiv 2605.11739).

    All candidates of a search share the sampling noise, because the search seeds every call alike.
    With several processes, each answers a share of the prompts and all return the full score. A
    candidate with non-finite logits scores NaN and is never accepted.

    Args:
        task: the validation prompts, with reference answers and their verifier.
        tokenizer: encodes prompts and decodes answers.
        sampling: sampling settings; `seed` is ignored, because the search seeds every call.
        progress: show a progress bar per candidate.
        vocab_size: sample only tokens below this id; `None`: all.

    Raises:
        TaskError: there are no prompts, an example has no answer, or the chat template refuses a
            prompt.
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
                f"the accuracy scorer needs validation prompts with answers, but task '{task.name}' has "
                + ("none at all." if not task.examples else "prompts without an answer.")
                + " Give every row an `answer`, or pass a scorer of your own (a callable model → number)."
            )
        # refuse unusable prompts before training
        encode_prompts(tokenizer, [example.prompt for example in task.examples], sampling.template)
        self.task, self.sampling, self.vocab_size = task, sampling, vocab_size
        self.tokenizer, self._progress = tokenizer, progress
        self._watch: AnswerWatch | None = AnswerWatch(limit=sampling.max_new_tokens)

    @property
    def validation_ids(self) -> list[str]:
        """Ids of the validation prompts, in order; compared with the checkpoint's on resume."""
        return [example.id for example in self.task.examples]

    def __call__(self, model: PreTrainedModel) -> Score:
        start, examples = time.perf_counter(), self.task.examples
        share = self.task if world_size() == 1 else self.task.subset(split_between_ranks(examples))
        # The search seeds all ranks alike, but their answers must not share noise.
        seed = None if world_size() == 1 else (torch.initial_seed() + rank()) % 2**63
        sampling = replace(self.sampling, seed=seed)
        silent = not self._progress or rank() > 0

        def answer() -> tuple[list[float] | None, int, dict[str, int]]:
            try:
                with tqdm(total=len(share), desc="look ahead", leave=False, disable=silent or None) as bar:
                    result = evaluate(
                        model, self.tokenizer, share, sampling, vocab_size=self.vocab_size, progress=bar.update
                    )
            except NonFiniteLossError:
                return None, 0, {}
            self._look(share, result)
            return [sum(row) / len(row) for row in result.correct], result.generated_tokens, result.verdicts or {}

        parts = all_gather_or_raise(answer)
        shares = [grades for grades, _, _ in parts if grades is not None]
        per_example = tuple(merge_from_ranks(shares, len(examples))) if len(shares) == len(parts) else ()
        verdicts = next((counts for _, _, counts in parts if counts), {})
        return Score(
            mean=sum(per_example) / len(per_example) if per_example else math.nan,
            per_example=per_example,
            seconds=time.perf_counter() - start,
            generated_tokens=sum(tokens for _, tokens, _ in parts),
            verdicts={name: sum(part[2].get(name, 0) for part in parts) for name in verdicts} or None,
        )

    def _look(self, task: Task, result: EvalResult) -> None:
        """Warn on rank 0 if nearly no answer of the first score can be graded."""
        if self._watch is not None and rank() == 0:
            answers = [answer for row in result.completions for answer in row]
            texts, cut = [answer.marked for answer in answers], [answer.truncated for answer in answers]
            counts = Counts.of(task, texts, cut, [score for row in result.scores for score in row])
            self._watch.see(task, counts, "the look-ahead cannot tell candidates apart by their accuracy")
        self._watch = None


def training_task(dataset: Any, verify: Verifier | None) -> Task:
    """`Task` from a trainer's training dataset.

    Args:
        dataset: rows with `prompt` and `answer`, optionally `id` and `metadata`.
        verify: grades an answer; `None`: `MathVerifier`.

    Raises:
        TaskError: the dataset is missing, has no length (a stream), lacks a column, or has an
            unusable answer.
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
            f"the accuracy scorer draws its validation prompts from the training set: {reason}. Train on a dataset "
            "with a length and an `answer` column, or pass task=… or scorer=… to EffOPDCallback."
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
