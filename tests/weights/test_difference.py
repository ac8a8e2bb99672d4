"""Updates of full checkpoints and of adapters: exact, and only between models that belong
together.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers.tiny_models import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from effopd.errors import CheckpointError, CompatibilityError, ConfigError, WeightsError
from effopd.weights import Checkpoint, Difference, open_checkpoint, reader


def nudged(folder, source, scale=1e-3, dtype=torch.float32, **rename):
    """A trained copy: every tensor moved a little."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(dtype)
        for name, t in load_file(source / "model.safetensors").items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.fixture
def base(tmp_path):
    make_model(0).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_exact(tmp_path, base, dtype):
    trained = nudged(tmp_path / "trained", base, dtype=dtype)
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    difference = Difference(Checkpoint(base), Checkpoint(trained))
    seen = set()
    for update in difference.updates():
        name = update.part.tensor
        seen.add(name)
        assert torch.equal(update.base, before[name]) and torch.equal(update.trained, after[name])
        assert update.factors is None
        assert torch.equal(update.delta(), after[name].double() - before[name].double())
    assert seen == before.keys()


def test_names_with_other_prefixes_are_paired(tmp_path, base):
    trained = nudged(tmp_path / "trained", base)
    tensors = load_file(trained / "model.safetensors")
    save_file({f"module.{name}": t for name, t in tensors.items()}, trained / "model.safetensors")
    difference = Difference(Checkpoint(base), Checkpoint(trained))
    assert all(torch.equal(u.trained, tensors[u.part.tensor]) for u in difference.updates())


def test_a_stored_copy_of_a_tied_head_is_not_an_extra_tensor(tmp_path, base):
    trained = nudged(tmp_path / "trained", base)
    tensors = load_file(trained / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, trained / "model.safetensors"
    )
    difference = Difference(Checkpoint(base), Checkpoint(trained))
    assert not [part for part in difference.parts if part.place.module == "head"]


@pytest.mark.parametrize("tied", ["base", "trained"])
def test_a_head_of_its_own_on_one_side_only(tmp_path, base, tied):
    trained = nudged(tmp_path / "trained", base)
    tensors = load_file(base / "model.safetensors")
    untied = trained if tied == "base" else base
    save_file(tensors | {"lm_head.weight": torch.ones(64, 16)}, untied / "model.safetensors")
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(WeightsError, match=r"lm_head\.weight.*Only one of them ties its output head"):
        Difference(Checkpoint(base), Checkpoint(trained))


def test_a_tensor_of_several_parts_is_read_once(tmp_path, monkeypatch):
    config = transformers.GptOssConfig(**SMALL, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    trained = nudged(tmp_path / "trained", tmp_path / "base")
    reads, real = [], reader.read_tensor
    monkeypatch.setattr(reader, "read_tensor", lambda stored, name: reads.append(name) or real(stored, name))
    difference = Difference(Checkpoint(tmp_path / "base"), Checkpoint(trained))
    with torch.inference_mode():  # views do not keep what they view alive there
        for update in difference.updates():
            del update
    assert len(reads) == 2 * len(difference.base.shapes) < len(difference.parts) * 2


def broken(trained, what: str) -> None:
    tensors = load_file(trained / "model.safetensors")
    config = json.loads((trained / "config.json").read_text())
    if what == "architecture":
        config["model_type"] = "llama"
    elif what == "vocabulary":
        tensors["model.embed_tokens.weight"] = torch.zeros(70, 16)
    elif what == "missing":
        tensors.pop("model.layers.1.mlp.up_proj.weight")
    elif what == "extra":
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(32, 16)
    elif what == "shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(33, 16)
    save_file(tensors, trained / "model.safetensors")
    (trained / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("architecture", CompatibilityError, "different architectures: .* is qwen3, .* is llama"),
        ("vocabulary", CompatibilityError, "64 rows of embeddings, .* 70"),
        (
            "missing",
            WeightsError,
            r"1 missing \('model\.layers\.1\.mlp\.up_proj\.weight', in the base in model\.safetensors",
        ),
        ("extra", WeightsError, r"1 extra \('model\.layers\.2\.mlp\.up_proj\.weight' in model\.safetensors"),
        ("shape", WeightsError, r"'model\.layers\.1\.mlp\.up_proj\.weight' \(33, 16\) instead of \(32, 16\)"),
    ],
)
def test_models_that_do_not_belong_together(tmp_path, base, what, error, message):
    trained = nudged(tmp_path / "trained", base)
    broken(trained, what)
    with pytest.raises(error, match=message):
        Difference(Checkpoint(base), Checkpoint(trained))


