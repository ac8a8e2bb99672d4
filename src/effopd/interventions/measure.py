"""Evaluation of a model at every point of an intervention; equal models are evaluated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.isolation import evaluating
from effopd.common.progress import Counted
from effopd.common.statistics import ratio_with_error
from effopd.distill.divergence import reverse_kl_of_completions, shared_vocab_size
from effopd.interventions.editable_model import EditableModel
from effopd.interventions.points import BASE, Point
from effopd.interventions.results import InterventionResults
from effopd.interventions.sources import Sources
from effopd.models.logit_path import logit_path
from effopd.tasks.base import Task
from effopd.tasks.evaluate import EvalResult, evaluate
from effopd.tasks.sampling import Sampling


@dataclass
class Evaluator:
    """Evaluation shared by all points: same prompts, same sampling noise."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    sampling: Sampling
    teacher: PreTrainedModel | None = None
    _vocab_size: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self._vocab_size = shared_vocab_size(self.model, self.teacher, len(self.tokenizer))
            for model in (self.model, self.teacher):
                logit_path(model)  # raises before anything is sampled

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary shared with the teacher; `None`: no teacher."""
        return self._vocab_size

    def measure(self) -> dict[str, Any]:
        """Accuracy with 95 % interval over prompts, per-prompt accuracies, lengths and cost.

        With a teacher, also the reverse KL.
        """
        with Counted(self.sampling.n * len(self.task), "answers", "answer", leave=False) as bar:
            result = evaluate(
                self.model,
                self.tokenizer,
                self.task,
                self.sampling,
                vocab_size=self._vocab_size,
                progress=bar.update,
            )
        interval = result.accuracy
        measured = {
            "accuracy": interval.mean,
            "accuracy_low": interval.low,
            "accuracy_high": interval.high,
            "n": interval.n,
            "mean_score": result.mean_score,
            "response_length": float(np.mean(result.lengths)),
            "truncated_share": result.truncated_share,
            **({} if result.answers_found is None else {"answers_found": result.answers_found}),
            **({} if result.verdicts is None else {"verdicts": result.verdicts}),
            "answers_cut": result.answers_cut,
            "answers_empty": result.answers_empty,
            "generated_tokens": result.generated_tokens,
            "accuracies": [float(np.mean(row)) for row in result.correct],
        }
        if self.teacher is not None:
            measured |= self._kl(result, self.teacher)
        return measured | {"seconds": result.seconds}

    def _kl(self, result: EvalResult, teacher: PreTrainedModel) -> dict[str, float]:
        """Exact reverse KL(model ‖ teacher), temperature 1, on the sampled answers, nats per token.

        95 % interval over prompts: ratio of sums, delta method, normal quantile, floored at 0.
        """
        answers = [answer for row in result.completions for answer in row]
        assert self._vocab_size is not None, "there is a teacher"
        with evaluating(self.model, teacher):
            sums, counts = reverse_kl_of_completions(
                self.model,
                teacher,
                [answer.prompt_ids for answer in answers],
                [answer.completion_ids for answer in answers],
                vocab_size=self._vocab_size,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                batch_size=self.sampling.batch_size,
            )
        prompts = len(result.examples)
        by_prompt = [np.asarray(values).reshape(prompts, -1).sum(axis=1).tolist() for values in (sums, counts)]
        mean, error = ratio_with_error(*by_prompt)
        return {"kl": mean, "kl_low": max(0.0, mean - 1.96 * error), "kl_high": mean + 1.96 * error}


def measure_points(
    points: Sequence[Point],
    model: EditableModel,
    sources: Sources,
    evaluator: Evaluator,
    results: InterventionResults,
) -> None:
    """Measure every point that has no result yet; the result of an equal model is reused."""
    todo = [point for point in points if point.id not in results]
    with Counted(len(points), "points", "point", done=len(points) - len(todo)) as bar:
        for point in todo:
            bar.about(point.id)
            _measure(point, model, sources, evaluator, results)
            bar.update()


def _measure(
    point: Point, model: EditableModel, sources: Sources, evaluator: Evaluator, results: InterventionResults
) -> None:
    same = results.of_model(point.same_model)
    if same is not None:
        results.add(point, sources.step(point), same["update_norm"], same["measured"])
        return
    with model.at(point) as norm:
        base = results.of_model(BASE) if norm == 0.0 else None
        measured = evaluator.measure() if base is None else base["measured"]
    results.add(point, sources.step(point), norm, measured)
