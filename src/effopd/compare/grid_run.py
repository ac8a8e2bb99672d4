"""A finished run of a grid, read from its folder or from results.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effopd.compare.search_tokens import with_search_teacher
from effopd.compare.time_to_target import WINDOW, Cost, first_reach
from effopd.errors import CheckpointError
from effopd.runs.records import EVALS, Costs, EvaluationRecord, SearchRecord, read_evaluations, read_searches

Arm = tuple[str, float]
Place = tuple[str, int]
#: Columns of a run's curve in results.json.
CURVE_COLUMNS = ("step", "kl", "kl_se", "accuracy", "seconds", "generated_tokens", "forward_tokens", "search_seconds")
#: Further columns, missing in files of runs that did not record them.
KINDS_COLUMNS = ("backward_tokens", "teacher_tokens")
#: Cost axes on which runs are compared.
AXES = ("steps", "seconds", "generated_tokens", "forward_tokens")


@dataclass(frozen=True)
class SearchSummary:
    """Summary of a run's searches, as stored in results.json.

    Attributes:
        accepted: (step, scale) of every jump, backward jumps included.
        count: searches that tried a candidate.
        memory_bytes: largest amount of memory held beside the model.
        fit: fit of the last prediction, for strategies that predict.
    """

    accepted: tuple[tuple[int, float], ...] = ()
    count: int = 0
    memory_bytes: int | None = None
    fit: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, searches: Iterable[SearchRecord]) -> SearchSummary:
        """Summary of a run's searches."""
        searches = list(searches)
        return cls(
            accepted=tuple((search.step, search.accepted_scale) for search in searches if search.accepted_scale),
            count=sum(search.searched for search in searches),
            memory_bytes=max((search.memory_bytes for search in searches if search.memory_bytes), default=None),
            fit=next((search.fit for search in reversed(searches) if search.fit is not None), None),
        )


@dataclass(frozen=True)
class GridRun:
    """A finished run: its place in the grid, its evaluations (step 0 first) and its searches.

    Attributes:
        code: version of the package's code that made the run (`versions.code`).
        merges: merges that rescaled its seconds to this machine, oldest first, as indices into
            `settings.merges`.
    """

    task: str
    strategy: str
    learning_rate: float
    seed: int
    evaluations: tuple[EvaluationRecord, ...]
    searches: SearchSummary = field(default_factory=SearchSummary)
    code: str | None = None
    merges: tuple[int, ...] = ()

    @property
    def arm(self) -> Arm:
        """(strategy, learning rate)."""
        return self.strategy, self.learning_rate

    @property
    def place(self) -> Place:
        """(task, seed): runs at the same place are paired."""
        return self.task, self.seed

    def diverged(self) -> GridRun:
        """Copy with infinitely bad evaluations appended, for a run ended by a non-finite loss."""
        end = dataclasses.replace(self.evaluations[-1], kl=math.inf, accuracy=-math.inf)
        return dataclasses.replace(self, evaluations=(*self.evaluations, *[end] * WINDOW))

    def cost(self, target: float, metric: str, higher_is_better: bool) -> Cost | None:
        """Cost at the first evaluation at the target."""
        return first_reach(self.evaluations, target, metric, higher_is_better=higher_is_better)

    def search_share(self, until: Cost | None = None) -> float:
        """Share of net seconds spent on search (0–1), over the whole run or up to a cost."""
        at_cost = (e for e in self.evaluations if until is not None and e.step == until.steps)
        costs = next(at_cost, self.evaluations[-1]).costs
        return (costs.search_seconds or 0.0) / costs.net_seconds if costs.net_seconds else 0.0


def read_run(
    path: Path, *, task: str, strategy: str, learning_rate: float, seed: int, code: str | None = None
) -> GridRun:
    """Read a run from its folder.

    Raises:
        CheckpointError: there are no evaluations, or they lack KL, accuracy or a net cost.
    """
    searches = read_searches(path)
    evaluations = tuple(with_search_teacher(read_evaluations(path), searches))
    missing = {key for evaluation in evaluations for key, value in _required(evaluation).items() if value is None}
    if not evaluations or missing:
        raise CheckpointError(
            f"{path / EVALS}: expected evaluations with KL, accuracy and costs, but the file "
            + (f"lacks {', '.join(sorted(missing))}" if evaluations else "has no row")
            + ". Train with eval_strategy: steps on a task of this package, or leave the run out."
        )
    return GridRun(
        task, strategy, learning_rate, seed, evaluations, SearchSummary.of(searches), code
    )  # fmt: skip


