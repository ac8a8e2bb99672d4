"""`Observations` of a predicting strategy: steps, accuracies and tensors of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effopd.common.float64 import has_float64
from effopd.extrapolate.search import Score

_SEPARATOR = "|"


class Observations:
    """Updates from the start, one entry per observed step, as the tensors that `Fit.keep` returns.

    Attributes:
        steps: optimizer steps observed.
        by_parameter: for each parameter, one dictionary of tensors per step.
        scores: accuracy on the validation prompts per step; `None`: not measured.
        target: target accuracy; `None`: the fit needs none.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.by_parameter: dict[str, list[Mapping[str, Tensor]]] = {}
        self.scores: list[float | None] = []
        self.target: Score | None = None
        self._uncharged = True

    def add(
        self, step: int, observed: Mapping[str, Mapping[str, Tensor]], score: float | None, device: str | None
    ) -> None:
        """Append a step; move its tensors to `device`, except float64 ones if it lacks float64."""
        self.steps.append(step)
        self.scores.append(score)
        for name, tensors in observed.items():
            moved = {
                key: tensor.to(device) if device and (tensor.dtype != torch.float64 or has_float64(device)) else tensor
                for key, tensor in tensors.items()
            }
            self.by_parameter.setdefault(name, []).append(moved)

    def quality(self) -> Sequence[float]:
        """Accuracy / target accuracy per step; NaN if not measured."""
        goal = self.target.mean if self.target and self.target.mean > 0 else 1.0
        return [float("nan") if score is None else score / goal for score in self.scores]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        points = (point for path in self.by_parameter.values() for point in path)
        return sum(tensor.nbytes for point in points for tensor in point.values())

    def take_target_tokens(self) -> int:
        """Tokens generated to measure the target on the first call; 0 on later calls."""
        tokens = self.target.generated_tokens if self.target and self._uncharged else 0
        self._uncharged = False
        return tokens

    def state_dict(self) -> dict[str, Any]:
        """`tensors`, flat with keys `position|parameter|key`, and JSON values."""
        return {
            "tensors": {
                _SEPARATOR.join((str(index), name, key)): tensor
                for name, points in self.by_parameter.items()
                for index, point in enumerate(points)
                for key, tensor in point.items()
            },
            "steps": list(self.steps),
            "scores": list(self.scores),
            "target": self.target.mean if self.target else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.steps, self.scores = list(state["steps"]), list(state["scores"])
        self.target = None if state["target"] is None else Score(state["target"])
        self._uncharged = not self.steps
        self.by_parameter = {}
        keyed = [(key.split(_SEPARATOR), tensor) for key, tensor in state["tensors"].items()]
        for (index, name, key), tensor in sorted(keyed, key=lambda item: int(item[0][0])):
            points = self.by_parameter.setdefault(name, [])
            if len(points) == int(index):
                points.append({})
            points[int(index)][key] = tensor  # type: ignore[index]
