"""Every second belongs to one category, and tokens add up."""

from __future__ import annotations

import time

import pytest
import torch

from effopd.distill.config import OPDConfig
from effopd.errors import ConfigError
from effopd.runs.ledger import CATEGORIES, CLOCKS, CostLedger
from effopd.runs.records import Costs


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_parts_are_exclusive_and_add_up():
    clock = Clock()
    ledger = CostLedger(clock)
    ledger.start()
    clock.now = 1
    with ledger.track("update"):
        clock.now = 3
        with ledger.track("rollout"):
            clock.now = 10
        with ledger.track("teacher"):
            clock.now = 11
        clock.now = 12
    with ledger.track("eval"):
        clock.now = 20
    clock.now = 21
    ledger.stop()
    assert ledger.seconds == {
        "rollout": 7.0, "teacher": 1.0, "update": 3.0, "search": 0.0, "eval": 8.0, "other": 2.0,
    }  # fmt: skip
    assert sum(ledger.seconds.values()) == 21
    clock.now = 99
    assert ledger.snapshot()["cost/net_seconds"] == 21 - 8


def test_a_pause_is_charged_to_nobody():
    clock = iter([0.0, 1.0, 11.0, 13.0]).__next__
    ledger = CostLedger(clock)
    ledger.start()
    with ledger.paused():  # from 1 to 11
        pass
    ledger.stop()
    assert ledger.seconds["other"] == 3.0 == sum(ledger.seconds.values())


def test_an_uncharged_block_leaves_all_totals_as_they_were():
    clock = iter([0.0, 1.0, 2.0, 9.0, 10.0, 13.0]).__next__
    ledger = CostLedger(clock)
    ledger.start()
    with ledger.uncharged(), ledger.track("teacher"):  # from 1 to 10
        ledger.count("teacher", forward=5)
    ledger.stop()
    assert ledger.seconds["other"] == 4.0 == sum(ledger.seconds.values())
    assert not sum(ledger.forward_tokens.values())


def test_a_block_before_the_start_is_charged_and_the_set_up_around_it_is_not():
    clock = iter([1.0, 2.0, 5.0, 5.0, 9.0, 10.0]).__next__
    ledger = CostLedger(clock)
    with ledger.charged("teacher"):  # from 2 to 5
        pass
    ledger.start()  # at 9
    ledger.stop()
    assert ledger.seconds["teacher"] == 3.0 and ledger.seconds["other"] == 1.0 + 1.0


def test_reset_clears_what_was_charged_before_training():
    ledger, other = CostLedger(Clock()), CostLedger(Clock())
    for each in (ledger, other):
        each.count("rollout", generated=10, forward=3)
        each.seconds["rollout"] = 2.0
    ledger.reset()
    for state in (other.state_dict(), CostLedger(Clock()).state_dict()):
        ledger.add(state, tokens=True)
    assert ledger.state_dict() == other.state_dict()


def test_net_seconds_of_several_processes_are_those_of_the_slowest():
    """Of one that samples longer and one that trains longer, each waiting for the other."""
    states = []
    for rollout, update, evaluation in ((10.0, 1.0, 3.0), (1.0, 9.0, 4.0)):
        ledger = CostLedger(Clock())
        ledger.seconds |= {"rollout": rollout, "update": update, "eval": evaluation}
        states.append(ledger.state_dict())
    for order in (states, states[::-1]):
        again = CostLedger(Clock())
        for state in order:
            again.add(state, tokens=True)
        assert again.snapshot()["cost/net_seconds"] == 11.0 and again.seconds["eval"] == 4.0


def test_tokens_and_net():
    ledger = CostLedger(Clock())
    ledger.count("rollout", generated=10)
    ledger.count("search", generated=5, forward=2)
    ledger.count("eval", generated=1000, forward=1000)
    ledger.count("teacher", forward=7)
    flat = ledger.snapshot()
    assert flat["cost/net_generated_tokens"] == 15 and flat["cost/net_forward_tokens"] == 9
    assert flat["cost/eval_generated_tokens"] == 1000


def test_the_teachers_part_of_a_search_is_counted_beside_its_forward_tokens():
    ledger = CostLedger(Clock())
    ledger.count("teacher", forward=40)
    ledger.count("update", forward=40)
    ledger.count("search", forward=30, search_teacher=10)
    ledger.count("eval", forward=1000)
    costs = Costs.from_row(ledger.snapshot())
    assert (costs.teacher_tokens, costs.student_forward_tokens, costs.student_backward_tokens) == (50, 60, 40)
    again = CostLedger(Clock())
    again.load_state_dict(ledger.state_dict())
    again.add(ledger.state_dict(), tokens=True)
    assert again.search_teacher_tokens == 20


def test_totals_without_the_teachers_part_leave_it_unknown_if_a_search_made_forward_passes():
    ledger = CostLedger(Clock())
    ledger.count("search", forward=30)
    old = {name: value for name, value in ledger.state_dict().items() if name != "search_teacher_tokens"}
    ledger.load_state_dict(old)
    costs = Costs.from_row(ledger.snapshot())
    assert costs.teacher_tokens is None and costs.student_forward_tokens is None
    ledger.load_state_dict(old | {"forward_tokens": dict.fromkeys(CATEGORIES, 0)})
    assert Costs.from_row(ledger.snapshot()).teacher_tokens == 0


def test_state_round_trip_continues():
    clock = Clock()
    first = CostLedger(clock)
    first.start()
    clock.now = 5
    first.count("rollout", generated=3)
    second = CostLedger(clock)
    second.load_state_dict(first.state_dict())
    second.start()
    clock.now = 7
    assert second.snapshot()["cost/other_seconds"] == 7
    assert second.generated_tokens["rollout"] == 3


def test_an_exception_closes_its_category():
    clock = Clock()
    ledger = CostLedger(clock)
    ledger.start()
    with pytest.raises(RuntimeError), ledger.track("search"):
        clock.now = 2
        raise RuntimeError
    clock.now = 3
    ledger.stop()
    assert ledger.seconds["search"] == 2 and ledger.seconds["other"] == 1


def test_unknown_category():
    with pytest.raises(KeyError, match="known: " + ", ".join(CATEGORIES)):
        CostLedger().push("coffee")


@pytest.mark.slow
def test_cpu_seconds_leave_waiting_out():
    spent = {}
    for name in ("wall", "cpu"):
        ledger = CostLedger(CLOCKS[name])
        ledger.start()
        with ledger.track("rollout"):
            time.sleep(0.5)
        ledger.stop()
        spent[name] = ledger.seconds["rollout"]
    assert spent["wall"] >= 0.5 > 5 * spent["cpu"]


def test_cpu_seconds_are_refused_where_an_accelerator_works(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    settings = {"output_dir": str(tmp_path), "cost_clock": "cpu", "bf16": False}
    with pytest.raises(ConfigError, match="'wall', or use_cpu"):
        OPDConfig(**settings)
    assert OPDConfig(**settings, use_cpu=True).cost_clock == "cpu"
    with pytest.raises(ConfigError, match="wall, cpu"):
        OPDConfig(output_dir=str(tmp_path), cost_clock="sun")
