"""Values of the method section of a comparison page."""

from __future__ import annotations

from collections import Counter
from typing import Any

from effopd.report.compare_lookup import Lookup


def method(lookup: Lookup) -> dict[str, Any]:
    """Seeds, merges of runs from other machines, code states and failures."""
    chains = [run.get("merges", []) for run in lookup.results["runs"]]
    codes = Counter(run.get("code") or "not recorded" for run in lookup.results["runs"])
    return {
        "seeds": sorted({run["seed"] for run in lookup.results["runs"]}),
        "merges": [merge for merge in lookup.results["settings"].get("merges", []) if merge["runs"]],
        "runs_from_elsewhere": sum(map(bool, chains)),
        "runs_through_several": sum(len(chain) > 1 for chain in chains),
        "codes": codes if len(codes) > 1 else {},
        "failed": lookup.results["settings"].get("failed", []),
    }
