"""docs/dynamics.md: each claim of the paper about update dynamics against the testbed, from the tables on disk.

    .venv/bin/python benchmarks/dynamics_page.py [--families chain_sum spell_backward] [--out docs]

Reads what `dynamics_runs.py` and `dynamics_scans.py` left in runs/dynamics. A value is the mean over seeds with Student's 95 %
interval; a comparison is paired by seed. The verdict follows from the interval alone: *shown* if it lies wholly on the
claimed side, *the other way* if wholly on the opposite one, *undecided* otherwise. Also writes docs/dynamics/FAMILY.json (every
number of the page) and copies the figures it shows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from effopd.bench.time_to_target import smooth
from effopd.dynamics.statistics import Estimate, seed_mean
from effopd.files import write_atomically

EARLY = 12
FIGURES = ("norms", "layers", "spectrum", "subspaces_left", "u1_path", "first_last", "sparsity")
SCAN_FIGURES = ("alpha", "trajectory", "window", "rank", "norm_scaling")


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        opd, rl: over seeds; `None` where there is no such thing.
        test: the quantity the claim is about, and `side`: +1 if the claim says it is positive, −1 negative, 0 zero.
        margin: for side 0, how large a value still counts as nothing.
    """

    claim: str
    quantity: str
    opd: Estimate | None
    rl: Estimate | None
    test: Estimate
    side: int
    style: Callable[[Estimate], str]
    margin: float = 0.0

    @property
    def verdict(self) -> str:
        low, high = self.test.low, self.test.high
        if math.isnan(low):
            return "undecided"
        if self.side == 0:
            inside = -self.margin < low and high < self.margin
            return "shown" if inside else "the other way" if low > 0 or high < 0 else "undecided"
        if low * self.side > 0 and high * self.side > 0:
            return "shown"
        return "the other way" if low * self.side < 0 and high * self.side < 0 else "undecided"


def number(e: Estimate) -> str:
    return f"{e.mean:.3g} [{e.low:.3g}, {e.high:.3g}]"


def percent(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}] %"


class Family:
    """The analysis and the scans of all seeds of one task family."""

    def __init__(self, root: Path):
        self.root = root
        self.summary = json.loads((root / "analysis" / "summary.json").read_text())
        folders = sorted(root.glob("scans-*"))
        self.scans = [pd.read_csv(folder / "results.csv") for folder in folders]
        self.seeds = [int(folder.name.removeprefix("scans-")) for folder in folders]

    def metric(self, name: str) -> dict[str, list[float]]:
        """Mean over attention and MLP matrices, by seed."""
        runs = self.summary["runs"]
        return {g: [runs[f"{g}#{i}"]["metrics"][name]["mean"] for i in range(len(self.seeds))] for g in ("opd", "rl")}

    def run(self, take: Callable[[dict], float]) -> dict[str, list[float]]:
        runs = self.summary["runs"]
        return {g: [take(runs[f"{g}#{i}"]) for i in range(len(self.seeds))] for g in ("opd", "rl")}

    def scan(self, take: Callable[[pd.DataFrame, str], float]) -> dict[str, list[float]]:
        return {g: [take(table, g) for table in self.scans] for g in ("opd", "rl")}

    def compare(self, claim: str, quantity: str, values: dict[str, list[float]], side: int, style=number) -> Row:
        """OPD − RL, paired by seed."""
        difference = [a - b for a, b in zip(values["opd"], values["rl"], strict=True)]
        return Row(
            claim, quantity, seed_mean(values["opd"]), seed_mean(values["rl"]), seed_mean(difference), side, style
        )

    def each(self, claim: str, quantity: str, values, group: str, side: int, style=number, margin=0.0) -> Row:
        """A quantity of one group against zero."""
        estimates = {g: seed_mean(values[g]) for g in values}
        return Row(claim, quantity, estimates.get("opd"), estimates.get("rl"), estimates[group], side, style, margin)


