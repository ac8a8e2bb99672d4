"""Linearity of the hidden states along training: the KL predicted from two forwards, and the true.

For a saved step W_t and Δ = W_t − anchor, the KL to the teacher at W_t + sΔ is predicted from the
hidden states at two scales (`models.ray`) and measured with a forward pass at every scale. All KLs
are those on the same rollouts, which W_t sampled.

Shapes: N scored positions, P prompts, K scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effopd.common.float64 import for_float64
from effopd.common.isolation import evaluating
from effopd.common.progress import Counted
from effopd.common.statistics import Z, ratio_with_error
from effopd.errors import NonFiniteWeightsError
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.moving_head import moving_head
from effopd.interventions.editable_model import EditableModel
from effopd.interventions.measure import Evaluator
from effopd.interventions.points import Point, PointInputs, take_trained
from effopd.interventions.results import InterventionResults
from effopd.interventions.sources import Sources
from effopd.models.head import Head
from effopd.models.ray import RayKL, newton_scale
from effopd.models.token_batch import TokenBatch
from effopd.tasks.generate import generate

#: Relative accuracy of best scales.
_TOLERANCE = 1e-3


def linearity_points(inputs: PointInputs) -> list[Point]:
    """KL along W_t + sΔ, predicted from the hidden states at two scales, against the true KL."""
    options = inputs.options
    known = {*map(float, options.known_scales)}
    scales = sorted({0.0, *map(float, options.scales), *known})

    def point(run: str, index: int, where: dict[str, Any]) -> Point:
        measures = {"known": float(where["scale"] in known)}
        return Point("linearity", run, where, take_trained, snapshot=index, measures=measures)

    return [
        point(run, index, {"anchor": anchor, "step": step, "scale": scale})
        for run, steps in inputs.steps.items()
        for index, step in enumerate(steps)
        if step != 0
        for anchor in options.anchors
        for scale in scales
    ]


def measure_linearity(
    points: Sequence[Point],
    model: EditableModel,
    sources: Sources,
    evaluator: Evaluator,
    results: InterventionResults,
) -> None:
    """Measure every step that has missing points, and add all its points."""
    steps = [list(group) for _, group in itertools.groupby(points, key=lambda point: (point.run, point.snapshot))]
    todo = [group for group in steps if any(point.id not in results for point in group)]
    with Counted(len(steps), "steps", "step", done=len(steps) - len(todo)) as bar:
        for group in todo:
            bar.about(f"{group[0].run}, step {sources.step(group[0])}")
            _measure_step(group, model, sources, evaluator, results)
            bar.update()


def _measure_step(
    points: Sequence[Point],
    model: EditableModel,
    sources: Sources,
    evaluator: Evaluator,
    results: InterventionResults,
) -> None:
    trained = points[0]
    with model.at(trained):
        rollouts = Rollouts.sampled(evaluator)
    for anchor, group in itertools.groupby(points, key=lambda point: point.coordinates["anchor"]):
        line = list(group)
        if all(point.id in results for point in line):
            continue
        with _at_anchor(model, trained, anchor):
            weights = LiveWeights(model.model, "all")  # the anchor: the current weights
        known = [point.coordinates["scale"] for point in line if point.measures["known"]]
        with model.at(trained) as norm:
            measured = Line(evaluator, weights, rollouts).measure([p.coordinates["scale"] for p in line], known)
        for point, values in zip(line, measured, strict=True):
            if point.id not in results:
                results.add(point, sources.step(point), norm, values)


@contextmanager
def _at_anchor(model: EditableModel, trained: Point, anchor: str) -> Iterator[None]:
    """The model at the anchor of a step: the saved step before it, or the base."""
    previous = anchor == "previous" and trained.snapshot > 0
    before = Point("linearity", trained.run, {}, take_trained, snapshot=trained.snapshot - 1)
    with model.at(before) if previous else nullcontext():
        yield


@dataclass(frozen=True)
class Rollouts:
    """Sampled answers, with the teacher's hidden states at their tokens.

    Attributes:
        batches: prompts and answers.
        h_teacher_NH: the teacher's hidden states.
        tokens_P: scored tokens per prompt.
        answers: answers per prompt.
    """

    batches: Sequence[TokenBatch]
    h_teacher_NH: Tensor
    tokens_P: NDArray[np.float64]
    answers: int

    @classmethod
    def sampled(cls, evaluator: Evaluator) -> Rollouts:
        """Answers of the evaluator's model to all prompts, with its sampling settings."""
        sampling, tokenizer = evaluator.sampling, evaluator.tokenizer
        prompts = [example.prompt for example in evaluator.task.examples]
        with Counted(len(prompts) * sampling.n, "answers", "answer", leave=False) as bar:
            rows = generate(
                evaluator.model, tokenizer, prompts, sampling, vocab_size=evaluator.vocab_size, progress=bar.update
            )
        starts = range(0, len(rows), sampling.batch_size)
        parts = [rows[start : start + sampling.batch_size] for start in starts]
        padding = tokenizer.pad_token_id or 0
        batches = [
            TokenBatch.of([row.prompt_ids for row in part], [row.completion_ids for row in part], padding)
            for part in parts
        ]
        assert evaluator.teacher is not None, "linearity needs a teacher"
        lengths = np.array([len(row.completion_ids) for row in rows], dtype=np.float64)
        return cls(
            batches, hidden_states(evaluator.teacher, batches), lengths.reshape(-1, sampling.n).sum(1), sampling.n
        )

    def by_prompt(self, value_N: Tensor) -> NDArray[np.float64]:
        """Sums of a value per prompt, [P]."""
        lengths = [length for batch in self.batches for length in batch.lengths]
        parts = for_float64(value_N).double().split(lengths)
        return np.array([float(part.sum()) for part in parts]).reshape(-1, self.answers).sum(1)