# -- adapters --------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ADAPTERS = {
    "plain": ("Llama", SMALL, {"target_modules": ["q_proj", "down_proj"]}),
    "all linear, rslora": ("Qwen3", SMALL, {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 7}),
    "patterns": (
        "Llama", SMALL,
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "rank_pattern": {"q_proj": 2},
         "alpha_pattern": {"layers.1.mlp.up_proj": 31}},
    ),
    "fused by head": (
        "Bloom", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    ),
    "fused": ("Phi3", SMALL, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "conv1d": (
        "GPT2", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "embedding and saved head": (
        "Llama", SMALL, {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head"]},
    ),
    "all biases": ("Qwen2", SMALL, {"target_modules": ["q_proj"], "bias": "all"}),
    "tied, with the copies PEFT adds": (
        "Qwen3", SMALL | {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "up_proj", "down_proj"]},
    ),
    "conv1d, rslora": (
        "GPT2", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "biases": ("Qwen2", SMALL, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
}  # fmt: skip


@pytest.fixture(params=ADAPTERS)
def adapted(request, tmp_path):
    """Base, adapter and merged checkpoint; the adapter is random in both factors."""
    kind, settings, lora = ADAPTERS[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings))
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | lora)))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path


def test_an_adapter_equals_the_merged_model(adapted):
    base = Checkpoint(adapted / "base")
    ours = Difference(base, open_checkpoint(adapted / "adapter"))
    merged = Difference(base, Checkpoint(adapted / "merged"))
    moved = 0
    for mine, theirs in zip(ours.updates(), merged.updates(), strict=True):
        assert mine.part == theirs.part
        torch.testing.assert_close(mine.trained.float(), theirs.trained, rtol=0, atol=5e-7)
        torch.testing.assert_close(mine.delta(), theirs.delta(), rtol=0, atol=5e-7)
        moved += bool(mine.delta().any())
        if mine.factors is not None:
            b, a = mine.factors
            assert b.shape[1] == a.shape[0] <= 4 and (b.shape[0], a.shape[1]) == mine.part.shape
    assert moved >= 4


def adapter_files(tmp_path, **config):
    folder = tmp_path / "adapter"
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": torch.ones(2, 16), f"{module}.lora_B.weight": torch.ones(16, 2)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4} | config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora.*merge_and_unload"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter, got peft_type=IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changed the base weights"),
        ({"init_lora_weights": "olora"}, "changed the base weights"),
    ],
)
def test_adapters_whose_update_is_not_b_a(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(adapter_files(tmp_path, **config))


@pytest.mark.parametrize(("alpha", "entry"), [(0, 0.0), (1, 1.0), (None, 8.0)])
def test_scaling_of_an_adapter(tmp_path, alpha, entry):
    b, a = open_checkpoint(adapter_files(tmp_path, lora_alpha=alpha)).factors("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(b @ a, torch.full((16, 16), entry, dtype=torch.float64))


def test_an_adapter_with_a_head_of_its_own_for_a_tied_base(tmp_path, base):
    tuned = get_peft_model(make_model(0), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(WeightsError, match=r"trains a head of its own .*tie_word_embeddings=False"):
        Difference(Checkpoint(base), open_checkpoint(tmp_path / "adapter"))


def test_damaged_adapters(tmp_path, base):
    folder = adapter_files(tmp_path)
    Difference(Checkpoint(base), open_checkpoint(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    save_file({first: tensors[first]}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has lora_A but not its counterpart"):
        open_checkpoint(folder)
    save_file(
        {name.replace("layers.0", "layers.7"): t for name, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"adapts 'model\.layers\.7\.self_attn\.q_proj\.weight', which the base"):
        Difference(Checkpoint(base), open_checkpoint(folder))
    save_file({name: t[:, :1].contiguous() if "lora_A" in name else t for name, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(WeightsError, match="with shape"):
        Difference(Checkpoint(base), open_checkpoint(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle file"):
        open_checkpoint(folder)
