"""Tables of docs/rivals.md, from docs/rivals/results.json.

    pip install 'effopd[optimizers]'
    effopd compare recipes/compare-rivals.yaml          # --only spreads it over days
    effopd compare --report runs/rivals --out docs/rivals \\
        --prices recipes/prices/1.7b-8b-1xh100.yaml --prices recipes/prices/4b-32b-8xh100.yaml
    python benchmarks/readme_results.py --figure

`readme_results.py` rewrites the blocks between the markers (`pages.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from effopd.compare.axes import axis_name
from effopd.report.compare_envelope import TABLE_SHARES, curves
from effopd.report.compare_lookup import Lookup, factor, one, table

#: Targets of the README's table.
FEW_SHARES = (0.25, 0.1, 0.05, 0.025)


def heads(shares: Sequence[float]) -> list[str]:
    """Column titles of targets."""
    return [f"{100 * share:.3g} %" for share in shares]


def speeds(part: Mapping[str, Any], task: str, axis: str, strategy: str, shares: Sequence[float]) -> list[str]:
    """Cells `1.10–1.40×`: range over a strategy's learning rates of the median over seeds."""
    cells = []
    for share in shares:
        index = part["shares"].index(share)
        rows = [row for _, row in curves(part, task, axis, strategy) if row["n"][index]]
        medians = sorted(math.inf if row["median"][index] is None else row["median"][index] for row in rows)
        ends = [one(None if math.isinf(value) else value, "") for value in (medians[:1] + medians[-1:])]
        cells.append("–".join(dict.fromkeys(ends)) + "×" if ends else "–")
    return [cell.replace("any×", "any") for cell in cells]


def envelope_table(results: Mapping[str, Any]) -> str:
    """Speed-up over the best-tuned run, per cost, task and strategy."""
    part, look = results["envelope"], Lookup(results)
    rows = [
        [
            axis_name(axis),
            f"`{task.split(':')[1]}`",
            f"`{strategy}`",
            *speeds(part, task, axis, strategy, TABLE_SHARES),
        ]
        for axis in part["axes"]
        for task in look.tasks
        for strategy in opening(results)
    ]
    return table(["cost", "task", "strategy", *heads(TABLE_SHARES)], rows)


def opening(results: Mapping[str, Any]) -> list[str]:
    """The look-aheads with a row in the envelope, in the plan's order."""
    known = {row["strategy"] for row in results["envelope"]["speedups"]}
    return [name for name in Lookup(results).roles.opening(sorted(known)) if name in known]


def steps_table(results: Mapping[str, Any]) -> str:
    """Steps of every arm to every target: median over seeds, with the number of seeds."""
    look = Lookup(results)
    rows = []
    for task in look.tasks:
        for strategy, rate in look.arms:
            runs = look.runs(task, (strategy, rate))
            if runs:
                cells = [_median([_steps(run, share) for run in runs]) for share in TABLE_SHARES]
                rows.append(
                    [f"`{task.split(':')[1]}`", f"`{strategy}`", factor(rate, look.reference), str(len(runs)), *cells]
                )
    return table(["task", "arm", "rate", "seeds", *heads(TABLE_SHARES)], rows)


def _steps(run: Mapping[str, Any], share: float) -> float:
    curve = run["curve"]
    return next(
        (
            step
            for step, kl in zip(curve["step"], curve["kl"], strict=True)
            if step > 0 and kl <= share * curve["kl"][0]
        ),
        math.inf,
    )


def _median(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return "–" if math.isinf(middle) else f"{middle:g}"


def coverage(results: Mapping[str, Any]) -> str:
    """Number of runs, seeds and arms behind the tables."""
    runs, baselines = results["runs"], set(results["settings"]["baselines"])
    rivals = {(run["strategy"], run["learning_rate"]) for run in runs if run["strategy"] in baselines}
    several = {arm for arm in rivals if _seeds(runs, arm) > 1}
    return (
        f"{len(runs)} of {results['settings']['planned_runs']} planned runs exist: {len(rivals)} arms without a "
        f"look-ahead, {len(several)} of them with several seeds. The others ran on one seed, for a first look."
    )


def _seeds(runs: Sequence[Mapping[str, Any]], arm: tuple[str, float]) -> int:
    return len({run["seed"] for run in runs if (run["strategy"], run["learning_rate"]) == arm})


def readme_table(results: Mapping[str, Any]) -> str:
    """`newton_search` against the best-tuned run: the table of the README."""
    part, look = results["envelope"], Lookup(results)
    rows = []
    for strategy, axis, label in (
        ("newton_search", "seconds", "`newton_search`, net seconds"),
        ("newton_search-2", "generated_tokens", "with 2 updates per batch of rollouts, sampled tokens"),
    ):
        for task in look.tasks:
            rows.append([f"{label}, `{task.split(':')[1]}`", *speeds(part, task, axis, strategy, FEW_SHARES)])
    return table(["speed-up, to a share of the starting KL of …", *heads(FEW_SHARES)], rows)


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """Generated blocks of docs/rivals.md."""
    return {"coverage": coverage(results), "envelope": envelope_table(results), "steps": steps_table(results)}
