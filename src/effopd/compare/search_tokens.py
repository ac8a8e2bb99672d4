"""The teacher's part of a search, for run folders recorded before it was counted apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from effopd.runs.records import EvaluationRecord, SearchRecord


def with_search_teacher(
    evaluations: Iterable[EvaluationRecord], searches: Sequence[SearchRecord]
) -> list[EvaluationRecord]:
    """Evaluations with the teacher's part of the searches, if it is missing and can be derived.

    The first score of a search has two forward passes, one of them the teacher's; the others have
    one. An evaluation stays as it is if a search has other proportions, or if the searches before
    it do not add up to its `search_forward_tokens`.
    """
    return [_with_search_teacher(evaluation, searches) for evaluation in evaluations]


def _with_search_teacher(evaluation: EvaluationRecord, searches: Sequence[SearchRecord]) -> EvaluationRecord:
    costs = evaluation.costs
    if costs.search_teacher_tokens is not None or not costs.search_forward_tokens:
        return evaluation
    before = [search for search in searches if search.step <= evaluation.step]
    parts = [_teacher_part(search) for search in before]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or sum(s.forward_tokens for s in before) != costs.search_forward_tokens:
        return evaluation
    return dataclasses.replace(evaluation, costs=dataclasses.replace(costs, search_teacher_tokens=sum(known)))


def _teacher_part(search: SearchRecord) -> int | None:
    """The teacher's tokens of a search; `None`: the trials' proportions are not 2, 1, 1, …"""
    if search.teacher_tokens is not None:
        return search.teacher_tokens
    scored = [trial.forward_tokens for trial in search.trials if trial.forward_tokens]
    if not scored:
        return None if search.forward_tokens else 0
    first, *others = scored
    fits = bool(others) and all(first == 2 * tokens for tokens in others) and sum(scored) == search.forward_tokens
    return first // 2 if fits else None
