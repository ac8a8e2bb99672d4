"""`analyze`: measure how training changed the weights of a base checkpoint; write tables to disk.

    prepare (plan.py)      check every name, shape, step and setting; read no tensor, write nothing
    measure (measure.py)   one matrix at a time: all snapshots of all runs against the base
    tables (tables.py)     written from the finished parts
    summary (summary.py)   means with intervals, from the tables

Figures are drawn from the tables alone (`effopd.report`).

Peak memory is a few times the largest stored tensor. Only the K leading directions of a snapshot
stay in memory, and only until its matrix is done. A killed analysis resumes where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopd.analysis.measure import (
    GROUPS,
    BaseOfPart,
    Directions,
    Options,
    compare,
    embedding_picture,
    measure_base,
    measure_update,
    path_of_u1,
)
from effopd.analysis.plan import AnalysisPlan, AnalysisRun, PathLike, prepare
from effopd.analysis.summary import summarize
from effopd.analysis.tables import TABLES, TableWriter
from effopd.common.files import write_atomically
from effopd.weights import Difference, Part, Update

SUMMARY = "summary.json"
#: Bytes of leading directions per batch; larger stacked tensors (experts) are split into batches.
_KEPT = 2**30


@dataclass(frozen=True)
class Analysis:
    """A finished analysis.

    Attributes:
        out: its folder.
        tables: table name → Parquet file; a CSV file of the same stem lies beside it.
        summary: the content of summary.json.
    """

    out: Path
    tables: dict[str, Path]
    summary: dict[str, Any]


def analyze(
    base: PathLike,
    trained: dict[str, PathLike | Sequence[PathLike]],
    out: PathLike,
    *,
    k: int = 20,
    steps: Sequence[int] | None = None,
    device: str | None = None,
    metrics: Sequence[str] = GROUPS,
    base_spectrum: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, float], object] | None = None,
) -> Analysis:
    """Measure what training did to the weights of `base`; write tables and summary.json to `out`.

    The tables cover every matrix and vector. The means in the summary are over attention and MLP
    matrices, unweighted by size. Fused matrices (qkv, gate_up, stacked experts) are split first, so
    q, k and v count once each.

    Args:
        base: checkpoint folder (safetensors).
        trained: label → checkpoint, adapter, or run directory with a trajectory. Several paths of
            one label are seeds.
        out: new or empty folder, or the folder of an interrupted analysis with the same settings,
            which is resumed.
        k: leading directions of each update.
        steps: snapshots of a trajectory to measure. `None`: all.
        device: `None`: the accelerator if there is one that supports float64, otherwise the CPU.
        metrics: names from `GROUPS`; update norms are always measured.
        base_spectrum: also compare all singular values of W0 and W_T (about twice the work at the
            final snapshot).
        seed: of nulls, pictures, bootstrap, and the random start of the directions.
        progress: called as progress(done, total, share). One unit is one matrix of one snapshot;
            `share` is the finished share of the work in 0–1, which grows with the matrices' size.

    Raises:
        ConfigError: a setting is out of range, a path is given twice, or `out` holds other files.
        CheckpointError, WeightsError: a checkpoint is missing, damaged, or does not fit the base.

    Example:
        >>> import tempfile
        >>> from effopd.tasks.builtin_models import student_path, teacher_path
        >>> runs = {"rl": teacher_path()}
        >>> done = analyze(student_path(), runs, tempfile.mkdtemp(), k=2, metrics=["norms"])
        >>> sorted(done.tables)
        ['directions', 'embeddings', 'matrices', 'subspaces']
    """
    plan = prepare(
        base, trained, out, k=k, steps=steps, device=device, metrics=metrics, base_spectrum=base_spectrum, seed=seed
    )
    return execute(plan, progress)


def execute(plan: AnalysisPlan, progress: Callable[[int, int, float], object] | None = None) -> Analysis:
    """Measure the unfinished parts of a plan, then write tables and summary."""
    done = plan.progress.start()
    total = len(plan.parts) * plan.snapshots
    all_work = sum(map(_work, plan.parts)) * plan.snapshots
    earlier = [part for part in plan.parts if str(part.place) in done]
    finished, work = len(earlier) * plan.snapshots, sum(map(_work, earlier)) * plan.snapshots
    report = progress or (lambda done, total, share: None)
    report(finished, total, work / all_work)

    def advance(part: Part) -> None:
        nonlocal finished, work
        finished, work = finished + 1, work + _work(part)
        report(finished, total, work / all_work)

    pictured = pictured_parts(plan.parts)
    for batch in batches([part for part in plan.parts if str(part.place) not in done], plan):
        for record in measure_batch(plan, batch, pictured, advance):
            plan.progress.add(record)
    tables = write_tables(plan)
    summary = summarize(plan.out, _about(plan))
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(plan.out / SUMMARY, lambda path: path.write_text(text, encoding="utf-8"))
    return Analysis(plan.out, tables, summary)


def _work(part: Part) -> float:
    """Estimated work of one part, in units of floating-point operations: M·N·min(M, N)."""
    return float(math.prod(part.shape) * min(part.shape)) + 1.0 if part.shape else 1.0


def batches(parts: Sequence[Part], plan: AnalysisPlan) -> Iterator[list[Part]]:
    """Batches of parts of one stored tensor, which is read once; about `_KEPT` bytes each."""
    batch: list[Part] = []
    stored = 0
    for part in parts:
        size = 4 * plan.options.k * sum(part.shape) * plan.snapshots if part.is_matrix else 0
        if batch and (part.tensor != batch[0].tensor or stored + size > _KEPT):
            yield batch
            batch, stored = [], 0
        batch.append(part)
        stored += size
    if batch:
        yield batch


def pictured_parts(parts: Sequence[Part]) -> set[str]:
    """Places that get a t-SNE picture, in the first, middle and last layer.

    One attention and one MLP matrix per layer: o and down, or the first one.
    """
    chosen: set[str] = set()
    layers = sorted({part.place.layer for part in parts if part.place.layer is not None})
    for layer in {layers[0], layers[len(layers) // 2], layers[-1]} if layers else ():
        for module, preferred in (("attention", "o"), ("mlp", "down")):
            names = [p.place for p in parts if p.is_matrix and (p.place.layer, p.place.module) == (layer, module)]
            names.sort(key=lambda place: place.matrix.rpartition(".")[2] != preferred)
            chosen |= {str(place) for place in names[:1]}
    return chosen


# -- measuring -------------------------------------------------------------------------------------


class _PartRecord:
    """Measurements of one part, collected over all snapshots of all runs."""

    def __init__(self, part: Part, options: Options):
        self.part, self.options = part, options
        self.base: BaseOfPart | None = None
        self.matrices: list[list[Any]] = []
        self.embeddings: list[list[Any]] = []
        self.directions: dict[str, list[tuple[int | None, Directions | None]]] = {}

    def take(self, run: AnalysisRun, index: int, update: Update) -> None:
        """Measure snapshot `index` of `run`."""
        step, final = run.snapshots[index].step, index == len(run.snapshots) - 1
        metrics, leading = measure_update(update, self.options)
        if self.part.is_matrix:
            self.directions.setdefault(run.name, []).append((step, leading))
            if final and ("rotation" in self.options.metrics or self.options.base_spectrum):
                self.base = self.base or BaseOfPart(update.base, self.options)
                metrics |= measure_base(update, self.base, self.options)
            if final and "embeddings" in self.options.metrics and self.part.place.module == "embedding":
                picture = embedding_picture(update, self.options.seed)
                self.embeddings += [[run.name, step, name, values] for name, values in picture.items()]
        self.matrices.append([run.name, step, metrics])

    def finish(self, runs: Sequence[AnalysisRun], picture: bool) -> dict[str, Any]:
        """Compare the snapshots with each other; return the record for progress.jsonl."""
        record: dict[str, Any] = {"part": str(self.part.place), "matrices": self.matrices}
        record["subspaces"] = (
            subspace_rows(self.directions, self.part, self.options)
            if self.part.is_matrix and "subspaces" in self.options.metrics
            else []
        )
        record["directions"] = []
        if self.part.is_matrix and "directions" in self.options.metrics:
            for run in runs:
                metrics, points = self._path(run, picture)
                next(row for row in reversed(self.matrices) if row[0] == run.name)[2].update(metrics)
                record["directions"] += [[run.name, step, values] for step, values in points]
        record["embeddings"] = self.embeddings
        return record

    def _path(self, run: AnalysisRun, picture: bool):
        u1 = {
            step: leading.u_MK[:, 0]
            for step, leading in self.directions[run.name]
            if step is not None and leading is not None and leading.has_first
        }
        return path_of_u1(list(u1), u1, self.options, picture)


def measure_batch(
    plan: AnalysisPlan, batch: Sequence[Part], pictured: set[str], advance: Callable[[Part], object]
) -> Iterator[dict[str, Any]]:
    """Records of the parts of one stored tensor: all snapshots of all runs."""
    records = [_PartRecord(part, plan.options) for part in batch]
    held = plan.base.load(batch[0].tensor, plan.options.device)  # this reference keeps the tensor cached
    for run in plan.runs:
        for index, difference in enumerate(run.differences):
            _take_snapshot(records, run, index, difference, advance)
    del held
    for record in records:
        yield record.finish(plan.runs, str(record.part.place) in pictured)


def _take_snapshot(
    records: Sequence[_PartRecord],
    run: AnalysisRun,
    index: int,
    difference: Difference,
    advance: Callable[[Part], object],
) -> None:
    """Measure one snapshot of every part.

    The previous part's update stays alive while the next is made, so a shared tensor is read once.
    It is freed on return, before the next snapshot is read.
    """
    update = None
    for record in records:
        update = difference.update(record.part, record.options.device)
        record.take(run, index, update)
        advance(record.part)
    del update


def subspace_rows(
    directions: dict[str, list[tuple[int | None, Directions | None]]], part: Part, options: Options
) -> list[list[Any]]:
    """[run, step, reference, metric, values for k = 1, 2, …] of one matrix (`measure.compare`)."""
    size = min(options.k, *part.shape)
    rows: list[list[Any]] = []
    for run, path in directions.items():
        final_step, final = path[-1]
        for step, leading in path:
            values = compare(leading, final, size) | {"singular_value": _padded(leading, size)}
            rows += [[run, step, "final", name, numbers] for name, numbers in values.items()]
        first = next((leading for _, leading in path if leading is not None and leading.has_first), None)
        if first is not None and first is not final:
            values = compare(first, final, 1)
            rows += [
                [run, final_step, "first", f"{side}_cosine", values[f"{side}_cosine"]] for side in ("left", "right")
            ]
    names = list(directions)
    for i, run in enumerate(names):
        for other in names[i + 1 :]:
            values = compare(directions[run][-1][1], directions[other][-1][1], size)
            rows += [[run, directions[run][-1][0], other, name, numbers] for name, numbers in values.items()]
    return rows


def _padded(leading: Directions | None, size: int) -> list[float]:
    values = [] if leading is None else leading.s_K[:size].tolist()
    return values + [0.0] * (size - len(values))


# -- tables ----------------------------------------------------------------------------------------


def write_tables(plan: AnalysisPlan) -> dict[str, Path]:
    """Write all tables from the finished parts; return table name → Parquet file."""
    squares: dict[tuple[str, int | None], float] = {}
    for record in plan.progress.records():
        for run, step, metrics in record["matrices"]:
            squares[run, step] = squares.get((run, step), 0.0) + metrics["frobenius_norm"] ** 2
    places = {str(part.place): part.place for part in plan.parts}
    for name, columns in TABLES.items():
        with TableWriter(plan.out / name, columns) as table:
            for record in plan.progress.records():
                place = places[record["part"]]
                where = (place.layer, place.module, place.matrix)
                table.add(_ROWS[name](record, where, squares))
    return {name: plan.out / f"{name}.parquet" for name in TABLES}


def _matrix_rows(record, where, squares) -> Iterator[tuple[Any, ...]]:
    for run, step, metrics in record["matrices"]:
        for metric, value in metrics.items():
            yield (run, step, *where, metric, value)
        total = squares[run, step]
        share = metrics["frobenius_norm"] ** 2 / total if total > 0 else math.nan
        yield (run, step, *where, "share_of_total", share)


def _subspace_rows(record, where, squares) -> Iterator[tuple[Any, ...]]:
    for run, step, reference, metric, values in record["subspaces"]:
        for k, value in enumerate(values, start=1):
            yield (run, step, *where, reference, metric, k, value)


def _direction_rows(record, where, squares) -> Iterator[tuple[Any, ...]]:
    for run, step, values in record["directions"]:
        for metric, value in values.items():
            yield (run, step, *where, metric, value)


def _embedding_rows(record, where, squares) -> Iterator[tuple[Any, ...]]:
    for run, step, metric, values in record["embeddings"]:
        for point, value in enumerate(values):
            yield (run, step, *where, metric, point, value)


_ROWS: dict[str, Callable[..., Iterator[tuple[Any, ...]]]] = {
    "matrices": _matrix_rows,
    "subspaces": _subspace_rows,
    "directions": _direction_rows,
    "embeddings": _embedding_rows,
}


def _about(plan: AnalysisPlan) -> dict[str, Any]:
    """Settings and runs, which the tables do not contain."""
    return {
        "base": str(plan.base.path),
        "device": plan.options.device,
        "k": plan.options.k,
        "metrics": list(plan.options.metrics),
        "base_spectrum": plan.options.base_spectrum,
        "seed": plan.options.seed,
        "head_apart": plan.base.is_untied,
        "runs": {
            run.name: {
                "group": run.group,
                "path": str(run.path),
                "steps": [s.step for s in run.snapshots],
                "ending": None if run.ending is None else vars(run.ending),
            }
            for run in plan.runs
        },
    }
