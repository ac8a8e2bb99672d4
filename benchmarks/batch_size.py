"""Tables of docs/batch_size.md: small against large batches; `readme_results.py` writes them.

Nothing is run. Three comparisons:

- The results.json in docs/tail and docs/tail_spell_backward: 8 to 256 prompts per batch of
  rollouts, with reuse (recipes/compare-tail.yaml, compare-tail-spell-backward.yaml).
- docs/mini_batches/results.json: 256 prompts per batch of rollouts, in parts
  (recipes/compare-mini-batches.yaml).
- docs/results.json with 256 prompts per step against docs/ablation/results.json with 32: the same
  models, tasks, seeds and held-out prompts. The target is the final KL of plain OPD with the large
  batch at the reference learning rate. Speed-ups are over `line_search` with the large batch from
  the reference rate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from rivals import (
    FEW_SHARES,
    LARGE,
    SMALL,
    Cost,
    Hindsight,
    costs,
    ends_table,
    heads,
    hindsight_table,
    priced,
    quotient,
    run_cost,
    spread,
    steps_table,
)

from effopd.compare.cross_targets import across, runs_of
from effopd.compare.time_to_target import smooth
from effopd.report.compare_lookup import AXIS_NAMES, Lookup, factor, table, times

STRATEGIES = ("plain", "line_search")
#: Start of the names of the arms with reuse, and what precedes the number of prompts.
REUSE, PROMPTS = "newton_search-schedule-free-3", "-prompts-"
#: The look-ahead of the README's table and of `single_table`.
HEADLINE = REUSE + "-replay-topd" + PROMPTS + "8"
#: The look-ahead with 256 prompts per batch of rollouts: whole, and in 8 parts.
WHOLE, PARTS = REUSE + PROMPTS + "256", "newton_search-schedule-free-parts-8-passes-3-prompts-256"
#: Targets for which docs/early counts.
EARLY_SHARES = tuple(share for share in FEW_SHARES if share >= Hindsight.EARLY)
#: Parts of a run.
THIRDS = (1 / 3, 2 / 3, 1)


def tail_blocks(grids: Sequence[Mapping[str, Any]], early: Mapping[str, Any]) -> dict[str, str]:
    """Generated blocks of the comparison with reuse.

    Args:
        grids: results.json of the grids, one per task.
        early: results.json of the arms with more evaluations in the first steps, see `Hindsight`.
    """
    return {
        "tail": reuse_table(grids, priced, early),
        "tail, larger models": repriced(grids),
        "tail, sampled tokens": reuse_table(grids, costs()["sampled tokens"], early),
        "tail, net seconds": reuse_table(grids, costs()["net seconds"], early),
        "tail, single": single_table(grids, early),
        "early, steps": steps_table(early, EARLY_SHARES),
        "tail, searches": stacked([searches_table(grid) for grid in grids]),
        "replay": replay_table(grids),
        "tail, steps": stacked([steps_table(grid, FEW_SHARES) for grid in grids]),
        "tail, ends": stacked([ends_table(grid) for grid in grids]),
    }


def parts_blocks(parts: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Generated blocks of the comparison with batches of rollouts in parts.

    Args:
        parts: results.json of the grid with parts.
        grids: results.json of the grids with whole batches, one per task.
    """
    return {
        "parts": hindsight_table(parts, FEW_SHARES),
        "parts, gain": parts_gain_table(parts, grids),
        "parts, steps": steps_table(parts, FEW_SHARES),
        "parts, ends": ends_table(parts),
    }


