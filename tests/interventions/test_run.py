"""Interventions in memory: every edit is right, leaves no trace, and is measured once."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from effopd.common.statistics import bonett_price
from effopd.errors import CheckpointError, CompatibilityError, ConfigError, NonFiniteWeightsError, WeightsError
from effopd.interventions.editable_model import EditableModel, save_point
from effopd.interventions.kinds import INTERVENTIONS, reference_points
from effopd.interventions.measure import Evaluator, measure_points
from effopd.interventions.options import InterventionOptions
from effopd.interventions.results import InterventionResults
from effopd.interventions.sources import Sources
from effopd.tasks.sampling import Sampling

OPTIONS = InterventionOptions(
    alphas=[0, 0.3, 1], percents=[10, 100], betas=[0, 1, 1.6], random_seeds=[0], scales=[2.0]
)
EVERY_INTERVENTION = sorted(INTERVENTIONS)


def moved(seed: int, scale: float, base=None, dtype=torch.float32):
    """A copy of the base whose every parameter has moved."""
    model = make_model(0) if base is None else base
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, and two runs with steps 0, 2, 4; opd's is kept in float32, rl's in bfloat16."""
    root = tmp_path_factory.mktemp("intervention")
    make_model(0).save_pretrained(root / "base")
    for seed, (run, dtype) in enumerate((("opd", torch.float32), ("rl", torch.bfloat16)), start=1):
        make_model(0).save_pretrained(root / run / "trajectory" / "step-000000")
        for step in (2, 4):
            moved(seed, 0.01 * step, dtype=dtype).save_pretrained(root / run / "trajectory" / f"step-{step:06d}")
    return root


@pytest.fixture(scope="module")
def sources(folder):
    return Sources(folder / "base", {"opd": [folder / "opd"], "rl": [folder / "rl"]})


