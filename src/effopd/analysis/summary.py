"""summary.json: means with 95 % intervals, from the tables alone.

Two kinds of interval are reported separately. The bootstrap over the matrices of one run describes
that model; Student's t over seeds predicts another training run. `larger` names a group only if
every available interval of the difference excludes 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import effopd
from effopd.analysis import table_queries, trajectory_metrics
from effopd.analysis.tables import read_table
from effopd.common.statistics import Interval, bootstrap_mean, paired_difference, student_t, welch
from effopd.common.versions import ANALYSIS, versions

AVERAGING = (
    "Metrics are means over attention and MLP matrices, unweighted by size. Fused matrices (qkv, gate_up, stacked "
    "experts) are split first, so q, k and v count once each. Vectors, embeddings and the head are excluded. Values "
    "are those of the last snapshot. early_left_overlap_K is the projector overlap between the K leading left "
    "directions at about 10 % of training and the final ones."
)
INTERVALS = (
    "95 %. Over matrices: percentile bootstrap, describes this model. Over seeds: Student's t (differences: Welch). "
    "'larger' names a group only if every available interval of the difference excludes 0."
)
HEAD_APART = (
    "the base ties its output head to the token embedding, but not every trained checkpoint does. Head and "
    "embedding are therefore measured apart; where they are tied, one update counts in both."
)


def summarize(out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of summary.json (strict JSON: undefined numbers are `None`).

    Args:
        out: folder with the tables.
        about: settings and runs (run → group, path, steps, ending), copied into the summary.
    """
    matrices = table_queries.with_layer(read_table(out / "matrices"))
    runs, seed = about["runs"], about["seed"]
    groups = table_queries.groups_of(runs)
    last = table_queries.final(matrices, runs)
    rows = table_queries.averaged(last)
    moving = trajectory_metrics.moving_runs(matrices, runs)
    paths = trajectory_metrics.trajectories(out, rows, moving, seed)
    if moving:
        rows = pd.concat([rows.astype({"metric": str}), trajectory_metrics.early_rows(out, moving, about["k"])])
    means = _means(rows, runs, seed)
    modules, layers = _norms(last, ["module"]), _norms(last, ["layer"])
    blocks = _norms(last[last["module"].isin(table_queries.AVERAGED)], ["layer", "module"])
    totals = {name: _total(last, name) for name in runs}
    embeddings = _embeddings(last)
    summary = {
        "effopd": effopd.__version__,
        "versions": versions(ANALYSIS),
        "settings": {key: value for key, value in about.items() if key != "runs"},
        "averaging": AVERAGING,
        "intervals": INTERVALS,
        "parts": _parts(last, next(iter(runs))),
        "runs": {
            name: {
                **run,
                "zero_update": not totals[name] > 0,
                "update_norm": totals[name],
                "metrics": means[name],
                "embedding": embeddings.get(name, {}),
                "modules": modules[name],
                "layers": _layers(layers[name], blocks.get(name, {})),
                "trajectory": paths.get(name),
            }
            for name, run in runs.items()
        },
        "groups": {group: _group(names, totals, means, modules) for group, names in groups.items()},
        "differences": _differences(rows, groups, totals, means, seed),
        "agreement": trajectory_metrics.agreement(out, rows, runs, about["k"], seed) if len(runs) > 1 else [],
        "notes": [*([HEAD_APART] if about.get("head_apart") else []), *_notes(matrices, last, runs)],
    }
    return _strict(summary)


# -- one run ---------------------------------------------------------------------------------------


def _means(rows: pd.DataFrame, runs: Iterable[str], seed: int) -> dict[str, dict[str, Interval]]:
    """run → metric → mean over attention and MLP matrices."""
    rows = rows[~rows["metric"].isin((*table_queries.SIZES, "share_of_total"))]
    means: dict[str, dict[str, Interval]] = {run: {} for run in runs}
    for (run, metric), values in rows.groupby(["run", "metric"], observed=True, sort=False)["value"]:
        means[str(run)][str(metric)] = bootstrap_mean(values, seed=seed)
    return means


