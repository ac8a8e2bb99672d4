"""`effopd testbed other`: models of every stage, resume, the names of its models, its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.commands.main import main
from effopd.errors import ConfigError
from effopd.tasks.builtin_models import OTHER_MODELS, other_models_path, resolve_model, student_path
from effopd.tasks.testbed_families import family_task, worked_reasoning
from effopd.testbed import base_training, other_models
from effopd.testbed.base_training import BaseSettings, ModelSettings
from effopd.testbed.other_models import LONG_FAMILY, LONG_LIMIT, OtherBuild, OtherSettings, build_other
from effopd.testbed.progress import Progress

RECIPE = Path(__file__).parents[2] / "recipes" / "compare-other-teacher.yaml"
SHAPE = ModelSettings(32, 64, 1, 2, 1, 16, max_position_embeddings=256)
MUON = BaseSettings(questions=40, steps=5, batch_size=4, warmup_steps=1, optimizer="muon")
ADAMW = BaseSettings(questions=40, steps=3, batch_size=4, warmup_steps=1)
MICRO = OtherSettings(SHAPE, MUON, ADAMW, SHAPE, MUON, ADAMW, test_questions=4, save_every=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder and card of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("other") / "models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other_models, "LONG_LIMIT", 8)
        return folder, build_other(folder, seed=1, settings=MICRO)


def test_the_card_has_accuracies_costs_and_the_kl_at_the_start(built):
    folder, card = built
    assert json.loads((folder / "card.json").read_text()) == json.loads(json.dumps(card))
    assert tuple(card["models"]) == OTHER_MODELS and card["seed"] == 1
    for name, model in card["models"].items():
        assert model["cpu_seconds"] > 0 and model["parameters"] > 0
        assert len(model["accuracy"]) == (4 if name == "wide_teacher" else 2)
        assert all(kl > 0 for kl in model.get("kl_at_start", {}).values())
    assert set(card["models"]["wide_teacher"]["kl_at_start"]) == {"chain_sum", "spell_backward"}
    assert set(card["models"]["long_teacher"]["kl_at_start"]) == {LONG_FAMILY}
    assert not list(folder.glob(".*")) and "wide_start: step 5/5" in (folder / "build.log").read_text()


def test_the_models_share_the_built_in_tokenizer(built):
    folder, _ = built
    expected = AutoTokenizer.from_pretrained(student_path()).backend_tokenizer.to_str()
    for name in OTHER_MODELS:
        assert AutoTokenizer.from_pretrained(folder / name).backend_tokenizer.to_str() == expected
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.vocab_size == 330


def test_finished_models_are_not_trained_again(built, monkeypatch):
    folder, card = built
    monkeypatch.setattr(other_models, "train_base", None)
    assert build_other(folder, ("wide_teacher",), seed=1, settings=MICRO) == card


@pytest.mark.parametrize("name", ["long_student", "long_teacher"])
def test_an_interrupted_training_continues_to_the_same_weights(built, monkeypatch, tmp_path, name):
    """Muon and AdamW; interrupted after step 3, continued from step 2."""
    _, card = built
    build = OtherBuild(tmp_path / "models", 1, MICRO)
    if name == "long_teacher":
        build.make("long_student")
    after_step = Progress.after_step

    def interrupted(self, step, *state):
        after_step(self, step, *state)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "after_step", interrupted)
        build.make(name)
    assert not (build.out / name).exists()
    steps: list[int] = []
    monkeypatch.setattr(Progress, "after_step", lambda self, step, *state: steps.append(step))
    OtherBuild(build.out, 1, MICRO).make(name)
    assert steps[0] == 3
    made, expected = (AutoModelForCausalLM.from_pretrained(f / name).state_dict() for f in (build.out, built[0]))
    assert all(made[key].equal(value) for key, value in expected.items()) and card["models"][name]["sha256"]


@pytest.mark.parametrize(("capability", "bound"), [("AVX2", 1e-5), ("AVX512", 0.05)])
def test_muon_iterates_in_float32_without_bfloat16_instructions(monkeypatch, capability, bound):
    """Against Newton–Schulz in float64; the gradient stays as it is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(6, 9))
    weight.grad = gradient.clone()
    optimizer = torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    with base_training._muon_precision():
        optimizer.step()
    expected = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    error = (weight + expected).norm() / expected.norm()
    assert error < bound and (capability == "AVX2" or error > 1e-4) and weight.grad.equal(gradient)


def test_other_folders_are_refused(built, tmp_path):
    folder, _ = built
    with pytest.raises(ConfigError, match="another seed or other settings"):
        OtherBuild(folder, 2, MICRO)
    (tmp_path / "note").write_text("mine")
    for out in (tmp_path, tmp_path / "note"):
        with pytest.raises(ConfigError, match="holds no build to continue"):
            OtherBuild(out, 1, MICRO)
    with pytest.raises(ConfigError, match=r"base\.optimizer: expected adamw or muon"):
        BaseSettings(optimizer="sgd")  # type: ignore[arg-type]


def test_names_and_recipe_before_and_after_the_build(monkeypatch, tmp_path, capsys):
    pytest.importorskip("schedulefree")
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="effopd testbed other long_pair"):
        resolve_model("testbed:long_student")
    assert main(["compare", str(RECIPE), "--dry_run"]) == 2
    assert "effopd testbed other wide_teacher" in capsys.readouterr().err
    for name in OTHER_MODELS:
        (other_models_path() / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (other_models_path() / name / file).write_text("{}")
        assert resolve_model(f"testbed:{name}") == str(tmp_path / "testbed-other" / name)
    assert main(["compare", str(RECIPE), "--dry_run"]) == 0
    assert "3 task(s)" in capsys.readouterr().out


def test_long_answers_have_about_100_tokens_and_fit():
    tokenizer = AutoTokenizer.from_pretrained(student_path())
    examples = family_task(LONG_FAMILY, "test", 200, 1).examples
    lengths = [len(tokenizer(worked_reasoning(example))["input_ids"]) + 1 for example in examples]
    assert 90 <= sum(lengths) / len(lengths) <= 110
    assert sum(length > LONG_LIMIT for length in lengths) <= 4
    longest = max(
        len(tokenizer.apply_chat_template(e.prompt, add_generation_prompt=True)["input_ids"]) for e in examples
    )
    assert longest + LONG_LIMIT <= 256