@torch.no_grad()
def hidden_states(model: Any, batches: Sequence[TokenBatch]) -> Tensor:
    """Hidden states [N, H] that predict the scored tokens of all batches."""
    with evaluating(model):
        return torch.cat([batch.hidden(model) for batch in batches])


class Line:
    """KL along W + sΔ of a model at W, on rollouts of W.

    Memory: the hidden states at the known scales, and at four more.

    Args:
        evaluator: model, teacher and vocabulary.
        weights: the model's weights, with their anchor W − Δ.
        rollouts: answers that the model sampled at W.
    """

    def __init__(self, evaluator: Evaluator, weights: LiveWeights, rollouts: Rollouts):
        self._model, self._weights, self._rollouts = evaluator.model, weights, rollouts
        assert evaluator.teacher is not None and evaluator.vocab_size is not None, "linearity needs a teacher"
        self._delta_norm = weights.displacement_norm()
        self._ray = RayKL(
            moving_head(evaluator.model, weights, evaluator.vocab_size),
            Head.of(evaluator.teacher, evaluator.vocab_size),
            rollouts.h_teacher_NH,
        )

    def measure(self, scales: Sequence[float], known: Sequence[float]) -> list[dict[str, Any]]:
        """One row of measurements per scale; the model is back at W afterwards.

        Args:
            scales: ascending, with 0 and the known scales.
            known: scales whose hidden states are used for predictions.
        """
        self._weights.begin()
        try:
            true = self._true_curve(scales, known)
            predicted = self._predicted(scales, known)
            whole = self._best(scales, known, {scale: float(sums.sum()) for scale, sums in true.items()})
        finally:
            self._weights.abort()
        return [self._row(true[scale], predicted[scale]) | whole for scale in scales]

    def _kl(self, scale: float) -> NDArray[np.float64]:
        """True KL per prompt at W + sΔ, with its hidden states; NaN if the weights overflow."""
        try:
            self._weights.move_to(scale)
        except NonFiniteWeightsError:
            return np.full_like(self._rollouts.tokens_P, math.nan)
        self._ray.add(scale, hidden_states(self._model, self._rollouts.batches))
        return self._rollouts.by_prompt(self._ray.kl([scale], nodes=(scale,))[0])

    def _true_curve(self, scales: Sequence[float], known: Sequence[float]) -> dict[float, NDArray[np.float64]]:
        """True KL per prompt at every scale; of the hidden states, those near the minimum stay."""
        true: dict[float, NDArray[np.float64]] = {}
        for scale in scales:
            true[scale] = self._kl(scale)
            near = {*_around_the_lowest({s: float(sums.sum()) for s, sums in true.items()}), *known, scale}
            for other in set(self._ray.known) - near:
                self._ray.drop(other)
        return true

    def _predicted(self, scales: Sequence[float], known: Sequence[float]) -> dict[float, NDArray[np.float64]]:
        kl_KN = self._ray.kl(scales, nodes=known)
        return {scale: self._rollouts.by_prompt(kl_N) for scale, kl_N in zip(scales, kl_KN, strict=True)}

    def _best(self, scales: Sequence[float], known: Sequence[float], true: Mapping[float, float]) -> dict[str, float]:
        """Predicted and true best scales within the range of `scales`, and what they gain."""
        at = self._ray.derivatives(0.0, nodes=known)
        slope, curvature = (float(for_float64(x).double().mean()) for x in (at.slope, at.curvature))
        predicted = self._ray.best(scales, nodes=known, tolerance=_TOLERANCE)
        near = _around_the_lowest(true)
        lowest = min(near, key=true.__getitem__)
        best = self._ray.best(near, nodes=near, tolerance=_TOLERANCE) if len(near) > 1 else lowest
        sums = {scale: true.get(scale, math.nan) for scale in (0.0, lowest)}
        sums |= {scale: float(self._kl(scale).sum()) for scale in (predicted, best) if scale not in sums}
        best = best if sums[best] <= sums[lowest] else lowest
        gain = sums[0.0] - sums[best]
        newton = newton_scale(slope, curvature)
        tokens = float(self._rollouts.tokens_P.sum())
        return {
            "delta_norm": self._delta_norm,
            "slope": slope,
            "curvature": curvature,
            "newton_scale": math.nan if newton is None else newton,
            "best_predicted": predicted,
            "best_true": best,
            "kl_at_predicted": sums[predicted] / tokens,
            "kl_at_best": sums[best] / tokens,
            "gain_share": (sums[0.0] - sums[predicted]) / gain if gain > 0 else math.nan,
        }

    def _row(self, true_P: NDArray[np.float64], predicted_P: NDArray[np.float64]) -> dict[str, Any]:
        """KLs in nats per token and their ratio, with 95 % intervals over prompts."""
        tokens_P = self._rollouts.tokens_P
        kl, predicted = _interval("kl", true_P, tokens_P), _interval("kl_predicted", predicted_P, tokens_P)
        ratio = _interval("kl_ratio", predicted_P, true_P)
        return {"n": len(tokens_P), "tokens": int(tokens_P.sum()), **kl, **predicted, **ratio}


def _around_the_lowest(true: Mapping[float, float]) -> list[float]:
    """The scale with the lowest finite KL and its neighbors, ascending."""
    scales = sorted(scale for scale, value in true.items() if math.isfinite(value))
    index = min(range(len(scales)), key=lambda i: true[scales[i]], default=0)
    return scales[max(0, index - 1) : index + 2]


def _interval(name: str, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> dict[str, float]:
    """Σ sums / Σ counts with its 95 % interval over prompts (delta method), floored at 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, error = ratio_with_error(sums.tolist(), counts.tolist())
    return {name: mean, f"{name}_low": max(0.0, mean - Z * error), f"{name}_high": mean + Z * error}