def _total(last: pd.DataFrame, run: str) -> float:
    rows = last[(last["run"] == run) & (last["metric"] == "frobenius_norm")]
    return math.sqrt(float(rows["value"].pow(2).sum()))


def _norms(last: pd.DataFrame, by: list[str]) -> dict[str, dict[Any, dict[str, float]]]:
    """run → key → `norm` of the update, `share` of the total squared norm, `parameters` (count)."""
    wanted = last[last["metric"].isin(("frobenius_norm", "share_of_total", "parameters"))]
    value = wanted["value"].where(wanted["metric"] != "frobenius_norm", wanted["value"] ** 2)
    keys = ["run", *by, "metric"]
    sums = wanted.assign(value=value).groupby(keys, observed=True, sort=False)["value"].sum(min_count=1)
    norms: dict[str, dict[Any, dict[str, float]]] = {}
    for key, value in sums.items():
        run, *where, metric = key
        place = norms.setdefault(str(run), {}).setdefault(where[0] if len(where) == 1 else tuple(where), {})
        if metric == "frobenius_norm":
            place["norm"] = math.sqrt(value)
        else:
            place["share" if metric == "share_of_total" else "parameters"] = value
    return norms


def _layers(
    layers: Mapping[int, Mapping[str, float]], blocks: Mapping[Any, Mapping[str, float]]
) -> list[dict[str, Any]]:
    rows = []
    for layer in sorted(key for key in layers if key >= 0):
        row: dict[str, Any] = {"layer": int(layer), **{n: layers[layer][n] for n in ("norm", "share")}}
        for module in table_queries.AVERAGED:
            block = blocks.get((layer, module), {"norm": math.nan, "share": math.nan})
            row |= {f"{module}_norm": block["norm"], f"{module}_share": block["share"]}
        rows.append(row)
    return rows