def accuracy_of(table: pd.DataFrame, scan: str, run: str, **where) -> float:
    rows = table[(table["scan"] == scan) & (table["run"] == run)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, (scan, run, where, len(rows))
    return float(rows["accuracy"].iloc[0])


def gain_share(table: pd.DataFrame, accuracy: float, run: str) -> float:
    """(accuracy − base) / (trained − base)."""
    base = accuracy_of(table, "reference", "base")
    return (accuracy - base) / (accuracy_of(table, "reference", run) - base)


def norm_at(table: pd.DataFrame, run: str, share: float) -> float:
    """‖W_t − W0‖ where the smoothed accuracy first reaches base + share × (RL's final gain); NaN if never."""
    rows = table[(table["scan"] == "trajectory") & (table["run"] == run)].sort_values("step")
    base = accuracy_of(table, "reference", "base")
    target = base + share * (accuracy_of(table, "reference", "rl") - base)
    curve = smooth(rows["accuracy"].tolist())
    return next((n for n, a in zip(rows["update_norm"], curve, strict=True) if a >= target), math.nan)


def layer_share(layers: list[dict], chosen: Callable[[int, int], bool]) -> float:
    count = sum(1 for entry in layers if entry["layer"] is not None)
    return sum(e["share"] for e in layers if e["layer"] is not None and chosen(e["layer"], count))


def swap(table: pd.DataFrame, run: str, unit: str, side: str) -> float:
    return gain_share(table, accuracy_of(table, "swap", run, unit=unit, side=side), run)


def window(table: pd.DataFrame, run: str, module: str, centres: list[int]) -> float:
    shares = [gain_share(table, accuracy_of(table, "window", run, module=module, centre=c), run) for c in centres]
    return sum(shares) / len(shares)


def random_change(table: pd.DataFrame, run: str) -> float:
    return float(table[(table["scan"] == "random") & (table["run"] == run)]["accuracy_change"].mean())


def beta(value: float) -> Callable[[pd.DataFrame, str], float]:
    """Share of the gain of the early model stretched by β."""
    return lambda t, g: gain_share(t, accuracy_of(t, "norm_scaling", g, step=EARLY, beta=value), g)


def overshoot(table: pd.DataFrame, run: str) -> float:
    """β of the best accuracy − β of the lowest KL to the teacher, of the early model."""
    scan = table[(table["scan"] == "norm_scaling") & (table["run"] == run) & (table["step"] == EARLY)]
    return float(scan.loc[scan["accuracy"].idxmax(), "beta"] - scan.loc[scan["kl"].idxmin(), "beta"])


def rank(end: str, p: float) -> Callable[[pd.DataFrame, str], float]:
    """Share of the gain of the leading or trailing p % of components."""
    return lambda t, g: gain_share(t, accuracy_of(t, "rank", g, end=end, percent=p), g)


def rows_of(family: Family) -> list[Row]:
    """Every claim, in the order of the paper."""
    f, middle, ends = family, [1, 2], [0, 3]
    a, b, c = "1a same accuracy, smaller update", "1a embeddings contribute nothing", "1a middle MLPs matter most"
    d, e, h = "1a RL moves bottom and top layers more", "1b spectrum more concentrated than RL's", "1b early lock-in"
    n, r, k = (
        "1b 10 % of training + norm scaling ≈ 80 %",
        "control: random direction",
        "1b leading directions carry the gain",
    )
    metrics = {
        "spectral_norm": ("s1", 1, number), "spectral_to_frobenius": ("s1 / ‖ΔW‖", 1, percent),
        "effective_rank": ("effective rank", -1, number), "top1pct_norm_ratio": ("top-1 % norm ratio", 1, percent),
    }  # fmt: skip
    early = {
        "early_left_overlap_1": "cos² of u1 at 9 % of training with u1 at the end",
        "early_left_overlap_20": "overlap of the leading 20 left directions at 9 % with the end",
        "early_right_overlap_16": "overlap of the leading 16 right directions at 9 % with the end",
    }
    return [
        f.compare(a, "final accuracy", f.scan(lambda t, g: accuracy_of(t, "reference", g)), 0, percent),
        f.compare(a, "‖ΔW‖ at the end", f.run(lambda run: run["update_norm"]), -1),
        f.compare(a, "‖ΔW_t‖ when 80 % of RL's gain is reached", f.scan(lambda t, g: norm_at(t, g, 0.8)), -1),
        f.each(b, "change in accuracy with the base's embeddings (OPD)", f.scan(
            lambda t, g: float(t[(t["scan"] == "embedding") & (t["run"] == g)]["change_from_trained"].iloc[0])
        ), "opd", 0, percent, margin=0.02),
        f.each(b, "share of the gain from the embeddings alone (OPD)",
               f.scan(lambda t, g: swap(t, g, "embedding", "only")), "opd", 0, percent, margin=0.05),
        f.each(c, "gain from all MLPs − gain from all attention (OPD)",
               f.scan(lambda t, g: swap(t, g, "mlp", "only") - swap(t, g, "attention", "only")), "opd", 1, percent),
        f.each(c, "gain from one middle MLP − from one outer MLP (OPD)",
               f.scan(lambda t, g: window(t, g, "mlp", middle) - window(t, g, "mlp", ends)), "opd", 1, percent),
        f.compare(d, "share of ‖ΔW‖² in the first and last layer",
                  f.run(lambda run: layer_share(run["layers"], lambda i, count: i in (0, count - 1))), -1, percent),
        *(f.compare(e, label, f.metric(name), side, style) for name, (label, side, style) in metrics.items()),
        *(f.compare(h, label, f.metric(name), 1, percent) for name, label in early.items()),
        f.each(h, "path of u1: variance in a plane beyond a random walk (OPD)", {
            g: [x - y for x, y in zip(f.metric("u1_evr")[g], f.metric("u1_evr_null_mean")[g], strict=True)]
            for g in ("opd", "rl")
        }, "opd", 1, percent),
        f.each(n, f"share of the gain at step {EARLY}, β = 0 (as it is)", f.scan(beta(0.0)), "opd", 1, percent),
        f.each(n, f"share of the gain at step {EARLY}, β = 1", f.scan(beta(1.0)), "opd", 1, percent),
        f.each(n, "β = 1: share of the gain − 80 % (OPD)",
               {g: [v - 0.8 for v in values] for g, values in f.scan(beta(1.0)).items()}, "opd", 1, percent),
        f.each("ours: accuracy asks for longer steps than the KL", f"best β by accuracy − by KL at step {EARLY} (OPD)",
               f.scan(overshoot), "opd", 1),
        *(f.each(k, f"share of the gain from the top {p:g} % of the matrices, shared norm, the rest trained (OPD)", f.scan(rank("top", p)), "opd", 1, percent)
          for p in (1, 5, 20)),
        f.each(k, "share of the gain from the bottom 50 % of the matrices, beyond embeddings alone (OPD)",
               f.scan(lambda t, g: rank("bottom", 50)(t, g) - swap(t, g, "embedding", "only")), "opd", 0, percent, margin=0.05),
        f.compare(k, "top 1 %, shared norm: OPD − RL", f.scan(rank("top", 1)), 1, percent),
        f.each(r, "change in accuracy by a random move of the same norm (OPD's)", f.scan(random_change), "opd", 0,
               percent, margin=0.02),
    ]  # fmt: skip


def page_table(families: dict[str, list[Row]]) -> str:
    """A Markdown table a family."""
    text = []
    for name, rows in families.items():
        text += [
            f"### {name}",
            "",
            "| claim | measured | OPD | RL | tested value | verdict |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = ["–" if x is None else row.style(x) for x in (row.opd, row.rl, row.test)]
            text.append(f"| {row.claim} | {row.quantity} | {' | '.join(cells)} | **{row.verdict}** |")
        text.append("")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["chain_sum", "spell_backward"])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    folder = arguments.out / "dynamics"
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for name in arguments.families:
        family = Family(Path("runs/dynamics") / name)
        tables[name] = rows_of(family)
        content = [
            {"claim": r.claim, "quantity": r.quantity, "verdict": r.verdict, "side": r.side, "margin": r.margin,
             **{key: None if e is None else asdict(e) for key, e in (("opd", r.opd), ("rl", r.rl), ("test", r.test))}}
            for r in tables[name]
        ]  # fmt: skip
        text = json.dumps({"seeds": family.seeds, "rows": content}, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / f"{name}.json", lambda path, text=text: path.write_text(text))
        if name == arguments.families[0]:
            for figure in FIGURES:
                shutil.copy(family.root / "analysis" / "figures" / f"{figure}.png", folder / f"{figure}.png")
            for figure in SCAN_FIGURES:
                source = family.root / f"scans-{family.seeds[0]}" / "figures" / f"{figure}.png"
                shutil.copy(source, folder / f"scan_{figure}.png")
    table = page_table(tables)
    page = arguments.out / "dynamics.md"
    head, mark, _ = page.read_text().partition("<!-- tables -->\n")
    write_atomically(page, lambda path: path.write_text(head + mark + "\n" + table))
    print(table)


if __name__ == "__main__":
    main()
