"""A finished run of a grid: its place, its evaluations, what its searches came to; from its folder
and from results.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effopd.compare.time_to_target import WINDOW, Cost, first_reach
from effopd.errors import CheckpointError
from effopd.runs.records import EVALS, Costs, EvaluationRecord, SearchRecord, read_evaluations, read_searches

Arm = tuple[str, float]
Place = tuple[str, int]
#: Columns of a run's curve in results.json.
CURVE_COLUMNS = ("step", "kl", "kl_se", "accuracy", "seconds", "generated_tokens", "forward_tokens", "search_seconds")
#: Cost axes on which runs are compared.
AXES = ("steps", "seconds", "generated_tokens", "forward_tokens")


@dataclass(frozen=True)
class SearchSummary:
    """What results.json keeps of a run's searches.

    Attributes:
        accepted: (step, scale) of every jump, also backwards.
        count: searches that tried a candidate.
        memory_bytes: the most that was held beside the model.
        fit: how well the last prediction fitted, for strategies that predict.
    """

    accepted: tuple[tuple[int, float], ...] = ()
    count: int = 0
    memory_bytes: int | None = None
    fit: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, searches: Iterable[SearchRecord]) -> SearchSummary:
        """The summary of a run's searches, in their order."""
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
        code: which state of the package made it (`versions.code`).
        merges: the merges that brought its seconds to this machine's, oldest first: indices into
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
        """(task, seed): what is paired."""
        return self.task, self.seed

    def diverged(self) -> GridRun:
        """The same run, ended by a loss that was not finite: worse than any number from its last
        evaluation on.
        """
        end = dataclasses.replace(self.evaluations[-1], kl=math.inf, accuracy=-math.inf)
        return dataclasses.replace(self, evaluations=(*self.evaluations, *[end] * WINDOW))

    def cost(self, target: float, metric: str, higher_is_better: bool) -> Cost | None:
        """Cost at the first evaluation at the target."""
        return first_reach(self.evaluations, target, metric, higher_is_better=higher_is_better)

    def search_share(self, until: Cost | None = None) -> float:
        """Share of search in net seconds, of the whole run or until a cost was reached."""
        at_cost = (e for e in self.evaluations if until is not None and e.step == until.steps)
        costs = next(at_cost, self.evaluations[-1]).costs
        return (costs.search_seconds or 0.0) / costs.net_seconds if costs.net_seconds else 0.0


def read_run(
    path: Path, *, task: str, strategy: str, learning_rate: float, seed: int, code: str | None = None
) -> GridRun:
    """A run from its folder.

    Raises:
        CheckpointError: it holds no evaluations, or they lack what the comparison divides.
    """
    evaluations = tuple(read_evaluations(path))
    missing = {key for evaluation in evaluations for key, value in _required(evaluation).items() if value is None}
    if not evaluations or missing:
        raise CheckpointError(
            f"{path / EVALS} should hold evaluations with KL, accuracy and costs, but "
            + (f"lacks {', '.join(sorted(missing))}" if evaluations else "has no row")
            + ". Train with eval_strategy: steps on a task of this package, or leave the run out."
        )
    return GridRun(
        task, strategy, learning_rate, seed, evaluations, SearchSummary.of(read_searches(path)), code
    )  # fmt: skip


def _required(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Key in evals.jsonl → value, of what a comparison cannot do without."""
    costs = evaluation.costs
    return {
        "eval_kl": evaluation.kl,
        "eval_accuracy": evaluation.accuracy,
        "cost/net_seconds": costs.net_seconds,
        "cost/net_generated_tokens": costs.net_generated_tokens,
        "cost/net_forward_tokens": costs.net_forward_tokens,
    }


def to_row(run: GridRun) -> dict[str, Any]:
    """A run as JSON, its curves in 5 significant digits; NaN and ∞ (a run that diverged) become
    `None`.
    """
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
        },
        "accepted": [list(jump) for jump in run.searches.accepted],
        "searches": run.searches.count,
        "memory_bytes": run.searches.memory_bytes,
        "fit": run.searches.fit,
    }


def from_row(row: Mapping[str, Any]) -> GridRun:
    """The inverse of `to_row`, up to rounding; what was not finite comes back as worse than any
    number.
    """
    columns = [
        [(-math.inf if name == "accuracy" else math.inf) if value is None else value for value in row["curve"][name]]
        for name in CURVE_COLUMNS
    ]
    searches = SearchSummary(
        tuple((step, scale) for step, scale in row["accepted"]), row["searches"], row["memory_bytes"], row.get("fit")
    )
    evaluations = tuple(_evaluation(*values) for values in zip(*columns, strict=True))
    return GridRun(
        row["task"], row["strategy"], row["learning_rate"], row["seed"], evaluations, searches, row.get("code"),
        tuple(row.get("merges", ())),
    )  # fmt: skip


def _curve_point(evaluation: EvaluationRecord) -> tuple[Any, ...]:
    """The values of `CURVE_COLUMNS`; a standard error or a search that was not recorded is 0."""
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
    """The value, or `None` for what strict JSON cannot hold."""
    return value if math.isfinite(value) else None
