"""Tables of docs/dynamics.md: the paper's claims about update dynamics, tested on the testbed.

    .venv/bin/python benchmarks/dynamics_page.py [--families chain_sum spell_backward] [--redraw]
    [--out docs]

Reads the results of `dynamics_runs.py` and `dynamics_interventions.py` in runs/dynamics. Writes
docs/dynamics/FAMILY.json, with every number of the page for every seed, and the figures. Then
rewrites the page's tables from the JSON; `--redraw` does only that.

A value is the mean over seeds with Student's 95 % interval; comparisons are paired by seed. The
verdict follows from the interval alone: *shown* if it lies wholly on the claimed side, *the other
way* if it lies wholly on the opposite side, *undecided* otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pages import rewrite

from effopd.common.files import write_atomically
from effopd.common.statistics import student_t
from effopd.compare.time_to_target import smooth

EARLY = 12
#: Held-out prompts of every intervention, the same for all seeds (`dynamics_interventions.py`).
PROMPTS = 400
LONGER = "ours: accuracy asks for longer steps than the KL"
FIGURES = ("norms", "layers", "spectrum", "subspaces_left", "u1_path", "first_last", "sparsity")
INTERVENTION_FIGURES = ("alpha", "trajectory", "window", "rank", "norm_scaling")


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        opd, rl: one value per seed.
        test: the tested quantity, one value per seed.
        side: claimed sign of `test`: +1 positive, −1 negative, 0 zero.
        unit: `number`, or `percent` for shares.
        margin: largest absolute value that counts as zero, for side 0.
    """

    claim: str
    quantity: str
    opd: list[float]
    rl: list[float]
    test: list[float]
    side: int
    unit: str
    margin: float = 0.0

    def to_row(self) -> dict[str, Any]:
        """JSON-ready: mean, interval and the values of the seeds; NaN becomes `None`."""
        test = student_t(self.test)
        return {
            "claim": self.claim,
            "quantity": self.quantity,
            "unit": self.unit,
            "side": self.side,
            "margin": self.margin,
            "verdict": verdict(test.low, test.high, self.side, self.margin),
            **{
                name: asdict(student_t(values)) | {"values": [None if math.isnan(v) else v for v in values]}
                for name, values in (("opd", self.opd), ("rl", self.rl), ("test", self.test))
            },
        }


def verdict(low: float, high: float, side: int, margin: float) -> str:
    """Verdict of an interval on a claim: `shown`, `the other way` or `undecided`."""
    if math.isnan(low):
        return "undecided"
    if side == 0:
        inside = -margin < low and high < margin
        return "shown" if inside else "the other way" if low > 0 or high < 0 else "undecided"
    if low * side > 0 and high * side > 0:
        return "shown"
    return "the other way" if low * side < 0 and high * side < 0 else "undecided"


def written(estimate: Mapping[str, Any], unit: str) -> str:
    """A mean with its interval, as text."""
    mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
    if unit == "number":
        return f"{mean:.3g} [{low:.3g}, {high:.3g}]"
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"


class Family:
    """The analysis and the interventions of all seeds of one task family."""

    def __init__(self, root: Path):
        self.root = root
        self.summary = json.loads((root / "analysis" / "summary.json").read_text())
        folders = sorted(root.glob("interventions-*"))
        self.interventions = [pd.read_csv(folder / "results.csv") for folder in folders]
        self.seeds = [int(folder.name.removeprefix("interventions-")) for folder in folders]

    def metric(self, name: str) -> dict[str, list[float]]:
        """Mean over attention and MLP matrices, by seed."""
        runs = self.summary["runs"]
        return {g: [runs[f"{g}#{i}"]["metrics"][name]["mean"] for i in range(len(self.seeds))] for g in ("opd", "rl")}

    def run(self, take: Callable[[dict], float]) -> dict[str, list[float]]:
        runs = self.summary["runs"]
        return {g: [take(runs[f"{g}#{i}"]) for i in range(len(self.seeds))] for g in ("opd", "rl")}

    def measured(self, take: Callable[[pd.DataFrame, str], float]) -> dict[str, list[float]]:
        return {g: [take(table, g) for table in self.interventions] for g in ("opd", "rl")}

    def compare(self, claim: str, quantity: str, values: dict[str, list[float]], side: int, unit="number") -> Row:
        """OPD − RL, paired by seed."""
        difference = [a - b for a, b in zip(values["opd"], values["rl"], strict=True)]
        return Row(claim, quantity, values["opd"], values["rl"], difference, side, unit)

    def each(self, claim: str, quantity: str, values, group: str, side: int, unit="number", margin=0.0) -> Row:
        """A quantity of one group against zero."""
        return Row(claim, quantity, values["opd"], values["rl"], values[group], side, unit, margin)


