"""`effopd intervene linearity`: rows of the predicted and the true KL, on tiny models."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from transformers import AutoModelForCausalLM

from effopd.commands.intervene import run_intervene
from effopd.distill.divergence import reverse_kl_of_completions
from effopd.errors import ConfigError
from effopd.extrapolate.live_weights import LiveWeights
from effopd.interventions.editable_model import EditableModel
from effopd.interventions.kinds import INTERVENTIONS
from effopd.interventions.linearity import Line, Rollouts
from effopd.interventions.measure import Evaluator
from effopd.interventions.options import InterventionOptions
from effopd.interventions.results import InterventionResults
from effopd.interventions.sources import Sources
from effopd.tasks.generate import generate
from effopd.tasks.sampling import Sampling

OPTIONS = InterventionOptions(scales=[-0.5, 2, 8], known_scales=[0, 1])
SAMPLING = Sampling(n=2, max_new_tokens=5, batch_size=7)
TASK = ["--task", "testbed:chain_sum", "--eval_size", "12", "--max_new_tokens", "6"]


def step(folder, size, part=""):
    """The base with the parameters named by `part` moved along one direction by `size`."""
    model, g = make_model(0), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            move = torch.randn(p.shape, generator=g)
            if part in name:
                p.add_(size * move)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, teacher/, a run whose every parameter moves, and one whose last norm moves alone."""
    root = tmp_path_factory.mktemp("linearity")
    make_tokenizer().save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "teacher")
    make_model(0).save_pretrained(root / "base")
    make_model(1).save_pretrained(root / "teacher")
    for name, part in (("opd", ""), ("norm", "model.norm")):
        for t in (0, 2, 4):
            step(root / name / "trajectory" / f"step-{t:06d}", 0.01 * t if part == "" else 0.2 * t, part)
    return root


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """Results of both runs, the live model, its sources and evaluator."""
    sources = Sources(folder / "base", {"opd": [folder / "opd"], "norm": [folder / "norm"]})
    model = EditableModel(load(folder / "base"), sources)
    evaluator = Evaluator(model.model, make_tokenizer(), make_task(12), SAMPLING, load(folder / "teacher"))
    results = InterventionResults(tmp_path_factory.mktemp("out"), {"interventions": {"linearity": {}}})
    results.begin()
    kind = INTERVENTIONS["linearity"]
    points = kind.points(sources.point_inputs(OPTIONS))
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    kind.measure(points, model, sources, evaluator, results)
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    return results, points, model, sources, evaluator


