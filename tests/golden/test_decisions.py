"""The software decides today what it decided when `decisions.json` was recorded, to six digits."""

from __future__ import annotations

import json

import pytest
from golden.decisions import FAMILIES, FILE, STRATEGIES, decisions, machine

pytestmark = pytest.mark.slow


GOLDEN = json.loads(FILE.read_text())


def numbers(tree) -> list:
    """The leaves of nested lists and mappings, in order."""
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in numbers(tree[name])]
    if isinstance(tree, list):
        return [leaf for each in tree for leaf in numbers(each)]
    return [-1e9 if tree is None else tree]  # a candidate without a score


@pytest.mark.skipif(machine() != GOLDEN["machine"], reason="another torch or CPU rounds otherwise")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_decisions(family, strategy, tmp_path):
    now, then = decisions(family, strategy, tmp_path), GOLDEN["runs"][f"{family}/{strategy}"]
    assert {name: len(rows) for name, rows in now.items()} == {name: len(rows) for name, rows in then.items()}
    assert numbers(now) == pytest.approx(numbers(then), rel=1e-6, abs=1e-6)