def _required(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Values that a comparison needs, by their key in evals.jsonl."""
    costs = evaluation.costs
    return {
        "eval_kl": evaluation.kl,
        "eval_accuracy": evaluation.accuracy,
        "cost/net_seconds": costs.net_seconds,
        "cost/net_generated_tokens": costs.net_generated_tokens,
        "cost/net_forward_tokens": costs.net_forward_tokens,
    }


def to_row(run: GridRun) -> dict[str, Any]:
    """JSON-ready run, with curves in 5 significant digits; NaN and ∞ become `None`."""
    points = [_curve_point(evaluation) for evaluation in run.evaluations]
    return {
        "task": run.task,
        "strategy": run.strategy,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "code": run.code,
        "merges": list(run.merges),
        "curve": {
            name: [_short(value) for value in values]
            for name, values in zip(CURVE_COLUMNS, zip(*points, strict=True), strict=True)
        }
        | _kinds_columns(run.evaluations),
        "accepted": [list(jump) for jump in run.searches.accepted],
        "searches": run.searches.count,
        "memory_bytes": run.searches.memory_bytes,
        "fit": run.searches.fit,
    }


def from_row(row: Mapping[str, Any]) -> GridRun:
    """Inverse of `to_row`, up to rounding; `None` becomes the infinitely bad value."""
    columns = [
        [(-math.inf if name == "accuracy" else math.inf) if value is None else value for value in row["curve"][name]]
        for name in CURVE_COLUMNS
    ]
    searches = SearchSummary(
        tuple((step, scale) for step, scale in row["accepted"]), row["searches"], row["memory_bytes"], row.get("fit")
    )
    unknown = [None] * len(columns[0])
    kinds = zip(*(row["curve"].get(name, unknown) for name in KINDS_COLUMNS), strict=True)
    evaluations = tuple(
        dataclasses.replace(evaluation, costs=with_kinds(evaluation.costs, *counts))
        for evaluation, counts in zip(
            (_evaluation(*values) for values in zip(*columns, strict=True)), kinds, strict=True
        )
    )
    return GridRun(
        row["task"], row["strategy"], row["learning_rate"], row["seed"], evaluations, searches, row.get("code"),
        tuple(row.get("merges", ())),
    )  # fmt: skip


def with_kinds(costs: Costs, backward: int | None, teacher: int | None) -> Costs:
    """Costs with net backward and net teacher tokens; the latter include those of searches."""
    return dataclasses.replace(
        costs,
        update_forward_tokens=backward,
        teacher_forward_tokens=teacher,
        search_teacher_tokens=None if teacher is None else 0,
    )


def _kinds_columns(evaluations: Iterable[EvaluationRecord]) -> dict[str, list[int | None]]:
    """Values of `KINDS_COLUMNS`; columns without any value are left out."""
    points = [(e.costs.student_backward_tokens, e.costs.teacher_tokens) for e in evaluations]
    columns = dict(zip(KINDS_COLUMNS, map(list, zip(*points, strict=True)), strict=True))
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _curve_point(evaluation: EvaluationRecord) -> tuple[Any, ...]:
    """Values of `CURVE_COLUMNS`; a missing standard error or search time is 0."""
    costs = evaluation.costs
    return (
        evaluation.step, evaluation.kl, evaluation.kl_se or 0.0, evaluation.accuracy, costs.net_seconds,
        costs.net_generated_tokens, costs.net_forward_tokens, costs.search_seconds or 0.0,
    )  # fmt: skip


def _evaluation(
    step: int, kl: float, kl_se: float, accuracy: float,
    seconds: float, generated_tokens: int, forward_tokens: int, search_seconds: float,
) -> EvaluationRecord:  # fmt: skip
    """The inverse of `_curve_point`."""
    costs = Costs(
        net_seconds=seconds, net_generated_tokens=generated_tokens, net_forward_tokens=forward_tokens,
        search_seconds=search_seconds,
    )  # fmt: skip
    return EvaluationRecord(step, kl=kl, kl_se=kl_se, accuracy=accuracy, costs=costs)


def _short(value: float) -> float | int | None:
    return value if isinstance(value, int) else finite(float(f"{value:.5g}"))


def finite(value: float) -> float | None:
    """The value, or `None` if it is NaN or infinite, which strict JSON cannot hold."""
    return value if math.isfinite(value) else None