def load(path, dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.fixture(scope="module")
def live(folder, sources):
    return EditableModel(load(folder / "base"), sources)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- edits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("intervention", EVERY_INTERVENTION)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_point_is_undone_bit_for_bit(folder, sources, intervention, dtype):
    live = EditableModel(load(folder / "base", dtype), sources)
    before = weights(live.model)
    for point in INTERVENTIONS[intervention].points(sources.point_inputs(OPTIONS)):
        with live.at(point) as norm:
            assert equal(weights(live.model), before) == (norm == 0)
        assert equal(weights(live.model), before)
        with pytest.raises(KeyboardInterrupt), live.at(point):
            raise KeyboardInterrupt
        assert equal(weights(live.model), before)


def test_each_intervention_makes_the_models_it_promises(folder, sources, live):
    """Against the same formulas written with whole state dicts."""
    base, trained, early = (
        weights(load(folder / path)) for path in ("base", "opd/trajectory/step-000004", "opd/trajectory/step-000002")
    )
    d = {name: trained[name].double() - base[name].double() for name in base}
    e = {name: early[name].double() - base[name].double() for name in base}

    def low_rank(name):
        if ("self_attn" not in name and "mlp" not in name) or "norm" in name:
            return trained[name]
        u, s, vt = torch.linalg.svd(d[name], full_matrices=False)
        k = -(-len(s) // 10)
        return (base[name].double() + (u[:, :k] * s[:k]) @ vt[:k]).float()

    def stretched(name, beta):
        return base[name].double() + e[name] * (1 + beta * (d[name].norm() - e[name].norm()) / e[name].norm())

    expected = {
        "alpha/opd/alpha=0": lambda n: base[n],
        "alpha/opd/alpha=0.3": lambda n: (base[n].double() + 0.3 * d[n]).float(),
        "alpha/opd/alpha=1": lambda n: trained[n],
        "trajectory/opd/step=2": lambda n: early[n],
        "embedding/opd/replaced=embedding": lambda n: base[n] if "embed" in n else trained[n],
        "window/opd/module=mlp,center=0,half_width=0": lambda n: trained[n] if "layers.0.mlp" in n else base[n],
        "swap/opd/unit=layer_1,side=only": lambda n: trained[n] if "layers.1." in n else base[n],
        "swap/opd/unit=norm,side=without": lambda n: base[n] if "norm" in n else trained[n],
        "rank/opd/end=top,percent=10,norm=own,rest=trained": lambda n: low_rank(n),
        "rank/opd/end=top,percent=100,norm=own,rest=trained": lambda n: trained[n],
        "rank/opd/end=bottom,percent=100,norm=own,rest=trained": lambda n: trained[n],
        "norm_scaling/opd/step=2,beta=0": lambda n: early[n],
        "norm_scaling/opd/step=2,beta=1.6": lambda n: stretched(n, 1.6).float(),
    }
    options = InterventionOptions(**{**vars(OPTIONS), "half_width": 0})
    points = {p.id: p for kind in INTERVENTIONS.values() for p in kind.points(sources.point_inputs(options))}
    rounded = ("alpha=0.3", "percent=10,", "beta=1.6")
    for name, formula in expected.items():
        with live.at(points[name]) as norm:
            now = weights(live.model)
            for key in base:
                tolerance = 1e-6 if any(word in name for word in rounded) else 0
                torch.testing.assert_close(now[key], formula(key), rtol=0, atol=tolerance, msg=f"{name}: {key}")
            moves = sum(float((now[key].double() - base[key].double()).square().sum()) for key in base)
            assert norm == pytest.approx(moves**0.5, rel=1e-9)


def test_a_float64_model_gets_there_too(folder, sources):
    live = EditableModel(load(folder / "base", "float64"), sources)
    trained = weights(load(folder / "opd/trajectory/step-000004", "float64"))
    (point,) = (p for p in INTERVENTIONS["alpha"].points(sources.point_inputs(OPTIONS)) if p.id == "alpha/opd/alpha=1")
    with live.at(point):
        assert equal(weights(live.model), trained)


def test_norm_scaling_at_one_and_random_directions_have_the_final_norm(sources, live):
    base = weights(live.model)
    inputs = sources.point_inputs(OPTIONS)
    scaled = [p for p in INTERVENTIONS["norm_scaling"].points(inputs) if p.coordinates["beta"] == 1]
    for point in [*scaled, *INTERVENTIONS["random"].points(inputs)]:
        with live.at(point):
            for part, final in sources.norms(point.run).items():
                now, was = (part.view(w[part.tensor]).double() for w in (weights(live.model), base))
                assert (now - was).norm().item() == pytest.approx(final, rel=1e-6)
    assert len(scaled) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("intervention", EVERY_INTERVENTION)
def test_a_written_checkpoint_is_the_model_that_was_measured(folder, sources, tmp_path, intervention, dtype):
    live = EditableModel(load(folder / "base", dtype), sources)
    point = INTERVENTIONS[intervention].points(sources.point_inputs(OPTIONS))[-1]
    written = save_point(point, sources, tmp_path / point.id, dtype)
    with live.at(point):
        assert equal(weights(load(written, dtype)), weights(live.model))


def test_a_head_of_its_own_is_a_point_of_its_own(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(**{**make_model(0).config.to_dict(), "tie_word_embeddings": False})
    base = Qwen3ForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    before = weights(base)
    moved(1, 0.02, base).save_pretrained(tmp_path / "rl")
    after = weights(base)
    sources = Sources(tmp_path / "base", {"rl": [tmp_path / "rl"]})
    live = EditableModel(load(tmp_path / "base"), sources)
    for point in INTERVENTIONS["embedding"].points(sources.point_inputs(OPTIONS)):
        kept = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}[point.coordinates["replaced"]]
        with live.at(point):
            assert equal(weights(live.model), after | {kept: before[kept]})


def test_a_tied_head_that_is_stored_stays_equal_to_the_embeddings(folder, tmp_path):
    for source, name in (("base", "base"), ("opd/trajectory/step-000004", "rl")):
        model = load(folder / source)
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    sources = Sources(tmp_path / "base", {"rl": [tmp_path / "rl"]})
    for point in INTERVENTIONS["alpha"].points(sources.point_inputs(OPTIONS)):
        with EditableModel(load(tmp_path / "base"), sources).at(point):
            pass
        stored = load_file(save_point(point, sources, tmp_path / point.id) / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_an_adapter_is_its_merged_model(folder, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(load(folder / "base"), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    sources = Sources(folder / "base", {"lora": [tmp_path / "adapter"], "merged": [tmp_path / "merged"]})
    live = EditableModel(load(folder / "base"), sources)
    points = [
        p
        for kind in ("alpha", "window", "swap", "rank", "random")
        for p in INTERVENTIONS[kind].points(sources.point_inputs(OPTIONS))
    ]
    found: dict[str, dict] = {}
    for point in points:
        with live.at(point):
            found[point.id] = weights(live.model)
    ours = {name: w for name, w in found.items() if "/lora/" in name and "end=bottom,percent=10," not in name}
    assert len(ours) > 20
    for name, mine in ours.items():  # trailing components of a merged adapter are rounding noise: left out above
        theirs = found[name.replace("/lora/", "/merged/")]
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=2e-6, msg=f"{name}: {key}")


def test_a_point_that_is_not_finite_is_refused_and_undone(live, sources):
    before = weights(live.model)
    (point,) = [
        p
        for p in INTERVENTIONS["alpha"].points(sources.point_inputs(InterventionOptions(alphas=[1e300])))
        if p.run == "opd"
    ]
    with pytest.raises(NonFiniteWeightsError, match=r"alpha=1e\+300.*embedding.tokens"), live.at(point):
        pass
    assert equal(weights(live.model), before)


# -- refusals --------------------------------------------------------------------------------------


def test_a_model_that_is_not_the_checkpoint_is_refused(folder, sources):
    other = load(folder / "base")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(CompatibilityError, match=r"layers.1.mlp.up_proj.*differs.*--save_dir"):
        EditableModel(other, sources)
    renamed = load(folder / "base")
    renamed.model.blocks = renamed.model.layers
    del renamed.model.layers
    with pytest.raises(CompatibilityError, match=r"has no such parameter.*--save_dir"):
        EditableModel(renamed, sources)
    with pytest.raises(CompatibilityError, match="with shape"):
        EditableModel(make_model(0, vocab_size=80), sources)


def test_runs_that_do_not_belong_to_the_base_are_refused(folder, tmp_path):
    make_model(1, hidden=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(WeightsError, match="wide"):
        Sources(folder / "base", {"rl": [tmp_path / "wide"]})
    with pytest.raises(CheckpointError, match="nowhere"):
        Sources(folder / "base", {"rl": [tmp_path / "nowhere"]})


def test_repeated_labels_are_seeds(folder):
    found = Sources(folder / "base", {"opd": [folder / "opd", folder / "rl"], "rl": [folder / "rl"]}, steps=[0, 4])
    assert list(found.snapshots) == ["opd#0", "opd#1", "rl"]
    assert [snapshot.step for snapshot in found.snapshots["rl"]] == [0, 4]


# -- running and resuming --------------------------------------------------------------------------


def make_evaluator(live, teacher=None):
    sampling = Sampling(max_new_tokens=2, seed=0, n=2)
    return Evaluator(live.model, make_tokenizer(), make_task(6), sampling, teacher)


def run(live, sources, root, intervention, evaluator=None, **options):
    options = InterventionOptions(**{**vars(OPTIONS), **options})
    results = InterventionResults(root, {"base": "b", "interventions": {intervention: vars(options)}})
    results.begin()
    inputs = sources.point_inputs(options)
    evaluator = evaluator or make_evaluator(live)
    measure_points(
        [*reference_points(inputs), *INTERVENTIONS[intervention].points(inputs)], live, sources, evaluator, results
    )
    return results


def counting(evaluator):
    calls = []
    real = evaluator.measure
    evaluator.measure = lambda: calls.append(1) or real()
    return evaluator, calls


def test_a_model_is_measured_once_whatever_it_is_called(live, sources, tmp_path):
    evaluator, calls = counting(make_evaluator(live))
    run(live, sources, tmp_path, "alpha", evaluator)
    assert len(calls) == 1 + 2 + 2  # the base, two trained models, α = 0.3 of each
    run(live, sources, tmp_path, "trajectory", evaluator)
    assert len(calls) == 5 + 2  # step 0 is the base, step 4 the trained model
    results = run(live, sources, tmp_path, "norm_scaling", evaluator)
    assert len(calls) == 7 + 4  # β = 0 is step 2
    assert len(results.rows) == 3 + 6 + 6 + 6
    assert run(live, sources, tmp_path, "alpha", evaluator).rows == results.rows and len(calls) == 11


def test_a_killed_intervention_goes_on_and_ends_like_an_uninterrupted_one(live, sources, tmp_path):
    whole = run(live, sources, tmp_path / "whole", "alpha").write_table()
    evaluator = make_evaluator(live)
    real, calls = evaluator.measure, []

    def killed():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real()

    evaluator.measure = killed
    before = weights(live.model)
    with pytest.raises(KeyboardInterrupt):
        run(live, sources, tmp_path / "part", "alpha", evaluator)
    assert equal(weights(live.model), before)
    rows = tmp_path / "part" / "results.jsonl"
    assert len(rows.read_text().splitlines()) == 4  # base, two trained models, α = 0 of the first run
    rows.write_text(rows.read_text() + '{"id": "alpha/opd/al')  # a row the kill cut short
    part = run(live, sources, tmp_path / "part", "alpha").write_table()
    assert part.drop(columns="seconds").equals(whole.drop(columns="seconds"))
    assert all(json.loads(line) for line in rows.read_text().splitlines())


def test_table_and_kl(live, sources, folder, tmp_path):
    teacher = load(folder / "opd/trajectory/step-000004")
    frame = run(live, sources, tmp_path, "alpha", make_evaluator(live, teacher)).write_table()
    row = frame.set_index("point").loc
    assert row["reference/opd"]["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < row["alpha/opd/alpha=0.3"]["kl"] < row["reference/base"]["kl"]
    assert (frame["kl_low"] <= frame["kl"]).all() and (frame["kl"] <= frame["kl_high"]).all()
    assert (frame["accuracy_low"] <= frame["accuracy"]).all() and (frame["n"] == 6).all()
    assert row["alpha/opd/alpha=0"]["accuracy_change"] == 0 == row["alpha/opd/alpha=1"]["change_from_trained"]
    for name in ("alpha/opd/alpha=0.3", "alpha/rl/alpha=0.3"):
        change = row[name]["accuracy"] - row["reference/base"]["accuracy"]
        assert row[name]["accuracy_change"] == pytest.approx(change)
    norms = [row[f"alpha/opd/alpha={alpha}"]["update_norm"] for alpha in ("0", "0.3", "1")]
    assert norms == pytest.approx([0, 0.3 * norms[2], norms[2]], rel=1e-6)
    assert (tmp_path / "results.csv").exists() and (tmp_path / "results.parquet").exists()


def test_other_settings_are_refused_by_name_and_nothing_is_touched(live, sources, tmp_path):
    run(live, sources, tmp_path, "alpha")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"alpha.alphas = \[0.*this run has \[0.5\]"):
        run(live, sources, tmp_path, "alpha", alphas=[0.5])
    with pytest.raises(ConfigError, match="base = 'b', this run has 'other'"):
        InterventionResults(tmp_path, {"base": "other", "interventions": {}})
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "results.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        InterventionResults(tmp_path / "lone", {"interventions": {}})
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    assert not InterventionResults(tmp_path, {"interventions": {}}).rows
    for name in ("report.html", "progress.jsonl"):  # as `effopd analyze` writes them
        (tmp_path / name).write_text("theirs")
    with pytest.raises(ConfigError, match=r"holds other files \(progress\.jsonl, report\.html\): expected a new or"):
        InterventionResults(tmp_path, {"interventions": {}})
    assert (tmp_path / "report.html").read_text() == "theirs"


# -- paired intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "samples", "lift"), [(40, 1, 0.0), (200, 1, 0.1), (60, 4, 0.15)])
def test_paired_intervals_cover(n, samples, lift):
    rng = random.Random(0)
    hits, trials = 0, 400
    for _ in range(trials):
        old, new = [], []
        for _ in range(n):
            p = rng.uniform(0.1, 0.7)
            noise = [rng.random() for _ in range(samples)]  # common random numbers
            old.append(sum(x < p for x in noise) / samples)
            q = p + lift * rng.choice((0, 2))  # not every prompt gains
            new.append(sum(x < q for x in noise) / samples)
        found = bonett_price(new, old)
        hits += found.low <= lift <= found.high
    assert hits / trials >= 0.92


def test_a_paired_interval_without_changes_is_not_a_point():
    found = bonett_price([1, 0, 1, 1], [1, 0, 1, 1])
    assert found.mean == 0 and found.low < -0.1 and found.high > 0.1 and found.n == 4
    wide, narrow = bonett_price([1] * 5, [0] * 5), bonett_price([1] * 50, [0] * 50)
    assert wide.mean == narrow.mean == 1 >= wide.high and wide.low < narrow.low < 1
