"""`analyze` end to end on tiny checkpoints: nothing left out, values right, resumable, bad input
refused untouched.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_checkpoints import (
    STEPS,
    K,
    save_base,
    save_tensors,
    save_trained,
    save_trajectory,
    tensors_of,
    trained,
)

from effopd.analysis import measure
from effopd.analysis.analyze import analyze
from effopd.analysis.plan import name_runs
from effopd.analysis.tables import TABLES, read_table
from effopd.errors import EffOPDError
from effopd.report.dynamics_figures import draw
from effopd.weights import reader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ALWAYS = {"parameters", "frobenius_norm", "share_of_total"}
ENTRIES = {
    "bf16_unchanged_share", "update_density", "max_abs_update", "relative_norm", "low_magnitude_overlap",
    "low_magnitude_overlap_chance", "rounding_noise_to_update",
}  # fmt: skip
SPECTRUM = {
    "rows", "columns", "spectral_norm", "spectral_to_frobenius", "stable_rank", "effective_rank",
    "effective_rank_noise_floor", "top1pct_norm_ratio",
}  # fmt: skip
EMBEDDING = {"row_cosine_mean", "row_cosine_min", "rows_moved_share"}
BASE = {f"base_rotation_{side}_{kind}_degrees" for side in ("left", "right") for kind in ("max", "mean")}
BASE |= {"base_rotation_bound_degrees", "principal_overlap", "base_spectral_shift"}
PATH = {"u1_evr", "u1_evr_null_mean", "u1_evr_null_p"}
READINGS = {f"{side}_{name}" for side in ("left", "right") for name in ("cosine", "overlap", "angle_max")}


def table(done, name):
    return pd.read_parquet(done.tables[name])


def test_columns_are_exact_and_csv_says_the_same(done):
    for name, columns in TABLES.items():
        frame = table(done, name)
        assert list(frame.columns) == list(columns)
        text = pd.read_csv(done.out / f"{name}.csv", float_precision="round_trip")
        assert list(text.columns) == list(columns) and len(text) == len(frame)
        np.testing.assert_array_equal(text.value, frame.value)
        assert text.matrix.tolist() == frame.matrix.tolist()
    assert list(TABLES["matrices"]) == ["run", "step", "layer", "module", "matrix", "metric", "value"]
    assert list(TABLES["subspaces"]) == [
        "run", "step", "layer", "module", "matrix", "reference", "metric", "k", "value",
    ]  # fmt: skip


def test_runs_of_one_label_are_seeds(done):
    assert table(done, "matrices").run.unique().tolist() == ["opd#0", "opd#1", "rl"]
    assert {name: run["group"] for name, run in done.summary["runs"].items()} == {
        "opd#0": "opd", "opd#1": "opd", "rl": "rl",
    }  # fmt: skip
    assert done.summary["groups"]["opd"]["interval_over"] == "seeds"
    assert done.summary["groups"]["rl"]["interval_over"] == "matrices"
    assert [run for run, _, _ in name_runs({"a": "x", "b": ["y"], "c": ["z", "w"]})] == ["a", "b", "c#0", "c#1"]


def test_every_part_has_every_metric_at_every_snapshot(done, folders):
    frame = table(done, "matrices")
    stored = tensors_of(folders / "base")
    sizes = frame[(frame.run == "opd#0") & (frame.step == 8) & (frame.metric == "parameters")]
    assert sizes.value.sum() == sum(w.numel() for w in stored.values())  # tied: no lm_head in the file
    assert len(sizes) == len(stored)
    places = ["layer", "module", "matrix"]
    for (run, step), snapshot in frame.groupby(["run", "step"], dropna=False):
        last = (run, step) in (("opd#0", 8), ("opd#1", 8)) or run == "rl"
        for (_, module, _), rows in snapshot.groupby(places, dropna=False):
            is_matrix = "rows" in set(rows.metric)
            assert is_matrix == (module != "norm")
            expected = ALWAYS | ENTRIES | (SPECTRUM if is_matrix else set())
            expected |= EMBEDDING if module == "embedding" else set()
            expected |= BASE if last and is_matrix else set()
            expected |= PATH if last and is_matrix and run != "rl" else set()
            assert sorted(rows.metric) == sorted(expected)
        assert len(snapshot.groupby(places, dropna=False)) == len(stored)
    assert sorted(frame[frame.run == "opd#0"].step.unique()) == list(STEPS)
    assert frame[frame.run == "rl"].step.isna().all()
    assert frame[frame.module == "embedding"].layer.isna().all()


def test_shares_add_up_and_a_snapshot_at_rest_is_undefined_not_wrong(done):
    frame = table(done, "matrices")
    shares = frame[frame.metric == "share_of_total"].groupby(["run", "step"], dropna=False).value
    total = shares.sum(min_count=1)
    assert total[("opd#0", 0)] != total[("opd#0", 0)]
    moved = total.dropna()
    assert len(moved) == 2 * (len(STEPS) - 1) + 1
    np.testing.assert_allclose(moved, 1.0)
    rest = frame[(frame.step == 0)].groupby("metric").value
    assert (rest.max()[["frobenius_norm", "spectral_norm", "max_abs_update"]] == 0).all()
    assert (rest.min()["bf16_unchanged_share"]) == 1
    for metric in ("effective_rank", "stable_rank", "low_magnitude_overlap"):
        assert rest.count()[metric] == 0
    subspaces = table(done, "subspaces")
    rest = subspaces[(subspaces.step == 0) & (subspaces.metric != "singular_value")]
    assert rest.value.isna().all() and len(rest)


def delta_of(folders, run, step):
    name = "model.layers.1.mlp.down_proj.weight"
    start = tensors_of(folders / "base")[name].double()
    return (
        tensors_of(folders / run / "trajectory" / f"step-{step:06d}")[name].double() - start
    ).numpy(), start.numpy()


def test_values_equal_numpy(done, folders):
    early, base = delta_of(folders, "opd-1", 2)
    final, _ = delta_of(folders, "opd-1", 8)
    other, _ = delta_of(folders, "opd-2", 8)
    u, s, vt = np.linalg.svd(early)
    v, (u_T, _, vt_T), (u_o, _, _) = vt.T, np.linalg.svd(final), np.linalg.svd(other)
    frame = table(done, "matrices")
    frame = frame[(frame.run == "opd#0") & (frame.layer == 1) & (frame.matrix == "down")]
    at = frame[frame.step == 2].set_index("metric").value
    assert at["frobenius_norm"] == pytest.approx(np.linalg.norm(early), rel=1e-12)
    assert at["spectral_norm"] == pytest.approx(s[0], rel=1e-12)
    assert at["effective_rank"] == pytest.approx(math.exp(-(s / s.sum() * np.log(s / s.sum())).sum()), rel=1e-12)
    assert at["relative_norm"] == pytest.approx(np.linalg.norm(early) / np.linalg.norm(base), rel=1e-9)
    sigma, sigma0 = (np.linalg.svd(w, compute_uv=False) for w in (base + final, base))
    shift = np.linalg.norm(sigma - sigma0) / np.linalg.norm(sigma0)
    assert frame[frame.step == 8].set_index("metric").value["base_spectral_shift"] == pytest.approx(shift, rel=1e-9)

    rows = table(done, "subspaces")
    rows = rows[(rows.run == "opd#0") & (rows.layer == 1) & (rows.matrix == "down")]
    own = rows[(rows.step == 2) & (rows.reference == "final")].set_index(["metric", "k"]).value
    for k in range(1, K + 1):
        cosines = np.linalg.svd(u[:, :k].T @ u_T[:, :k], compute_uv=False)
        assert own["left_cosine", k] == pytest.approx(abs(u[:, k - 1] @ u_T[:, k - 1]), abs=1e-6)
        assert own["left_overlap", k] == pytest.approx((cosines**2).mean(), abs=1e-6)
        assert own["left_angle_max", k] == pytest.approx(math.degrees(math.acos(cosines.min())), abs=1e-4)
        assert own["right_overlap", k] == pytest.approx(((v[:, :k].T @ vt_T.T[:, :k]) ** 2).sum() / k, abs=1e-6)
        assert own["singular_value", k] == pytest.approx(s[k - 1], rel=1e-12)
        assert 0 <= own["angle_bound", k] < 1e-3
    seeds = rows[rows.reference == "opd#1"].set_index(["metric", "k"]).value
    assert seeds["left_overlap", 2] == pytest.approx(((u_T[:, :2].T @ u_o[:, :2]) ** 2).sum() / 2, abs=1e-6)
    first, _ = delta_of(folders, "opd-1", 1)
    heat = rows[rows.reference == "first"].set_index("metric")
    assert heat.value["left_cosine"] == pytest.approx(abs(np.linalg.svd(first)[0][:, 0] @ u_T[:, 0]), abs=1e-6)
    assert set(heat.k) == {1} and set(heat.step) == {8}


def test_subspaces_cover_every_matrix_snapshot_and_pair(done):
    frame = table(done, "subspaces")
    matrices = 2 * 7 + 1
    own = frame[frame.reference == "final"]
    assert set(own.metric) == READINGS | {"singular_value", "angle_bound"}
    assert len(own) == 8 * K * matrices * (2 * len(STEPS) + 1)
    last = own[(own.step == 8) & own.metric.str.endswith("overlap")]
    np.testing.assert_allclose(last.value, 1.0, atol=1e-6)
    pairs = frame[~frame.reference.isin(["final", "first"])]
    assert pairs.groupby(["run", "reference"]).size().to_dict() == dict.fromkeys(
        [("opd#0", "opd#1"), ("opd#0", "rl"), ("opd#1", "rl")], 7 * K * matrices
    )
    assert set(frame[frame.reference == "first"].run) == {"opd#0", "opd#1"}


def test_directions_and_embeddings(done):
    frame = table(done, "directions")
    assert set(frame.metric) == {"pc1", "pc2", "tsne1", "tsne2"} and set(frame.run) == {"opd#0", "opd#1"}
    assert sorted(frame.step.unique()) == list(STEPS[1:])  # at step 0 there is no direction
    assert len(frame[frame.metric == "pc1"]) == 2 * 4 * 15
    pictured = set(zip(*(frame[frame.metric == "tsne1"][c] for c in ("layer", "matrix")), strict=True))
    assert pictured == {(0, "o"), (0, "down"), (1, "o"), (1, "down")}
    points = table(done, "embeddings")
    assert set(points.metric) == {f"{kind}_pc{axis}" for kind in ("base", "trained") for axis in (1, 2)}
    assert len(points) == 3 * 4 * 64 and points.value.notna().all()


def test_summary_is_strict_json_and_says_what_it_averages(done):
    text = (done.out / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in summary.json"))
    assert summary == done.summary
    assert "split first" in summary["averaging"] and torch.__version__.startswith(summary["versions"]["torch"])
    frame = table(done, "matrices")
    rows = frame[(frame.run == "rl") & frame.module.isin(["attention", "mlp"]) & (frame.metric == "stable_rank")]
    rl = summary["runs"]["rl"]
    assert rl["metrics"]["stable_rank"]["mean"] == pytest.approx(rows.value.mean())
    assert rl["metrics"]["stable_rank"]["n"] == 14 == summary["parts"]["averaged"]
    assert rl["trajectory"] is None and not rl["zero_update"]
    norms = frame[(frame.run == "rl") & (frame.metric == "frobenius_norm")]
    assert rl["update_norm"] == pytest.approx(np.linalg.norm(norms.value))
    assert sum(module["share"] for module in rl["modules"].values()) == pytest.approx(1)
    assert [layer["layer"] for layer in rl["layers"]] == [0, 1]
    down = norms[(norms.layer == 1) & (norms.module == "mlp")].value
    assert rl["layers"][1]["mlp_norm"] == pytest.approx(np.linalg.norm(down))
    opd = summary["runs"]["opd#0"]["trajectory"]
    assert opd["steps"] == [1, 2, 4, 8] and opd["early_step"] == 1
    assert opd["u1_variance_explained"]["random_walk"]["n"] == 14
    overlap = summary["runs"]["opd#0"]["metrics"][f"early_left_overlap_{K}"]["mean"]
    assert summary["groups"]["opd"]["metrics"][f"early_left_overlap_{K}"]["n"] == 2 and 0 < overlap < 1
    (pair,) = summary["differences"]
    assert (pair["a"], pair["b"]) == ("opd", "rl") and pair["metrics"]["stable_rank"]["over_seeds"] is None
    assert {(a["run"], a["reference"], a["same_group"]) for a in summary["agreement"]} == {
        ("opd#0", "opd#1", True), ("opd#0", "rl", False), ("opd#1", "rl", False),
    }  # fmt: skip


def test_groups_of_metrics_can_be_left_out_and_norms_agree(done, folders, tmp_path):
    lean = analyze(folders / "base", {"rl": folders / "rl"}, tmp_path / "lean", metrics=["norms"])
    frame = table(lean, "matrices")
    assert set(frame.metric) == ALWAYS | {"rows", "columns"}
    assert not len(table(lean, "subspaces")) and not len(table(lean, "directions"))
    full = table(done, "matrices")
    full = full[(full.run == "rl") & (full.metric == "frobenius_norm")].value
    np.testing.assert_allclose(frame[frame.metric == "frobenius_norm"].value, full, rtol=1e-12)
    some = analyze(folders / "base", {"rl": folders / "rl"}, tmp_path / "some", metrics=["entries", "embeddings"])
    assert set(table(some, "matrices").metric) == ALWAYS | {"rows", "columns"} | ENTRIES | EMBEDDING


def test_base_against_itself_is_a_zero_update(folders, tmp_path):
    done = analyze(folders / "base", {"same": folders / "base"}, tmp_path / "out", k=2)
    run = done.summary["runs"]["same"]
    assert run["zero_update"] and run["update_norm"] == 0
    assert run["metrics"]["effective_rank"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert run["modules"]["mlp"]["share"] is None
    assert any("update is zero" in note for note in done.summary["notes"])
    rotation = table(done, "matrices").query("metric == 'base_rotation_left_max_degrees'").value
    assert (rotation < 1e-4).all()


def test_a_run_from_another_base_is_noticed(folders, tmp_path):
    other = save_base(tmp_path / "other", seed=9)
    done = analyze(other, {"opd": folders / "opd-1"}, tmp_path / "out", k=2, metrics=["norms"])
    assert any("did not start from this base" in note for note in done.summary["notes"])


def test_seeds_of_unequal_length_are_noticed(folders, tmp_path):
    short = save_trajectory(tmp_path / "short", folders / "base", 5, steps=(0, 1, 2))
    done = analyze(folders / "base", {"opd": [folders / "opd-1", short]}, tmp_path / "out", k=2, metrics=["norms"])
    assert any("end at different steps (8, 2)" in note for note in done.summary["notes"])


def test_steps_select_snapshots(folders, tmp_path):
    run = {"opd": folders / "opd-1"}
    done = analyze(folders / "base", run, tmp_path / "out", k=2, steps=[2, 8])
    assert done.summary["runs"]["opd"]["steps"] == [2, 8]
    assert sorted(table(done, "matrices").step.unique()) == [2, 8]
    assert not PATH & set(table(done, "matrices").metric)  # two points are no path
    with pytest.raises(EffOPDError, match="3"):
        analyze(folders / "base", run, tmp_path / "none", steps=[3, 8])
    assert not (tmp_path / "none").exists()


def test_tensors_are_read_once_a_snapshot_and_the_base_once(folders, tmp_path, monkeypatch):
    reads, real = [], reader.read_tensor
    monkeypatch.setattr(
        reader, "read_tensor", lambda stored, name: reads.append((stored.file, name)) or real(stored, name)
    )
    analyze(folders / "base", trained(folders), tmp_path / "out", k=2)
    assert len(reads) == len(set(reads)) == len(tensors_of(folders / "base")) * (2 * len(STEPS) + 2)


def test_directions_beyond_the_rank_are_undefined():
    b, a = torch.randn(12, 2).double(), torch.randn(2, 9).double()
    whole = measure.Directions.of(measure.leading_directions(b @ a, k=5))
    factors = measure.Directions.of(measure.leading_of_factors(b, a, 5))
    assert whole.rank == factors.rank == 2
    for other in (whole, factors):
        values = measure.compare(whole, other, 5)
        assert values["left_overlap"][:2] == pytest.approx([1, 1], abs=1e-6)
        assert all(math.isnan(v) for name in READINGS for v in values[name][2:])
    assert all(math.isnan(v) for v in measure.compare(whole, None, 3)["right_cosine"])


def test_directions_without_a_proof_are_undefined():
    """Two equal singular values: u1 and u2 are arbitrary, their plane is not."""
    twins = measure.Directions.of(measure.leading_directions(torch.diag(torch.tensor([2.0, 2.0, 1.0])), k=3))
    assert twins.rank == 3 and not twins.has_first
    values = measure.compare(twins, twins, 3)
    assert values["angle_bound"][0] == 90.0 and max(values["angle_bound"][1:]) < 1e-4
    for side in ("left", "right"):
        assert [math.isnan(v) for v in values[f"{side}_overlap"]] == [True, False, False]
        assert [math.isnan(v) for v in values[f"{side}_angle_max"]] == [True, False, False]
        assert [math.isnan(v) for v in values[f"{side}_cosine"]] == [True, True, False]


def test_updates_of_single_entries_and_repeated_values_are_analyzed(tmp_path):
    """Tables, summary and figures with undefined directions."""
    base = save_base(tmp_path / "base")
    for i, step in enumerate((1, 2, 4)):
        tensors = tensors_of(base)
        tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] += 0.1 * (i + 1)
        tensors["model.layers.1.mlp.up_proj.weight"] += 0.1 * (i + 1) * torch.eye(32, 16)
        save_tensors(tmp_path / "run" / "trajectory" / f"step-{step:06d}", tensors, base)
    done = analyze(base, {"opd": tmp_path / "run"}, tmp_path / "out", k=3)
    rows = read_table(done.tables["subspaces"].with_suffix(""))
    final = rows[(rows["metric"] == "left_cosine") & (rows["reference"] == "final") & (rows["step"] == 2)]
    one, eye = (final[final["matrix"] == name].set_index("layer")["value"] for name in ("q", "up"))
    assert one[0].tolist()[0] == pytest.approx(1) and all(map(math.isnan, one[0].tolist()[1:]))
    assert all(map(math.isnan, eye[1].tolist()))
    assert done.summary["groups"]["opd"]["update_norm"]["mean"] == pytest.approx(0.3 * 17**0.5, rel=1e-6)
    assert draw(done.out)


def tiny_models():
    import transformers as hf

    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "head_dim": 8}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return {
        "fused": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**small)),
        "transposed": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)),
        "experts": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**small, **experts)),
    }


@pytest.mark.parametrize("kind", ["fused", "transposed", "experts"])
def test_other_layouts_are_covered_and_fused_matrices_counted_apart(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    tiny_models()[kind]().save_pretrained(tmp_path / "base")
    run = save_trained(tmp_path / "trained", tmp_path / "base", 1)
    reads, real = [], reader.read_tensor
    monkeypatch.setattr(reader, "read_tensor", lambda stored, name: reads.append(stored) or real(stored, name))
    done = analyze(tmp_path / "base", {"a": run}, tmp_path / "out", k=2)
    stored = tensors_of(tmp_path / "base")
    assert len(reads) == 2 * len(stored), "a tensor of several parts is read once"
    frame = table(done, "matrices")
    assert frame[frame.metric == "parameters"].value.sum() == sum(w.numel() for w in stored.values())
    assert frame[frame.metric == "share_of_total"].value.sum() == pytest.approx(1)
    averaged = set(frame[(frame.metric == "spectral_norm") & frame.module.isin(["attention", "mlp"])].matrix)
    expected = {
        "fused": {"q", "k", "v", "o", "gate", "up", "down"},
        "transposed": {"q", "k", "v", "o", "up", "down"},
        "experts": {
            "q",
            "k",
            "v",
            "o",
            "router",
            *(f"experts.{i}.{m}" for i in range(3) for m in ("gate", "up", "down")),
        },
    }[kind]
    assert averaged == expected and done.summary["parts"]["averaged"] == 2 * len(expected)
    changed = {n: w.double() - stored[n].double() for n, w in tensors_of(run).items()}
    total = math.sqrt(sum(float(d.square().sum()) for d in changed.values()))
    assert done.summary["runs"]["a"]["update_norm"] == pytest.approx(total, rel=1e-9)
    if kind == "fused":
        keys = changed["model.layers.1.self_attn.qkv_proj.weight"][16:24]
        row = frame[(frame.layer == 1) & (frame.matrix == "k") & (frame.metric == "spectral_norm")]
        assert row.value.item() == pytest.approx(float(torch.linalg.matrix_norm(keys, 2)), rel=1e-9)


def test_an_adapter_measures_like_its_merged_model(folders, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders / "base"),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    runs = {"adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    done = analyze(folders / "base", runs, tmp_path / "out", k=4)
    frame = table(done, "matrices")
    frame = frame[frame.module.isin(["attention", "mlp"])]
    # what merging rounds away shows in the tail of a spectrum and in near-zero changes
    blurred = [
        "effective_rank",
        "max_abs_update",
        "rounding_noise_to_update",
        "update_density",
        "low_magnitude_overlap",
    ]
    wide = frame[~frame.metric.isin(blurred)].pivot(index=["layer", "matrix", "metric"], columns="run", values="value")
    np.testing.assert_allclose(wide.adapter, wide.merged, rtol=1e-3, atol=1e-6)
    rows = table(done, "subspaces")
    rows = rows[(rows.reference == "merged") & (rows.matrix == "down") & (rows.metric == "left_overlap")]
    assert (rows[rows.k <= 3].value > 0.999).all() and rows[rows.k == 4].value.isna().all()
    untouched = frame[(frame.run == "adapter") & (frame.matrix == "up")].set_index("metric").value
    assert (untouched["frobenius_norm"] == 0).all() and untouched["stable_rank"].isna().all()
