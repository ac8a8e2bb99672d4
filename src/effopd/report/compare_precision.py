"""Table of a comparison page on the precision of the held-out KL at the targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from effopd.compare.time_to_target import smooth
from effopd.report.compare_envelope import TABLE_SHARES
from effopd.report.compare_lookup import Lookup, Row, Table


def precision_table(lookup: Lookup) -> Table | None:
    """Relative standard error of the held-out KL where runs reach a target: `12 % (34)`.

    Median over all runs of the task that reach it, with their number. `None`: no run has standard
    errors.
    """
    rows = []
    for task in lookup.tasks:
        errors = [errors_at(run["curve"], TABLE_SHARES) for run in lookup.results["runs"] if run["task"] == task]
        found = [[value for value in column if value is not None] for column in zip(*errors, strict=True)]
        rows.append([task, *(f"{statistics.median(each):.0%} ({len(each)})" if each else "–" for each in found)])
    heads = [f"{100 * share:.3g} %" for share in TABLE_SHARES]
    return Table(["task", *heads], rows) if any(set(row[1:]) != {"–"} for row in rows) else None


def errors_at(curve: Row, shares: Sequence[float]) -> list[float | None]:
    """Standard error / KL at the first evaluation at each share of the starting KL.

    `None`: the run does not reach it, or the evaluation has no standard error.

    Example:
        >>> errors_at({"kl": [1.0, 0.6, 0.4, 0.2], "kl_se": [0.1, 0.1, 0.1, 0.1]}, [0.5, 0.01])
        [0.5, None]
    """
    return [next(_errors(curve, share), None) for share in shares]


def _errors(curve: Row, share: float) -> Iterator[float | None]:
    kls = [math.inf if kl is None else kl for kl in curve["kl"]]  # None: diverged
    errors = curve.get("kl_se") or [None] * len(kls)
    for value, kl, error in list(zip(smooth(kls), kls, errors, strict=True))[1:]:
        if value <= share * kls[0] and math.isfinite(kl):
            yield error / kl if error and kl else None  # 0: not recorded
