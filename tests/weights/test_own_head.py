"""Output heads that are tied, are not, or are not what the configuration says; adapters of a tied
head.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_checkpoints import save_base, save_tensors, tensors_of
from helpers.tiny_models import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from effopd.analysis.analyze import analyze
from effopd.errors import WeightsError
from effopd.interventions.editable_model import EditableModel, save_point
from effopd.interventions.kinds import INTERVENTIONS, reference_points
from effopd.interventions.options import InterventionOptions
from effopd.interventions.sources import Sources
from effopd.weights import Checkpoint, Difference, open_checkpoint, open_differences

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def base(tmp_path):
    """A tied model; its configuration says so."""
    return save_base(tmp_path / "base")


def with_head(path: Path, base: Path, move: float, shards: bool = False) -> Path:
    """A checkpoint with a stored head, `move` of noise away from the embedding, under the tied
    configuration.
    """
    tensors = tensors_of(base)
    noise = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(1))
    tensors[HEAD] = tensors[EMBEDDING] + move * noise
    if not shards:
        return save_tensors(path, tensors, base)
    path.mkdir(parents=True)
    shutil.copy(base / "config.json", path)
    names = {name: "head.safetensors" if name == HEAD else "rest.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def norms(difference: Difference) -> dict[str, float]:
    return {str(update.part.place): update.norm() for update in difference.updates() if update.norm() > 0}


def loaded(path: Path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("side", ["trained", "base", "both"])
def test_two_tensors_that_differ_are_an_untied_model(tmp_path, base, side, shards):
    own = with_head(tmp_path / "own", base, 0.5, shards)
    tied = with_head(tmp_path / "copy", base, 0.0, shards)
    moved = {"trained": (base, own), "base": (own, tied), "both": (own, with_head(tmp_path / "more", base, 0.75))}[
        side
    ]
    expected = {"trained": 0.5, "base": 0.5, "both": 0.25}[side]
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    found = norms(Difference(Checkpoint(moved[0]), Checkpoint(moved[1])))
    assert found == {"head.head": pytest.approx(expected * float(noise.norm()), rel=1e-6)}


def test_equal_tensors_are_one(tmp_path, base):
    trained = with_head(tmp_path / "copy", base, 0.0)
    difference = Difference(Checkpoint(base), Checkpoint(trained))
    assert norms(difference) == {} and not [p for p in difference.parts if p.place.module == "head"]


def test_only_the_head_is_stored(tmp_path, base):
    """Of a tied pair either tensor may be the one in the file."""
    tensors = tensors_of(base)
    tensors[HEAD] = tensors.pop(EMBEDDING) + 0.5
    trained = save_tensors(tmp_path / "trained", tensors, base)
    assert torch.equal(loaded(trained).model.embed_tokens.weight, tensors[HEAD])
    found = norms(Difference(Checkpoint(base), Checkpoint(trained)))
    assert found == {"embedding.tokens": pytest.approx(0.5 * (64 * 16) ** 0.5)}


def test_an_analysis_of_tied_and_untied_runs_measures_the_head_apart(tmp_path, base):
    tensors = tensors_of(base)
    tensors[EMBEDDING] = tensors[EMBEDDING] + 0.5
    tied = save_tensors(tmp_path / "tied", tensors, base)
    own = with_head(tmp_path / "own" / "trajectory" / "step-000001", base, 0.5).parents[1]
    with_head(own / "trajectory" / "step-000000", base, 0.0)
    done = analyze(base, {"own": own, "tied": tied}, tmp_path / "out", metrics=["norms"])
    norm, noise = 0.5 * (64 * 16) ** 0.5, torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).norm()
    modules = {name: run["modules"] for name, run in done.summary["runs"].items()}
    assert modules["own"]["head"]["norm"] == pytest.approx(0.5 * float(noise), rel=1e-6)
    assert modules["own"]["embedding"]["norm"] == 0
    assert modules["tied"]["head"]["norm"] == modules["tied"]["embedding"]["norm"] == pytest.approx(norm)
    assert "measured apart" in done.summary["notes"][0]


@pytest.mark.parametrize("side", ["trained", "base"])
def test_an_intervention_moves_the_head_alone(tmp_path, base, side):
    own = with_head(tmp_path / "own", base, 0.5)
    start, end = (base, own) if side == "trained" else (own, with_head(tmp_path / "copy", base, 0.0))
    sources = Sources(start, {"opd": [end]})
    live = EditableModel(loaded(start), sources)
    assert torch.equal(logits(live.model), logits(loaded(start)))
    inputs = sources.point_inputs(InterventionOptions(alphas=[0.5]))
    for point in [*reference_points(inputs), *INTERVENTIONS["alpha"].points(inputs)]:
        with live.at(point):
            now = logits(live.model)
        saved = loaded(save_point(point, sources, tmp_path / "out" / point.id))
        torch.testing.assert_close(logits(saved), now, rtol=0, atol=1e-5)
        if point.id == "reference/opd":
            assert torch.equal(now, logits(loaded(end)))
    assert torch.equal(logits(live.model), logits(loaded(start)))


TIED = {"task_type": "CAUSAL_LM", "r": 4}
HEADS = {
    "factors": {"target_modules": ["lm_head", "q_proj"]},
    "factors of both": {"target_modules": ["lm_head", "embed_tokens"]},
    "in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
TOGETHER = {
    "embedding, with copies": {"target_modules": ["embed_tokens"]},
    "tied factors": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tied in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def adapter_of(tmp_path: Path, settings: dict, **model) -> Path:
    torch.manual_seed(5)
    tuned = get_peft_model(make_model(0), LoraConfig(**TIED, **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "q_proj" not in name:
                parameter.add_(0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HEADS)
def test_an_adapter_of_a_tied_head_is_refused(tmp_path, base, kind):
    adapter = open_checkpoint(adapter_of(tmp_path, HEADS[kind]))
    with pytest.raises(
        WeightsError, match=r"trains a head of its own \('lm_head\.weight'\).*tie_word_embeddings=False"
    ):
        Difference(Checkpoint(base), adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TOGETHER)
def test_an_adapter_of_a_tied_embedding_is_measured_once(tmp_path, base, kind):
    difference = Difference(Checkpoint(base), open_checkpoint(adapter_of(tmp_path, TOGETHER[kind])))
    found = norms(difference)
    assert list(found) == ["embedding.tokens"] and found["embedding.tokens"] > 1
    with pytest.raises(WeightsError, match="Compare them separately"):
        open_differences(Checkpoint(base), [[tmp_path / "adapter"], [with_head(tmp_path / "own", base, 0.5)]])


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_its_own_takes_an_adapter(tmp_path, base):
    """The file has two tensors, so PEFT trains the head alone, whatever the configuration says."""
    own = with_head(tmp_path / "own", base, 0.5)
    tuned = get_peft_model(loaded(own), LoraConfig(**TIED, **HEADS["factors"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    found = norms(Difference(Checkpoint(own), open_checkpoint(tmp_path / "adapter")))
    layer = tuned.base_model.model.lm_head
    assert found["head.head"] == pytest.approx(float(layer.get_delta_weight("default").norm()), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_base_or_vocabulary(tmp_path, base):
    folder = adapter_of(tmp_path, TOGETHER["embedding, with copies"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    copy = next(name for name in tensors if "embed_tokens.base_layer" in name)
    save_file(tensors | {copy: tensors[copy] + 1}, file)
    with pytest.raises(WeightsError, match="was trained on another base"):
        Difference(Checkpoint(base), open_checkpoint(folder))
    model = make_model(0)
    model.resize_token_embeddings(70)
    get_peft_model(model, LoraConfig(**TIED, target_modules=["embed_tokens"])).save_pretrained(folder)
    with pytest.raises(WeightsError, match=r"with shape \(70, 16\).*resize_token_embeddings"):
        Difference(Checkpoint(base), open_checkpoint(folder))
    get_peft_model(model, LoraConfig(**TIED, target_modules=["q_proj"])).save_pretrained(
        folder, save_embedding_layers=True
    )
    with pytest.raises(WeightsError, match=r"with shape \(70, 16\).*resize_token_embeddings"):
        Difference(Checkpoint(base), open_checkpoint(folder))
