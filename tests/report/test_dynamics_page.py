"""The tables of docs/dynamics.md are those of docs/dynamics/*.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import dynamics_page as module
import pages
import pytest

from effopd.common.statistics import student_t

ROOT = Path(__file__).parents[2]
NAMES = ("chain_sum", "spell_backward")


def row(values, claim=None, side=1):
    return module.Row(claim or module.LONGER, "β", values, [0.0] * len(values), values, side, "number").to_row()


def test_the_page_is_what_its_command_writes():
    page = (ROOT / "docs" / "dynamics.md").read_text()
    families = module.published(ROOT / "docs" / "dynamics", NAMES)
    blocks = {"tests": module.tests_table(families), "tables": module.page_table(families)}
    assert pages.with_blocks(page, blocks) == page
    for content in families.values():
        for r in content["rows"]:
            assert r["verdict"] == module.verdict(r["test"]["low"], r["test"]["high"], r["side"], r["margin"])


def test_a_row_keeps_the_value_of_every_seed():
    values = [0.2, 0.4, 0.4, 0.6, math.nan]
    found = json.loads(json.dumps(row(values), allow_nan=False))
    assert found["test"]["values"] == [0.2, 0.4, 0.4, 0.6, None] and found["test"]["n"] == 4
    assert found["test"]["mean"] == student_t(values).mean and found["verdict"] == "shown"


def test_the_table_of_tests_counts_what_the_json_holds():
    kept = {"seeds": [0, 1, 2], "rows": [row([0.2, 0.3, 0.2]), row([0.1, -0.1, 0.0])]}
    assert "| tested values | 2 |" in module.tests_table({"sums": kept})
    assert "| differ from 0 at 5 % each | 1 |" in module.tests_table({"sums": kept})
    assert "| value of every seed stored in the JSON | yes |" in module.tests_table({"sums": kept})
    del kept["rows"][0]["test"]["values"]
    assert "| value of every seed stored in the JSON | no |" in module.tests_table({"sums": kept})


def test_holm_and_the_p_value_agree_with_what_they_are_made_of():
    from scipy import stats

    values = [0.1, 0.3, 0.2, 0.5, 0.1]
    estimate = row(values)["test"]
    assert module.p_value(estimate) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert module.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert module.holm([0.04, 0.001]) == [True, True]


def interventions(seed: int) -> list[dict]:
    """A row for every point that the page reads, of both runs of a seed."""
    rows = [{"intervention": "reference", "run": "base", "accuracy": 0.3}]
    for i, run in enumerate(("opd", "rl")):
        end = 0.7 + 0.05 * i + 0.01 * seed
        own = [{"intervention": "reference", "accuracy": end}]
        own += [
            {"intervention": "trajectory", "step": s, "accuracy": 0.3 + s * (end - 0.3) / 16, "update_norm": s + i}
            for s in range(17)
        ]
        own += [
            {"intervention": "embedding", "change_from_trained": -0.02},
            {"intervention": "random", "accuracy_change": 0.001 * seed},
        ]
        own += [{"intervention": "swap", "unit": u, "side": "only", "accuracy": 0.35 + 0.05 * k}
                for k, u in enumerate(("embedding", "attention", "mlp"))]  # fmt: skip
        own += [{"intervention": "window", "module": "mlp", "center": c, "accuracy": 0.4 + 0.01 * c} for c in range(4)]
        own += [
            {"intervention": "norm_scaling", "step": 12, "beta": b, "accuracy": 0.4 + b / 10, "kl": (b - 0.5) ** 2}
            for b in (0.0, 0.5, 1.0)
        ]
        own += [{"intervention": "rank", "end": e, "percent": p, "accuracy": 0.5 + p / 1000} for e, p in
                (("top", 1), ("top", 5), ("top", 20), ("bottom", 50))]  # fmt: skip
        rows += [row | {"run": run} for row in own]
    return rows


def test_linearity_has_rows_once_it_was_measured():
    import pandas as pd

    rows = [
        {"intervention": "linearity", "run": run, "anchor": anchor, "step": step, "scale": s, "gain_share": 0.9,
         "kl_ratio": math.exp(size * s * (-1) ** step)}
        for run, size in (("opd", 0.01), ("rl", 0.02)) for anchor in ("previous", "base")
        for step in (4, 5) for s in (0.0, 2.0, 8.0)
    ]  # fmt: skip
    family = module.Family.__new__(module.Family)
    family.interventions = [pd.DataFrame(rows)] * 3
    two, eight, share = module.linearity_rows(family)
    assert two.opd == pytest.approx([0.02] * 3) and eight.rl == pytest.approx([0.16] * 3)
    assert eight.test == pytest.approx([-0.08] * 3) and share.test == pytest.approx([0.9] * 3)


def test_measuring_writes_the_value_of_every_seed(tmp_path):
    """The whole path from tables of runs to the JSON, on made-up tables."""
    import pandas as pd

    root, metrics = (
        tmp_path / "sums",
        ("spectral_norm", "spectral_to_frobenius", "effective_rank", "top1pct_norm_ratio"),
    )
    names = (
        *metrics,
        "early_left_overlap_1",
        "early_left_overlap_20",
        "early_right_overlap_16",
        "u1_evr",
        "u1_evr_null_mean",
    )
    runs = {
        f"{group}#{seed}": {
            "update_norm": 1.0 + seed / 10,
            "metrics": {name: {"mean": 0.5 + seed / 100} for name in names},
            "layers": [{"layer": layer, "share": 0.25} for layer in range(4)] + [{"layer": None, "share": 0.0}],
        }
        for group in ("opd", "rl")
        for seed in range(3)
    }
    (root / "analysis").mkdir(parents=True)
    (root / "analysis" / "summary.json").write_text(json.dumps({"runs": runs}))
    for seed in range(3):
        (root / f"interventions-{seed}").mkdir()
        pd.DataFrame(interventions(seed)).to_csv(root / f"interventions-{seed}" / "results.csv", index=False)
    module.measure(root, tmp_path, figures=False)
    (content,) = module.published(tmp_path, ["sums"]).values()
    published = module.published(ROOT / "docs" / "dynamics", NAMES)["chain_sum"]
    fields = ("claim", "quantity", "unit", "side", "margin")
    assert [[row[f] for f in fields] for row in content["rows"]] == [
        [row[f] for f in fields] for row in published["rows"]
    ]
    assert content["seeds"] == [0, 1, 2]
    for found in content["rows"]:
        for which in ("opd", "rl", "test"):
            values = found[which]["values"]
            assert len(values) == 3 and found[which]["mean"] == pytest.approx(student_t(values).mean)
    accuracy = content["rows"][0]
    assert accuracy["opd"]["values"] == pytest.approx([0.70, 0.71, 0.72]) and accuracy["test"][
        "values"
    ] == pytest.approx([-0.05] * 3)
