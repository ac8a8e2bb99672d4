"""`Sources`: the base and trained checkpoints of an intervention, checked on opening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from effopd.analysis.plan import seed_names
from effopd.common.progress import Counted
from effopd.interventions.options import InterventionOptions
from effopd.interventions.points import Point, PointInputs
from effopd.weights.difference import Difference, open_differences
from effopd.weights.parts import Part
from effopd.weights.reader import Checkpoint
from effopd.weights.trajectory import Snapshot, find_snapshots


class Sources:
    """The base and the saved checkpoints of every run.

    Names, shapes and architectures are checked before any tensor is read.

    Args:
        base: checkpoint folder.
        trained: label → folders; several folders are seeds and become the runs `label#0`,
            `label#1`, ….
        steps: steps of a trajectory to use; the last one is the trained model. `None`: all.

    Raises:
        EffOPDError: a folder cannot be used or does not fit the base; the message names it.
    """

    def __init__(
        self, base: str | Path, trained: Mapping[str, Sequence[str | Path]], steps: Sequence[int] | None = None
    ):
        self.base = Checkpoint(base)
        self.snapshots: dict[str, list[Snapshot]] = {
            name: find_snapshots(Path(path), steps)
            for label, paths in trained.items()
            for name, path in zip(seed_names(label, len(paths)), paths, strict=True)
        }
        paths = [[snapshot.path for snapshot in snapshots] for snapshots in self.snapshots.values()]
        self._differences = dict(zip(self.snapshots, open_differences(self.base, paths), strict=True))
        self.parts_of: dict[str, list[Part]] = {}
        for part in self.base.parts():
            self.parts_of.setdefault(part.tensor, []).append(part)
        self._norms: dict[str, dict[Part, float]] = {}

    def difference(self, point: Point) -> Difference | None:
        """The update from which `point` is made; `None` for the base."""
        return self._differences[point.run][point.snapshot] if point.run in self._differences else None

    def step(self, point: Point) -> int | None:
        """Training step of the point's update, if known."""
        return self.snapshots[point.run][point.snapshot].step if point.run in self.snapshots else None

    def norms(self, run: str) -> dict[Part, float]:
        """‖ΔW_T‖ of every part at the end of `run`; one pass over the files, cached."""
        if run not in self._norms:
            final = self._differences[run][-1]
            self._norms[run] = {}
            with Counted(len(final.parts), f"norms of {run}", "matrix", leave=False) as bar:
                for update in final.updates():
                    self._norms[run][update.part] = update.norm()
                    bar.update()
        return self._norms[run]

    def point_inputs(self, options: InterventionOptions) -> PointInputs:
        """Inputs for building the points of an intervention."""
        steps = {run: [snapshot.step for snapshot in snapshots] for run, snapshots in self.snapshots.items()}
        return PointInputs(self.base.parts(), steps, self.norms, options)
