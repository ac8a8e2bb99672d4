"""The software decides today what it decided when `decisions.json` was recorded: to six digits on a
processor of the same model, to 1 % on another one.
"""

from __future__ import annotations

import json

import pytest
from golden.decisions import FILE, RUNS, decisions, machine

pytestmark = pytest.mark.slow


GOLDEN = json.loads(FILE.read_text())
#: With the same torch and vector instructions, two models of processor differed by up to 1e-3.
PRECISION = 1e-6 if machine() == GOLDEN["machine"] else 1e-2


def numbers(tree) -> list:
    """The leaves of nested lists and mappings, in order."""
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in numbers(tree[name])]
    if isinstance(tree, list):
        return [leaf for each in tree for leaf in numbers(each)]
    return [-1e9 if tree is None else tree]  # a candidate without a score


@pytest.mark.skipif(
    machine() | {"model": ""} != GOLDEN["machine"] | {"model": ""},
    reason="another torch, or other vector instructions, round otherwise",
)
@pytest.mark.parametrize(("family", "strategy"), RUNS)
def test_same_decisions(family, strategy, tmp_path):
    now, then = decisions(family, strategy, tmp_path), GOLDEN["runs"][f"{family}/{strategy}"]
    assert {name: len(rows) for name, rows in now.items()} == {name: len(rows) for name, rows in then.items()}
    assert numbers(now) == pytest.approx(numbers(then), rel=PRECISION, abs=1e-6)
