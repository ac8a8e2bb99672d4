"""`Point`: one model that an intervention visits, as a rule for each matrix or vector.

Only rules here: no weights are read, nothing is generated.
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

#: A rule for one part: the new tensor (any floating dtype, the part's shape), or `None` where the
#: base stays.
Edit = Callable[[Update], Tensor | None]


@dataclass(frozen=True)
class PointInputs:
    """What the points of an intervention are built from.

    Attributes:
        parts: every matrix and vector of the base.
        steps: the kept steps of each run, ascending; the last is the trained model. A single
            checkpoint has one.
        norms: ‖ΔW_T‖ of every part at the end of a run.
    """

    parts: Sequence[Part]
    steps: Mapping[str, Sequence[int | None]]
    norms: Callable[[str], Mapping[Part, float]]
    options: InterventionOptions


@dataclass(frozen=True)
class Point:
    """One model of an intervention.

    Attributes:
        intervention, run: where it belongs.
        coordinates: what identifies it within intervention and run.
        edit: the rule for a part that `selects` picks; all others stay the base's.
        selects: whether a part can change at all; decided without reading a tensor.
        snapshot: position in the run's `PointInputs.steps` of the update that `edit` is given; −1
            is the last.
        model: names the model; points of equal `model` are the same model, whatever the
            intervention. Empty: no other point's.
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
        """`intervention/run/coordinate=value,…`; also a relative path that every file system
        takes.
        """
        values = [f"{k}={v:.12g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.coordinates.items()]
        return "/".join(filter(None, [self.intervention, self.run, ",".join(values)]))

    @property
    def same_model(self) -> str:
        """The name under which an equal model is recognised."""
        return self.model or self.id


#: `Point.model` of the untouched base.
BASE = "base"


def trained_name(run: str, inputs: PointInputs, snapshot: int = -1) -> str:
    """`Point.model` of an unmodified checkpoint of a run."""
    return f"trained/{run}/{snapshot % len(inputs.steps[run])}"


def take_trained(update: Update) -> Tensor | None:
    """The `Edit` of a part that is the trained one."""
    return update.trained


def require_trajectories(inputs: PointInputs, intervention: str) -> None:
    """Every run has several steps.

    Raises:
        ConfigError: a run is a single checkpoint.
    """
    single = [run for run, steps in inputs.steps.items() if len(steps) < 2]
    if single:
        raise ConfigError(
            f"{intervention} needs a trajectory, but --trained '{single[0]}' is a single "
            "checkpoint. Give the run directory, "
            "with weights of several steps in trajectory/ or checkpoints/ (train with --trajectory powers_of_two)."
        )
