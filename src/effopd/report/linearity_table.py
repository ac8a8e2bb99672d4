"""Terminal table of `effopd intervene linearity`."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

#: Most scales in the table; results.csv has all of them.
_SCALES = 5


def linearity_table(frame: pd.DataFrame) -> Table:
    """One row per run, anchor and step: best scales, and predicted / true KL at the larger scales.

    Args:
        frame: the results of a folder (see `effopd.interventions.results`).
    """
    rows = frame[frame["intervention"] == "linearity"]
    known = sorted(rows[rows["known"] == 1]["scale"].unique())
    shown = sorted(rows[(rows["known"] == 0) & (rows["scale"] > 1)]["scale"].unique())[:_SCALES]
    title = f"linearity: {int(rows['n'].max())} prompts, hidden states known at s = {_listed(known)}"
    table = Table(title=title, box=None, header_style="bold", pad_edge=False)
    for name in ("run", "Δ from", "step"):
        table.add_column(name, no_wrap=True)
    columns = ("‖Δ‖", "KL at W_t", "best s: predicted", "true", "share of the gain")
    for name in (*columns, *(f"predicted/true at {scale:g}" for scale in shown)):
        table.add_column(name, justify="right")
    for (run, anchor, _), line in rows.groupby(["run", "anchor", rows["step"].fillna(-1)], sort=False):
        by_scale = line.set_index("scale")
        first = line.iloc[0]
        table.add_row(
            run,
            anchor,
            "" if pd.isna(first["step"]) else str(int(first["step"])),
            f"{first['delta_norm']:.3g}",
            f"{by_scale.loc[0.0, 'kl']:.4g}",
            f"{first['best_predicted']:.3g}",
            f"{first['best_true']:.3g}",
            "" if pd.isna(first["gain_share"]) else f"{100 * first['gain_share']:.0f} %",
            *(f"{by_scale.loc[scale, 'kl_ratio']:.3g}" for scale in shown),
        )
    return table


def _listed(scales: list[float]) -> str:
    return " and ".join(f"{scale:g}" for scale in scales)
