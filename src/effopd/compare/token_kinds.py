"""Tokens by model and pass for the runs of an older results.json, from their totals.

Newer files store them. Older ones have sampled tokens G and forward tokens F of the whole run. P is
the number of prompt tokens up to a step. Runs with equal task and seed train on the same prompts in
the same order, so P is that of the baseline. A training token is in m forward passes: one of the
student, one of the teacher, one of ExOPD's reference.

    baseline            F = 2 · (P + G), which gives P
    no scored search    F = m · (P + G) at every evaluation, with m = 2 or 3
    sampling searches   F = 2 · (P + G_rollouts), with P + G_rollouts < P + G
    forward searches    F = 2 · (P + G) + S, with S > 0

A search scores by sampling or by forward passes, never by both. The teacher's part of S is not in
results.json, so teacher and student forward tokens of the last kind stay unknown. Nothing is
derived for a run that fits none of these. The same holds for a run that searches and differs from
the baseline in more settings than the look-ahead, because its prompts can differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from effopd.compare.grid_run import GridRun, Place, with_kinds
from effopd.runs.records import Costs

Prompts = Mapping[int, int]


def derived(runs: Sequence[GridRun], baseline: str, same_prompts: Collection[str]) -> list[GridRun]:
    """The runs of a results.json, with the kinds of tokens that can be derived.

    Runs that record them are returned as they are.

    Args:
        same_prompts: strategies whose settings differ from the baseline's in the look-ahead only.
    """
    prompts = prompts_by_place(run for run in runs if run.strategy == baseline)
    return [
        _derived(run, prompts.get(run.place)) if not run.searches.count or run.strategy in same_prompts else run
        for run in runs
    ]


def prompts_by_place(baselines: Iterable[GridRun]) -> dict[Place, dict[int, int]]:
    """(task, seed) → step → tokens of the prompts up to it, P = F / 2 − G.

    Left out: places whose baseline runs disagree, searched, or have an odd F.
    """
    found: dict[Place, dict[int, int]] = {}
    bad: set[Place] = set()
    for run in baselines:
        place = found.setdefault(run.place, {})
        for evaluation in run.evaluations:
            generated, forward = _totals(evaluation.costs)
            prompts = forward // 2 - generated
            if (
                run.searches.count
                or forward % 2
                or prompts < 0
                or place.setdefault(evaluation.step, prompts) != prompts
            ):
                bad.add(run.place)
    return {place: prompts for place, prompts in found.items() if place not in bad}


def _derived(run: GridRun, prompts: Prompts | None) -> GridRun:
    if prompts is None or any(e.costs.update_forward_tokens is not None for e in run.evaluations):
        return run
    if any(evaluation.step not in prompts for evaluation in run.evaluations):
        return run
    totals = [
        (prompts[evaluation.step] + generated, forward)
        for evaluation in run.evaluations
        for generated, forward in [_totals(evaluation.costs)]
    ]
    kinds = _kinds(totals, searched=run.searches.count > 0)
    if kinds is None:
        return run
    evaluations = tuple(
        dataclasses.replace(evaluation, costs=with_kinds(evaluation.costs, *counts))
        for evaluation, counts in zip(run.evaluations, kinds, strict=True)
    )
    return dataclasses.replace(run, evaluations=evaluations)


def _kinds(totals: Sequence[tuple[int, int]], *, searched: bool) -> list[tuple[int, int | None]] | None:
    """(backward tokens, teacher tokens) per evaluation, from (P + G, F)."""
    for passes in (2, 3):
        if all(forward == passes * trained for trained, forward in totals):
            return [(trained, forward - trained) for trained, forward in totals]
    if searched and all(forward % 2 == 0 and forward <= 2 * trained for trained, forward in totals):
        return [(forward // 2, forward // 2) for _, forward in totals]
    if searched and all(forward >= 2 * trained for trained, forward in totals):
        return [(trained, trained if forward == 2 * trained else None) for trained, forward in totals]
    return None


def _totals(costs: Costs) -> tuple[int, int]:
    assert costs.net_generated_tokens is not None and costs.net_forward_tokens is not None
    return int(costs.net_generated_tokens), int(costs.net_forward_tokens)