def test_the_rows(measured):
    results, points, *_ = measured
    table = results.table()
    assert list(table["point"]) == [point.id for point in points] and len(table) == 2 * 2 * 2 * 5
    assert set(table["step"]) == {2, 4} and sorted(set(table["scale"])) == [-0.5, 0, 1, 2, 8]
    known = table[table["known"] == 1]
    assert set(known["scale"]) == {0.0, 1.0}
    assert known["kl_ratio"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert (known["kl_ratio_high"] - known["kl_ratio_low"]).max() < 1e-4
    assert ((table["kl_low"] <= table["kl"]) & (table["kl"] <= table["kl_high"])).all() and (table["n"] == 12).all()
    assert table["accuracy_change"].isna().all()
    curved = table[(table["run"] == "opd") & (table["scale"] == 8)]
    assert (abs(curved["kl_ratio"] - 1) > 1e-3).all()  # all layers move
    straight = table[table["run"] == "norm"]
    assert straight["kl_ratio"].to_numpy() == pytest.approx(1, abs=1e-4)  # only the last norm moves


def test_the_anchor_is_the_step_before_or_the_base(measured):
    table = measured[0].table()
    first, second = (table[(table["run"] == "norm") & (table["step"] == t) & (table["scale"] == 0)] for t in (2, 4))
    assert first["delta_norm"].nunique() == 1  # before step 2 is step 0, the base
    of = second.set_index("anchor")["delta_norm"]
    assert of["base"] == pytest.approx(2 * of["previous"], rel=1e-4)
    assert of["base"] == pytest.approx(second["update_norm"].iloc[0], rel=1e-4)


def test_the_true_kl_is_that_of_the_edited_model_on_rollouts_of_the_step(measured, folder):
    _, _, _, _, evaluator = measured
    student = load(folder / "opd" / "trajectory" / "step-000004")
    task = evaluator.task
    rows = generate(student, evaluator.tokenizer, [e.prompt for e in task.examples], SAMPLING, vocab_size=64)
    base = dict(load(folder / "base").named_parameters())
    with torch.no_grad():
        for name, p in student.named_parameters():
            p.add_(2 * (p - base[name]))
    sums, counts = reverse_kl_of_completions(
        student, evaluator.teacher, [r.prompt_ids for r in rows], [r.completion_ids for r in rows],
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    row = measured[0].rows["linearity/opd/anchor=base,step=4,scale=2"]["measured"]
    assert row["kl"] == pytest.approx(sum(sums) / sum(counts), rel=1e-4) and row["tokens"] == sum(counts)


def test_the_best_scales_of_a_straight_line_agree(measured):
    table = measured[0].table()
    straight = table[(table["run"] == "norm") & (table["scale"] == 0)]
    for _, row in straight.iterrows():
        assert row["best_predicted"] == pytest.approx(row["best_true"], rel=0.02, abs=0.02)
        assert row["kl_at_best"] <= row["kl"]
        assert math.isnan(row["gain_share"]) or row["gain_share"] == pytest.approx(1, abs=0.02)


def test_nothing_is_measured_twice_and_a_missing_row_is_made_again(measured):
    results, points, model, sources, evaluator = measured
    path = results.root / "results.jsonl"
    before = path.read_text()
    kind = INTERVENTIONS["linearity"]
    kind.measure(points, model, sources, evaluator, results)
    assert path.read_text() == before
    lines = before.splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    again = InterventionResults(results.root, {"interventions": {"linearity": {}}})
    kind.measure(points, model, sources, evaluator, again)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [point.id for point in points]
    new, old = (json.loads(text)["measured"] for text in (path.read_text().splitlines()[-1], lines[-1]))
    assert new == pytest.approx(old, nan_ok=True)


def test_rows_of_a_line_are_not_those_of_a_graded_model(measured):
    results = measured[0]
    assert results.of_model("base") is None and all(
        results.of_model(row["model"]) is None for row in results.rows.values()
    )


def test_weights_are_restored_if_a_forward_fails(measured, monkeypatch):
    _, _, model, _, evaluator = measured
    weights = LiveWeights(model.model, "all")
    rollouts = Rollouts.sampled(evaluator)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    with torch.no_grad():
        for tensor in weights.state_dict().values():
            tensor.mul_(0.9)

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("effopd.interventions.linearity.RayKL.best", fail)
    with pytest.raises(KeyboardInterrupt):
        Line(evaluator, weights, rollouts).measure([0.0, 1.0, 4.0], [0.0, 1.0])
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def test_a_scale_that_overflows_has_no_kl(measured):
    _, _, model, _, evaluator = measured
    weights = LiveWeights(model.model, "all")
    with torch.no_grad():
        for tensor in weights.state_dict().values():
            tensor.mul_(-1e36)
    rows = Line(evaluator, weights, Rollouts.sampled(evaluator)).measure([0.0, 1e-36, 1e6], [0.0, 1e-36])
    assert math.isnan(rows[2]["kl"]) and math.isfinite(rows[1]["kl"]) and math.isfinite(rows[0]["best_true"])


def test_the_command(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"  # without answers: nothing is graded
    rows.write_text("".join(json.dumps({"problem": f"{i}+1"}) + "\n" for i in range(30)))
    out = tmp_path / "out"
    flags = ["linearity", "--base", str(folder / "base"),
             "--trained", f"opd={folder / 'opd'}", f"opd={folder / 'norm'}",
             "--trained", f"rl={folder / 'norm'}", "--steps", "2", "4", "--teacher", str(folder / "teacher"),
             "--task", f"math:{rows}", "--eval_size", "4", "--max_new_tokens", "4", "--scales", "2", "8",
             "--anchors", "previous", "--out", str(out)]  # fmt: skip
    assert run_intervene(flags) == 0
    printed = capsys.readouterr().out
    assert "linearity: 4 prompts, hidden states known at s = 0 and 1" in printed and "predicted/true at 8" in printed
    assert (out / "figures" / "linearity.png").stat().st_size > 10_000
    frame = pd.read_csv(out / "results.csv")
    assert set(frame["run"]) == {"opd#0", "opd#1", "rl"} and set(frame["intervention"]) == {"linearity"}
    assert run_intervene(flags) == 0 and "already in" in capsys.readouterr().out


@pytest.mark.parametrize("runs", [["teacher"], ["teacher", "opd"]])
def test_a_checkpoint_without_a_step_has_a_figure_and_a_page(folder, tmp_path, runs):
    flags = ["linearity", "--base", str(folder / "base"), "--teacher", str(folder / "teacher"), *TASK,
             "--scales", "2", "--anchors", "base", "--out", str(tmp_path / "out")]  # fmt: skip
    for name in runs:
        flags += ["--trained", f"{name}={folder / name}"]
    assert run_intervene(flags) == 0
    assert (tmp_path / "out" / "figures" / "linearity.png").stat().st_size > 10_000
    assert "teacher" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--teacher is missing"),
        (["--teacher", "testbed:teacher", "--save_dir", "models"], "--save_dir: linearity measures models"),
        (["--teacher", "testbed:teacher", "--known_scales", "0"], "--known_scales: expected at least two"),
        (["--teacher", "testbed:teacher", "--known_scales", "1", "1"], "--known_scales: expected at least two"),
        (["--teacher", "testbed:teacher", "--scales", "inf"], "--scales: expected finite numbers"),
        (["--teacher", "testbed:teacher", "--scales", "1e39"], "--scales: expected numbers from -1e6 to 1e6"),
        (["--teacher", "testbed:teacher", "--anchors", "first"], "--anchors: expected previous or base, got 'first'"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["--base", "testbed:student", "--trained", "rl=testbed:teacher"]
    with pytest.raises(ConfigError, match=message):
        run_intervene(["linearity", *models, *TASK, *flags, "--out", "out"])
    assert not list(tmp_path.iterdir())