def _embeddings(last: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """run → matrix → metric, for embedding and head."""
    names = ("row_cosine_mean", "row_cosine_min", "rows_moved_share")
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in last[last["metric"].isin(names)].itertuples():
        values.setdefault(str(row.run), {}).setdefault(str(row.matrix), {})[str(row.metric)] = row.value
    return values


def _parts(last: pd.DataFrame, run: str) -> dict[str, Any]:
    """Number of parts and parameters per module, and the names of unrecognized parts."""
    sizes = last[(last["run"] == run) & (last["metric"] == "parameters")]
    matrices = last[(last["run"] == run) & (last["metric"] == "rows")]
    by_module = {
        str(module): {"parts": len(rows), "parameters": int(rows["value"].sum())}
        for module, rows in sizes.groupby("module", observed=True, sort=False)
    }
    return {
        "parts": len(sizes),
        "matrices": len(matrices),
        "averaged": int(matrices["module"].isin(table_queries.AVERAGED).sum()),
        "modules": by_module,
        "other": [str(name) for name in sizes.loc[sizes["module"] == "other", "matrix"]],
    }


# -- groups and pairs ------------------------------------------------------------------------------


def _group(names: Sequence[str], totals, means, modules) -> dict[str, Any]:
    """Means of a label's runs over seeds; of a single run, its intervals over matrices."""
    one = len(names) == 1
    over_seeds = {
        metric: student_t([means[n][metric].mean for n in names if metric in means[n]]) for metric in means[names[0]]
    }
    return {
        "runs": list(names),
        "interval_over": "matrices" if one else "seeds",
        "update_norm": student_t([totals[name] for name in names]),
        "metrics": means[names[0]] if one else over_seeds,
        "modules": {
            module: {key: student_t([modules[n][module][key] for n in names]) for key in ("norm", "share")}
            for module in modules[names[0]]
        },
    }


def _differences(
    rows: pd.DataFrame, groups: Mapping[str, list[str]], totals, means, seed: int
) -> list[dict[str, Any]]:
    """For each pair of groups and metric: mean of a − b, paired by matrix, averaged over seeds."""
    names = {metric for of_run in means.values() for metric in of_run}
    wide = {
        str(metric): table_queries.by_matrix(values)
        for metric, values in rows[rows["metric"].isin(names)].groupby("metric", observed=True, sort=False)
    }
    result = []
    for a, b in itertools.combinations(groups, 2):
        norm = welch(*([totals[n] for n in groups[g]] for g in (a, b)))
        metrics: dict[str, Any] = {}
        for metric, table in wide.items():
            if not set(groups[a]) | set(groups[b]) <= set(table.columns):
                continue
            mean_a, mean_b = (table[groups[g]].mean(axis=1, skipna=False) for g in (a, b))
            over_matrices = paired_difference(mean_a, mean_b, seed=seed)
            over_seeds = welch(*([means[n][metric].mean for n in groups[g]] for g in (a, b)))
            larger = _larger(a, b, [over_matrices, over_seeds])
            metrics[metric] = {"over_matrices": over_matrices, "over_seeds": over_seeds, "larger": larger}
        total = {"over_seeds": norm, "larger": _larger(a, b, [norm])}
        result.append({"a": a, "b": b, "update_norm": total, "metrics": metrics})
    return result


def _larger(a: str, b: str, estimates: Sequence[Interval | None]) -> str | None:
    known = [e for e in estimates if e is not None and math.isfinite(e.low)]
    if known and all(e.low > 0 for e in known):
        return a
    return b if known and all(e.high < 0 for e in known) else None


# -- notes -----------------------------------------------------------------------------------------


def _notes(matrices: pd.DataFrame, last: pd.DataFrame, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    for name, run in runs.items():
        ending = run.get("ending")
        if ending and ending["step"] < ending["planned"]:
            steps = f"step {ending['step']} of {ending['planned']}"
            notes.append(
                f"{name}: the last weights are those of {steps}, although the run has a final model."
                if ending["final_model"]
                else f"{name}: the run stopped early, at {steps}. Its values are those of an unfinished run."
            )
        if not _total(last, name) > 0:
            notes.append(
                f"{name}: every tensor equals the base, so the update is zero. Its norms are 0; its ratios, ranks and "
                "directions are undefined."
            )
            continue
        of_run = matrices[matrices["run"] == name]
        start = of_run[(of_run["step"] == 0) & (of_run["metric"] == "frobenius_norm")]["value"]
        if 0 in run["steps"] and float(start.abs().sum()) > 0:
            notes.append(
                f"{name}: step 0 differs from the base (update norm {math.sqrt(float(start.pow(2).sum())):.3g}), so "
                "this run did not start from this base. Its updates contain that difference."
            )
        noise = last[(last["run"] == name) & (last["metric"] == "rounding_noise_to_update")]["value"]
        if float((noise > 0.5).mean()) > 0.1:
            notes.append(
                f"{name}: in {float((noise > 0.5).mean()):.0%} of the parts, the rounding error of the stored weights "
                "exceeds half the update. Their effective rank and small singular values mostly reflect rounding. "
                "Analyze float32 checkpoints if available."
            )
    for group, names in table_queries.groups_of(runs).items():
        ends = {runs[name]["steps"][-1] for name in names}
        if len(ends) > 1:
            notes.append(
                f"{group}: the seeds end at different steps ({', '.join(str(runs[n]['steps'][-1]) for n in names)}), "
                "so final values compare runs of different length."
            )
    others = last.loc[last["module"] == "other", "matrix"].astype(str).unique()
    if len(others):
        notes.append(
            f"{len(others)} parts were not recognized and are analyzed as module 'other': {', '.join(others[:5])}"
            f"{', …' if len(others) > 5 else ''}."
        )
    return notes


def _strict(value: Any) -> Any:
    """Plain JSON values: intervals as objects, non-finite numbers as `None`."""
    if isinstance(value, Interval):
        return _strict(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
