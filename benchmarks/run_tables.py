"""Tables of fields in docs/run_files.md, generated from the records.

    python benchmarks/run_tables.py

Rewrites everything after `MARK`; a test checks that it is up to date.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from effopd.runs.columns import Column, Record, fields_of
from effopd.runs.records import (
    EVALS,
    METRICS,
    SEARCHES,
    Costs,
    EvaluationRecord,
    Health,
    Offline,
    Prune,
    SearchMetrics,
    SearchRecord,
    Served,
    StepRecord,
    TrialRecord,
)

PAGE = Path(__file__).parents[1] / "docs" / "run_files.md"
MARK = "<!-- From here on written by benchmarks/run_tables.py, from src/effopd/runs/records.py. -->\n"
SECTIONS: dict[str, type[Record]] = {
    f"`{METRICS}`": StepRecord,
    f"`health/…` in `{METRICS}`": Health,
    f"`served/…` in `{METRICS}`": Served,
    f"`offline/…` in `{METRICS}`": Offline,
    f"`prune/…` in `{METRICS}`": Prune,
    f"`effopd/…` in `{METRICS}`": SearchMetrics,
    f"`{EVALS}`": EvaluationRecord,
    f"`{SEARCHES}`": SearchRecord,
    f"`trials` in `{SEARCHES}`": TrialRecord,
    f"`cost/…` in `{METRICS}` and `{EVALS}`": Costs,
}


def table(record: type[Record]) -> str:
    """Table of the fields of a record that are columns."""
    columns = [(name, kind) for name, kind in fields_of(record) if isinstance(kind, Column)]
    rows = [(f"`{column.key or record.prefix + name}`", column.text, column.unit) for name, column in columns]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(["| field | meaning | unit |", "|---|---|---|", *(f"| {line} |" for line in lines)])


def tables() -> str:
    """All sections as Markdown."""
    parts = [
        f"## {title}\n\n{' '.join((inspect.getdoc(record) or '').split())}\n\n{table(record)}\n"
        for title, record in SECTIONS.items()
    ]
    return "\n".join(parts)


def page(text: str) -> str:
    """The page with regenerated tables."""
    prose, mark, _ = text.partition(MARK)
    return f"{prose}{mark}\n{tables()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
