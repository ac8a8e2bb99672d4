"""Tokens by kind, recorded or derived; never guessed."""

from __future__ import annotations

import dataclasses

from helpers.grid_runs import planted_run

from effopd.compare.grid_run import SearchSummary, from_row, to_row, with_kinds
from effopd.compare.search_tokens import with_search_teacher
from effopd.compare.token_kinds import derived
from effopd.runs.records import Costs, EvaluationRecord, SearchRecord, TrialRecord

STEPS = (0, 2, 4)


def run(strategy, sampled, forward, searches=0):
    """A run whose totals per step are `sampled` and `forward` tokens."""
    planted = planted_run(strategy, steps=STEPS, searches=SearchSummary(count=searches))
    evaluations = tuple(
        dataclasses.replace(
            e,
            costs=dataclasses.replace(
                e.costs, net_generated_tokens=sampled * e.step, net_forward_tokens=forward * e.step
            ),
        )
        for e in planted.evaluations
    )
    return dataclasses.replace(planted, evaluations=evaluations)


def kinds(of):
    """(student forward, backward, teacher) of a run at its end."""
    costs = of.evaluations[-1].costs
    return costs.student_forward_tokens, costs.student_backward_tokens, costs.teacher_tokens


PLAIN = run("plain", 10, 60)  # so 60 / 2 − 10 = 20 prompt tokens per step


def test_kinds_follow_from_the_prompts_of_the_baseline():
    found = derived([
        PLAIN,
        run("short", 5, 50),  # 25 tokens per step, one forward pass of each model
        run("exopd", 10, 90),  # and one of the reference
        run("sampling", 40, 54, searches=1),  # 27 trained per step, so 7 of 40 sampled for rollouts
        run("scoring", 12, 64 + 15, searches=1),  # 32 trained; 15 in searches, in unknown parts
    ], "plain", ("sampling", "scoring"))  # fmt: skip
    assert [kinds(each) for each in found] == [
        (120, 120, 120), (100, 100, 100), (120, 120, 240), (108, 108, 108), (None, 128, None)
    ]  # fmt: skip


def test_nothing_is_derived_for_runs_that_fit_no_rule():
    other = run("bigger", 21, 122)  # twice the prompts
    searching = run("search-bigger", 20, 130, searches=1)
    odd = run("odd", 10, 61)
    for each in (other, searching, odd):
        assert derived([PLAIN, each], "plain", ())[1] is each
    assert derived([other], "plain", ("bigger",))[0] is other  # no baseline


def test_recorded_kinds_stay_and_survive_results_json():
    own = dataclasses.replace(
        PLAIN, evaluations=tuple(dataclasses.replace(e, costs=with_kinds(e.costs, 7, 9)) for e in PLAIN.evaluations)
    )
    assert derived([own], "plain", ())[0] is own
    back = from_row(to_row(own))
    assert kinds(back) == (60 * 4 - 9, 7, 9)
    assert "teacher_tokens" not in to_row(PLAIN)["curve"]


def search(step, *forward):
    trials = tuple(TrialRecord(0.0, "start", forward_tokens=tokens) for tokens in forward)
    return SearchRecord(step=step, forward_tokens=sum(forward), trials=trials)


def test_the_teachers_part_of_old_searches_is_half_of_each_first_score():
    def at(step, total, searches):
        costs = Costs(
            net_forward_tokens=200, teacher_forward_tokens=50, update_forward_tokens=50, search_forward_tokens=total
        )
        (found,) = with_search_teacher([EvaluationRecord(step, costs=costs)], searches)
        return found.costs.search_teacher_tokens

    searches = [search(2, 20, 10, 10), search(4, 24, 12)]
    assert at(2, 40, searches) == 10 and at(4, 76, searches) == 22 and at(4, 75, searches) is None
    assert at(4, 50, [search(2, 20, 20, 10)]) is None and at(4, 20, [search(2, 20)]) is None
