"""`Point`: one model of an intervention, as a rule for each matrix or vector.

The module holds rules only. It reads no weights and generates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from effopd.errors import ConfigError
from effopd.interventions.options import InterventionOptions
from effopd.weights.difference import Update
from effopd.weights.parts import Part

#: A rule for one part: the new tensor (any floating dtype, the part's shape); `None`: the base's.
Edit = Callable[[Update], Tensor | None]


@dataclass(frozen=True)
class PointInputs:
    """Inputs for building the points of an intervention.

    Attributes:
        parts: every matrix and vector of the base.
        steps: the saved steps of each run, ascending; the last is the trained model. A single
            checkpoint has one.
        norms: run → ‖ΔW_T‖ of every part at the end of the run.
        options: settings of the interventions.
    """

    parts: Sequence[Part]
    steps: Mapping[str, Sequence[int | None]]
    norms: Callable[[str], Mapping[Part, float]]
    options: InterventionOptions


@dataclass(frozen=True)
class Point:
    """One model of an intervention.

    Attributes:
        intervention, run: names of its intervention and run.
        coordinates: values that identify it within intervention and run.
        edit: the rule for the parts that `selects` picks; all other parts stay the base's.
        selects: whether a part can change; decided without reading a tensor.
        snapshot: index into the run's `PointInputs.steps` of the update passed to `edit`; −1 is the
            last.
        model: name of the model. Points with equal `model`, of any intervention, are the same
            model. Empty: the model occurs only once.
        measures: further numbers for the results table.
    """

    intervention: str
    run: str
    coordinates: Mapping[str, Any]
    edit: Edit
    selects: Callable[[Part], bool] = lambda part: True
    snapshot: int = -1
    model: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`intervention/run/coordinate=value,…`; a valid relative path on every file system."""
        values = [f"{k}={v:.12g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.coordinates.items()]
        return "/".join(filter(None, [self.intervention, self.run, ",".join(values)]))

    @property
    def same_model(self) -> str:
        """Name shared by points that are the same model."""
        return self.model or self.id


#: `Point.model` of the untouched base.
BASE = "base"


def trained_name(run: str, inputs: PointInputs, snapshot: int = -1) -> str:
    """`Point.model` of an unmodified checkpoint of a run."""
    return f"trained/{run}/{snapshot % len(inputs.steps[run])}"


def take_trained(update: Update) -> Tensor | None:
    """The `Edit` that takes the trained tensor."""
    return update.trained


def require_trajectories(inputs: PointInputs, intervention: str) -> None:
    """Check that every run has several steps.

    Raises:
        ConfigError: a run is a single checkpoint.
    """
    single = [run for run, steps in inputs.steps.items() if len(steps) < 2]
    if single:
        raise ConfigError(
            f"{intervention} needs a trajectory, but --trained '{single[0]}' is a single checkpoint. Pass a run "
            "directory with weights of several steps in trajectory/ or checkpoints/ (train with --trajectory "
            "powers_of_two)."
        )