def parts_gain_table(parts: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> str:
    """Priced cost with every step on the whole batch, over that with the batch in parts."""
    rows, split, reference = [], Hindsight(parts, priced), Lookup(parts).reference
    for results in grids:
        whole = Hindsight(results, priced, same_prompts(results, WHOLE))
        for task in Lookup(results).tasks:
            own = [
                quotient(whole.cost(task, (WHOLE, reference), share), split.cost(task, (PARTS, reference), share))
                for share in FEW_SHARES
            ]
            tuned = [quotient(whole.best(task, share)[0], split.best(task, share)[0]) for share in FEW_SHARES]
            for label, ratios in (("`newton_search`, from ×1", own), ("fastest tuned run", tuned)):
                rows.append([f"`{task.split(':')[1]}`", label, *map(one_ratio, ratios)])
    return table(["task", "run", *heads(FEW_SHARES)], rows)


def held_out_blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """Generated blocks of docs/held_out.md."""
    return {
        "priced": reuse_table([results], priced),
        "single": single_table([results]),
        "sampled tokens": reuse_table([results], costs()["sampled tokens"]),
        "net seconds": reuse_table([results], costs()["net seconds"]),
        "searches": searches_table(results),
        "steps": steps_table(results, FEW_SHARES),
        "ends": ends_table(results),
    }


def single_table(grids: Sequence[Mapping[str, Any]], early: Mapping[str, Any] | None = None) -> str:
    """Priced cost of each tuned run that is the fastest to some target, at all targets, over that
    of `HEADLINE` from the reference rate.
    """
    rows = []
    for results in grids:
        known, look = Hindsight(results, priced, early=early), Lookup(results)
        own = HEADLINE, look.reference
        for task in look.tasks:
            bests = [known.best(task, share) for share in FEW_SHARES]
            for arm in dict.fromkeys(arm for cost, arm in bests if math.isfinite(cost)):
                cells = (one_ratio(known.ratio(task, arm, own, share)) for share in FEW_SHARES)
                rows.append([f"`{task.split(':')[1]}`", f"`{arm[0]}` {factor(arm[1], look.reference)}", *cells])
    return table(["task", "tuned run", *heads(FEW_SHARES)], rows)


def one_ratio(ratio: float) -> str:
    """`1.20×`: a tuned run's cost over the look-ahead's; "> any" if only the look-ahead arrives."""
    if math.isnan(ratio):
        return "–"
    return "> any" if math.isinf(ratio) else f"{ratio:.2f}×" if ratio else "0×"


def readme_table(grids: Sequence[Mapping[str, Any]], early: Mapping[str, Any]) -> str:
    """README: number of tuned arms, cost of the fastest one over that of `HEADLINE`."""
    rows = []
    for results in grids:
        known = Hindsight(results, priced, early=early)
        for task in Lookup(results).tasks:
            cells = (known.ratios(task, HEADLINE, share) for share in FEW_SHARES)
            rows.append([f"`{task.split(':')[1]}`", str(len(known.competing(task))), *cells])
    return table(["task", "tuned arms", *(f"to {head}" for head in heads(FEW_SHARES))], rows)


def replay_table(grids: Sequence[Mapping[str, Any]]) -> str:
    """KL with replay over that of the same strategy, rate and seed without, during the run."""
    rows = []
    for results in grids:
        curves = {run_key(run): run["curve"] for run in results["runs"]}
        pairs: dict[tuple[str, str], list[list[float]]] = {}
        for (task, arm, *others), curve in curves.items():
            without = arm.replace("-replay", "")
            if without != arm and (other := curves.get((task, without, *others))):
                ratios = [ours / its for ours, its in zip(kl_at_parts(curve), kl_at_parts(other), strict=True)]
                pairs.setdefault((task, without), []).append(ratios)
        for (task, arm), each in pairs.items():
            cells = (spread(part, ".2f") for part in zip(*each, strict=True))
            rows.append([f"`{task.split(':')[1]}`", f"`{arm}`", str(len(each)), *cells])
    return table(["task", "arm", "pairs", "after a third of the steps", "two thirds", "all"], rows)


def kl_at_parts(curve: Mapping[str, Any]) -> list[float]:
    """Smoothed KL at the last evaluation within a third, two thirds and all of the steps."""
    kl, steps = smooth(curve["kl"]), curve["step"]
    return [kl[bisect_right(steps, part * steps[-1]) - 1] for part in THIRDS]


def stacked(tables: Sequence[str]) -> str:
    """Tables with the same head as one."""
    first, *others = (each.splitlines() for each in tables)
    assert all(other[:2] == first[:2] for other in others)
    return "\n".join([*first, *(line for other in others for line in other[2:])])


def prompts_of(strategy: str) -> str:
    """Number of prompts per batch, from the end of a strategy's name."""
    return strategy.rpartition(PROMPTS)[2]


def same_prompts(results: Mapping[str, Any], arm: str) -> list[str]:
    """The plan's baselines with as many prompts per batch as an arm."""
    return [name for name in results["settings"]["baselines"] if prompts_of(name) == prompts_of(arm)]


def reuse_arms(look: Lookup) -> list[str]:
    """The look-aheads with reuse that ran, in the plan's order."""
    return list(dict.fromkeys(name for name, _ in look.arms if name.startswith(REUSE)))


def reuse_label(arm: str) -> str:
    """`8`, `8, replay` or `8, replay, TOPD`: prompts per batch of an arm with reuse."""
    marks = {"-replay": ", replay", "-topd": ", TOPD"}
    return prompts_of(arm) + "".join(text for mark, text in marks.items() if mark in arm)


def run_key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a run in grids of the same arms."""
    return run["task"], run["strategy"], run["learning_rate"], run["seed"]


def search_percent(curve: Mapping[str, Any]) -> list[float]:
    """Share of the net seconds in searches at every evaluation of a curve, in %."""
    pairs = zip(curve["search_seconds"], curve["seconds"], strict=True)
    return [100 * search / net if net else 0.0 for search, net in pairs]


def searches_table(
    results: Mapping[str, Any], arms: Sequence[str] | None = None, shares: Sequence[float] = FEW_SHARES
) -> str:
    """Share of the look-ahead's net seconds in searches, to every target; all rates and seeds.

    Args:
        results: results.json of the grid.
        arms: look-aheads; default: those with reuse, labelled by their number of prompts.
        shares: targets.
    """
    look, rows = Lookup(results), []
    for task in look.tasks:
        for arm in reuse_arms(look) if arms is None else arms:
            runs = [run for name, rate in look.arms if name == arm for run in look.runs(task, (name, rate))]
            if not runs:
                continue
            cells = []
            for share in shares:
                percent = [value for run in runs if math.isfinite(value := run_cost(run, share, search_percent))]
                cells.append(spread(percent, ".0f") if percent else "–")
            label = reuse_label(arm) if arms is None else f"`{arm}`"
            rows.append([f"`{task.split(':')[1]}`", label, str(len(runs)), *cells])
    return table(["task", "prompts" if arms is None else "arm", "runs", *heads(shares)], rows)


def reuse_table(grids: Sequence[Mapping[str, Any]], cost: Cost, early: Mapping[str, Any] | None = None) -> str:
    """Cost of the fastest baseline of the same batch size and of any, over the look-ahead's."""
    rows = []
    for results in grids:
        look, any_size = Lookup(results), Hindsight(results, cost, early=early)
        for task in look.tasks:
            name = f"`{task.split(':')[1]}`"
            for arm in (each for each in reuse_arms(look) if any_size.ran(task, each)):
                same = Hindsight(results, cost, same_prompts(results, arm), early)
                for label, rivals in (("the same", same), ("any", any_size)):
                    cells = (rivals.ratios(task, arm, share) for share in FEW_SHARES)
                    rows.append([name, reuse_label(arm), label, *cells])
            rows.append([name, "", "fastest", *(any_size.opponent(task, share) for share in FEW_SHARES)])
    return table(["task", "prompts", "opponent's prompts", *heads(FEW_SHARES)], rows)


def repriced(grids: Sequence[Mapping[str, Any]]) -> str:
    """Largest change of a factor of `reuse_table` with the price list for larger models."""
    changes = []
    for results in grids:
        look, lists = Lookup(results), [Hindsight(results, partial(priced, path=path)) for path in (SMALL, LARGE)]
        for task, strategy, share in product(look.tasks, reuse_arms(look), FEW_SHARES):
            for arm in lists[0].ran(task, strategy):
                small, large = (known.lead(task, arm, share) for known in lists)
                if 0 < small < math.inf and 0 < large < math.inf:
                    changes.append(abs(large / small - 1))
    change = f"{100 * max(changes):.1f} %"
    return f"With prices for a 4B student and a 32B teacher on eight H100, no factor changes by more than {change}."


def compared(large: dict[str, Any], small: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `cross_targets.across` for small batches: plain OPD and `line_search`, all rates."""
    reference = large["settings"]["reference_learning_rate"]
    home, other = runs_of(large), runs_of(small)
    arms = sorted(
        {run.arm for run in other if run.strategy in STRATEGIES}, key=lambda arm: (arm[0] != "plain", arm[1])
    )
    rows = across(home, (large["settings"]["baseline"], reference), ("line_search", reference), other, arms)
    return sorted(rows, key=lambda row: arms.index((row["strategy"], row["learning_rate"])))


def settings_table(large: dict[str, Any], small: dict[str, Any]) -> str:
    """Settings that differ between the two grids."""
    grids = [grid["settings"]["base"] for grid in (large, small)]
    seeds = [len({run["seed"] for run in grid["runs"]}) for grid in (large, small)]
    rows = {
        "optimizer steps": [grid["max_steps"] for grid in grids],
        "steps between evaluations": [grid["eval_steps"] for grid in grids],
        "seeds": seeds,
    }
    head = ["", *(f"{grid['per_device_train_batch_size']} prompts per step" for grid in grids)]
    return table(head, [[label, *map(str, values)] for label, values in rows.items()])


def speed_table(large: dict[str, Any], small: dict[str, Any]) -> str:
    """Speed-ups over `line_search` with large batches; one row per task, strategy and rate."""
    rows, reference = compared(large, small), large["settings"]["reference_learning_rate"]
    arms = dict.fromkeys((row["task"], row["strategy"], row["learning_rate"]) for row in rows)
    axes = {axis: name for axis, name in AXIS_NAMES.items() if axis != "steps"}
    lines = []
    for task in dict.fromkeys(arm[0] for arm in arms):
        for arm in (arm for arm in arms if arm[0] == task):
            by_axis = {row["axis"]: row for row in rows if (row["task"], row["strategy"], row["learning_rate"]) == arm}
            steps = by_axis["steps"]
            reached = f"{steps['reached']} of {steps['n'] + steps['undefined']}"
            speeds = [times(by_axis[axis]) for axis in axes]
            lines.append([task, f"`{arm[1]}`", factor(arm[2], reference), reached, *speeds])
    return table(["task", "strategy", "learning rate", "reached", *axes.values()], lines)