def accuracy_of(table: pd.DataFrame, intervention: str, run: str, **where) -> float:
    rows = table[(table["intervention"] == intervention) & (table["run"] == run)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, (intervention, run, where, len(rows))
    return float(rows["accuracy"].iloc[0])


def gain_share(table: pd.DataFrame, accuracy: float, run: str) -> float:
    """(accuracy − base) / (trained − base)."""
    base = accuracy_of(table, "reference", "base")
    return (accuracy - base) / (accuracy_of(table, "reference", run) - base)


def norm_at(table: pd.DataFrame, run: str, share: float) -> float:
    """‖W_t − W0‖ when the smoothed accuracy first reaches base + share × (RL's gain), or NaN."""
    rows = table[(table["intervention"] == "trajectory") & (table["run"] == run)].sort_values("step")
    base = accuracy_of(table, "reference", "base")
    target = base + share * (accuracy_of(table, "reference", "rl") - base)
    curve = smooth(rows["accuracy"].tolist())
    return next((n for n, a in zip(rows["update_norm"], curve, strict=True) if a >= target), math.nan)


def layer_share(layers: list[dict], chosen: Callable[[int, int], bool]) -> float:
    count = sum(1 for entry in layers if entry["layer"] is not None)
    return sum(e["share"] for e in layers if e["layer"] is not None and chosen(e["layer"], count))


def swap(table: pd.DataFrame, run: str, unit: str, side: str) -> float:
    return gain_share(table, accuracy_of(table, "swap", run, unit=unit, side=side), run)


def window(table: pd.DataFrame, run: str, module: str, centers: list[int]) -> float:
    shares = [gain_share(table, accuracy_of(table, "window", run, module=module, center=c), run) for c in centers]
    return sum(shares) / len(shares)


def random_change(table: pd.DataFrame, run: str) -> float:
    return float(table[(table["intervention"] == "random") & (table["run"] == run)]["accuracy_change"].mean())


def beta(value: float) -> Callable[[pd.DataFrame, str], float]:
    """Share of the gain of the early model scaled by β."""
    return lambda t, g: gain_share(t, accuracy_of(t, "norm_scaling", g, step=EARLY, beta=value), g)


def overshoot(table: pd.DataFrame, run: str) -> float:
    """β of the best accuracy − β of the lowest KL to the teacher, of the early model."""
    rows = table[(table["intervention"] == "norm_scaling") & (table["run"] == run) & (table["step"] == EARLY)]
    return float(rows.loc[rows["accuracy"].idxmax(), "beta"] - rows.loc[rows["kl"].idxmin(), "beta"])


def rank(end: str, p: float) -> Callable[[pd.DataFrame, str], float]:
    """Share of the gain of the leading or trailing p % of components."""
    return lambda t, g: gain_share(t, accuracy_of(t, "rank", g, end=end, percent=p), g)


def mean_error(scale: float) -> Callable[[pd.DataFrame, str], float]:
    """Mean over steps of |log(predicted / true KL)| along Δ from the previous saved step."""
    return lambda t, g: float(along(t, g, scale)["kl_ratio"].map(math.log).abs().mean())


def along(table: pd.DataFrame, run: str, scale: float) -> pd.DataFrame:
    rows = table[(table["intervention"] == "linearity") & (table["run"] == run) & (table["anchor"] == "previous")]
    return rows[rows["scale"] == scale]


def linearity_rows(f: Family) -> list[Row]:
    """Rows of `intervene linearity`; none if it has not been run for every seed."""
    if not all((table["intervention"] == "linearity").any() for table in f.interventions):
        return []
    claim = "ours: the KL along an update follows from two forward passes"
    share = f.measured(lambda t, g: float(along(t, g, 0.0)["gain_share"].mean()))
    return [
        *(f.compare(claim, f"mean \\|log(predicted / true KL)\\| at s = {s:g}", f.measured(mean_error(s)), -1)
          for s in (2.0, 8.0)),
        f.each(claim, "share of the gain at the predicted best scale (OPD)", share, "opd", 1, "percent"),
    ]  # fmt: skip


def rows_of(family: Family) -> list[Row]:
    """Rows of all claims, in the paper's order."""
    f, middle, ends = family, [1, 2], [0, 3]
    a, b, c = "1a same accuracy, smaller update", "1a embeddings contribute nothing", "1a middle MLPs matter most"
    d, e, h = "1a RL moves bottom and top layers more", "1b spectrum more concentrated than RL's", "1b early lock-in"
    n, r, k = (
        "1b 10 % of training + norm scaling ≈ 80 %",
        "control: random direction",
        "1b leading directions carry the gain",
    )
    metrics = {
        "spectral_norm": ("s1", 1, "number"), "spectral_to_frobenius": ("s1 / ‖ΔW‖", 1, "percent"),
        "effective_rank": ("effective rank", -1, "number"), "top1pct_norm_ratio": ("top-1 % norm ratio", 1, "percent"),
    }  # fmt: skip
    early = {
        "early_left_overlap_1": "cos² of u1 at 9 % of training with u1 at the end",
        "early_left_overlap_20": "overlap of the leading 20 left directions at 9 % with the end",
        "early_right_overlap_16": "overlap of the leading 16 right directions at 9 % with the end",
    }
    return [
        f.compare(a, "final accuracy", f.measured(lambda t, g: accuracy_of(t, "reference", g)), 0, "percent"),
        f.compare(a, "‖ΔW‖ at the end", f.run(lambda run: run["update_norm"]), -1),
        f.compare(a, "‖ΔW_t‖ when 80 % of RL's gain is reached", f.measured(lambda t, g: norm_at(t, g, 0.8)), -1),
        f.each(
            b,
            "change in accuracy with the base's embeddings (OPD)",
            f.measured(
                lambda t, g: float(
                    t[(t["intervention"] == "embedding") & (t["run"] == g)]["change_from_trained"].iloc[0]
                )
            ),
            "opd",
            0,
            "percent",
            margin=0.02,
        ),
        f.each(
            b,
            "share of the gain from the embeddings alone (OPD)",
            f.measured(lambda t, g: swap(t, g, "embedding", "only")),
            "opd",
            0,
            "percent",
            margin=0.05,
        ),
        f.each(
            c,
            "gain from all MLPs − gain from all attention (OPD)",
            f.measured(lambda t, g: swap(t, g, "mlp", "only") - swap(t, g, "attention", "only")),
            "opd",
            1,
            "percent",
        ),
        f.each(
            c,
            "gain from one middle MLP − from one outer MLP (OPD)",
            f.measured(lambda t, g: window(t, g, "mlp", middle) - window(t, g, "mlp", ends)),
            "opd",
            1,
            "percent",
        ),
        f.compare(
            d,
            "share of ‖ΔW‖² in the first and last layer",
            f.run(lambda run: layer_share(run["layers"], lambda i, count: i in (0, count - 1))),
            -1,
            "percent",
        ),
        *(f.compare(e, label, f.metric(name), side, unit) for name, (label, side, unit) in metrics.items()),
        *(f.compare(h, label, f.metric(name), 1, "percent") for name, label in early.items()),
        f.each(
            h,
            "path of u1: variance in a plane beyond a random walk (OPD)",
            {
                g: [x - y for x, y in zip(f.metric("u1_evr")[g], f.metric("u1_evr_null_mean")[g], strict=True)]
                for g in ("opd", "rl")
            },
            "opd",
            1,
            "percent",
        ),
        f.each(n, f"share of the gain at step {EARLY}, β = 0 (as it is)", f.measured(beta(0.0)), "opd", 1, "percent"),
        f.each(n, f"share of the gain at step {EARLY}, β = 1", f.measured(beta(1.0)), "opd", 1, "percent"),
        f.each(
            n,
            "β = 1: share of the gain − 80 % (OPD)",
            {g: [v - 0.8 for v in values] for g, values in f.measured(beta(1.0)).items()},
            "opd",
            1,
            "percent",
        ),
        f.each(LONGER, f"best β by accuracy − by KL at step {EARLY} (OPD)", f.measured(overshoot), "opd", 1),
        *(
            f.each(
                k,
                f"share of the gain from the top {p:g} % of the matrices, shared norm, the rest trained (OPD)",
                f.measured(rank("top", p)),
                "opd",
                1,
                "percent",
            )
            for p in (1, 5, 20)
        ),
        f.each(
            k,
            "share of the gain from the bottom 50 % of the matrices, beyond embeddings alone (OPD)",
            f.measured(lambda t, g: rank("bottom", 50)(t, g) - swap(t, g, "embedding", "only")),
            "opd",
            0,
            "percent",
            margin=0.05,
        ),
        f.compare(k, "top 1 %, shared norm: OPD − RL", f.measured(rank("top", 1)), 1, "percent"),
        f.each(
            r,
            "change in accuracy by a random move of the same norm (OPD's)",
            f.measured(random_change),
            "opd",
            0,
            "percent",
            margin=0.02,
        ),
        *linearity_rows(f),
    ]


def page_table(families: Mapping[str, Any]) -> str:
    """One Markdown table per family.

    ° marks a value that differs from zero at 5 %, but not after Holm's correction.
    """
    text, rejected = [], iter(holm([p_value(row["test"]) for family in families.values() for row in family["rows"]]))
    for name, family in families.items():
        text += [
            f"### {name}",
            "",
            "| claim | measured | OPD | RL | tested value | verdict |",
            "|---|---|---|---|---|---|",
        ]
        for row in family["rows"]:
            cells = [written(row[which], row["unit"]) for which in ("opd", "rl", "test")]
            mark = "" if next(rejected) or p_value(row["test"]) >= 0.05 else " °"
            text.append(f"| {row['claim']} | {row['quantity']} | {' | '.join(cells)} | **{row['verdict']}**{mark} |")
        text.append("")
    return "\n".join(text)


def p_value(estimate: Mapping[str, Any]) -> float:
    """Two-sided p of "the mean over seeds is 0", from a mean and its Student interval."""
    from scipy import stats

    half, freedom = (estimate["high"] - estimate["low"]) / 2, estimate["n"] - 1
    return float(2 * stats.t.sf(abs(estimate["mean"]) / half * stats.t.ppf(0.975, freedom), freedom)) if half else 0.0


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Hypotheses rejected by Holm's step-down procedure at a family-wise error of `level`."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def tests_table(families: Mapping[str, Any]) -> str:
    """Numbers of tested values and of those that differ from zero, tasks, seeds and prompts."""
    rows = [row for family in families.values() for row in family["rows"]]
    p_values = [p_value(row["test"]) for row in rows]
    seeds = {len(family["seeds"]) for family in families.values()}
    cells = {
        "tested values": len(rows),
        "differ from 0 at 5 % each": sum(p < 0.05 for p in p_values),
        "differ from 0 after Holm's correction": sum(holm(p_values)),
        "tasks": len(families),
        "seeds per task": "–".join(str(count) for count in sorted(seeds)),
        "held-out prompts, the same for all seeds": PROMPTS,
        "largest standard error of an accuracy from the choice of prompts": (
            f"{100 * math.sqrt(0.25 / PROMPTS):.1f} points"
        ),
        "value of every seed stored in the JSON": "yes" if all("values" in row["test"] for row in rows) else "no",
    }
    return "\n".join(
        ["| quantity | value |", "|---|--:|", *(f"| {name} | {value} |" for name, value in cells.items())]
    )


def measure(root: Path, out: Path, *, figures: bool) -> None:
    """Write docs/dynamics/FAMILY.json from the tables of a family's runs.

    With `figures`, also copy the figures of the page.
    """
    family = Family(root)
    content = {"seeds": family.seeds, "rows": [row.to_row() for row in rows_of(family)]}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / f"{root.name}.json", lambda path: path.write_text(text))
    if figures:
        for figure in FIGURES:
            shutil.copy(root / "analysis" / "figures" / f"{figure}.png", out / f"{figure}.png")
        for figure in INTERVENTION_FIGURES:
            source = root / f"interventions-{family.seeds[0]}" / "figures" / f"{figure}.png"
            shutil.copy(source, out / f"intervention_{figure}.png")


def published(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The JSON of each family."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["chain_sum", "spell_backward"])
    parser.add_argument("--runs", type=Path, default=Path("runs/dynamics"))
    parser.add_argument(
        "--redraw", action="store_true", help="only rewrite the page's tables from docs/dynamics/*.json"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    folder, page = arguments.out / "dynamics", arguments.out / "dynamics.md"
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.redraw:
        for name in arguments.families:
            measure(arguments.runs / name, folder, figures=name == arguments.families[0])
    families = published(folder, arguments.families)
    rewrite(page, {"tests": tests_table(families), "tables": page_table(families)})


if __name__ == "__main__":
    main()
