"""Measured acceptance rates of the paper's gate (`not_worse`, smallest validation set)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effopd.report.compare_lookup import Row, Table

#: Files of `benchmarks/gate_noise.py` and `gate_power.py`; the page uses those in its folder.
GATE_NOISE, GATE_POWER = "gate_noise.json", "gate_power.json"


def gate_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the gate files in `folder`, by name; missing files are skipped.

    Returns:
        - `gate_noise`: accepted shares of unchanged models, with fresh sampling noise
        - `gate_shared_noise`: accepted shares along random directions, with the package's shared
          sampling noise
        - `gate_power`: accepted shares of real moves by their true change in accuracy
    """
    results: dict[str, list[dict[str, Any]]] = {}
    if (folder / GATE_NOISE).is_file():
        noise = json.loads((folder / GATE_NOISE).read_text())
        for name, rows in (("gate_noise", noise["fresh_noise"]), ("gate_shared_noise", noise["shared_noise"])):
            smallest = min(row["validation_size"] for row in rows)
            results[name] = [row for row in rows if row["gate"] == "not_worse" and row["validation_size"] == smallest]
    if (folder / GATE_POWER).is_file():
        results["gate_power"] = json.loads((folder / GATE_POWER).read_text())["by_true_change"]
    return results


def noise_table(rows: Sequence[Row]) -> Table:
    """Share of searches that accept a candidate equal to the start, with its 95 % interval."""
    cells = []
    for row in rows:
        low, high = row["first_accepted_ci95"]
        cells.append([row["family"], row["model"], f"{row['first_accepted']:.1%} [{low:.1%}, {high:.1%}]"])
    return Table(["family", "model", "first candidate accepted"], cells)


def gate_table(groups: Sequence[Row]) -> Table:
    """Accepted shares of real moves by their true change in accuracy, with the range over runs."""
    rows = []
    for row in groups:
        low, high = (f"{100 * row[end]:+.1f}" if row[end] is not None else "" for end in ("from", "to"))
        change = f"{low} to {high}" if low and high else f"below {high}" if high else f"{low} and more"
        shares = [
            f"{row[noise]:.0%} ({min(row[f'{noise}_by_run']):.0%} to {max(row[f'{noise}_by_run']):.0%})"
            for noise in ("shared", "fresh")
        ]
        rows.append([change, str(row["moves"]), str(row["searches"]), *shares])
    header = [
        "true change in accuracy, points",
        "moves",
        "searches",
        "accepted, shared noise",
        "accepted, fresh noise",
    ]
    return Table(header, rows)
