"""Every tensor of every supported architecture has its place, and its parts cover it exactly
once.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from effopd.weights import Checkpoint, Place
from effopd.weights.naming import is_tied, place_of
from effopd.weights.parts import parts_of

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = SMALL | {"head_dim": 8, "num_experts_per_tok": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"q", "k", "v", "o"}
MLP = {"gate", "up", "down"}
EXPERTS = {f"experts.{i}.{name}" for i in range(3) for name in MLP} | {"router"}
#: config class, its settings, attention and MLP matrices of a layer
ARCHITECTURES = {
    "Llama": (SMALL, ATTENTION, MLP),
    "Qwen2": (SMALL, ATTENTION | {"q_bias", "k_bias", "v_bias"}, MLP),
    "Qwen3": (SMALL | {"head_dim": 8}, ATTENTION, MLP),
    "Mistral": (SMALL, ATTENTION, MLP),
    "Gemma": (SMALL | {"head_dim": 8}, ATTENTION, MLP),
    "Gemma2": (SMALL | {"head_dim": 8}, ATTENTION, MLP),
    "Gemma3Text": (SMALL | {"head_dim": 8}, ATTENTION, MLP),
    "Phi3": (SMALL, ATTENTION, MLP),
    "GPT2": (
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        ATTENTION | {f"{name}_bias" for name in ATTENTION},
        {"up", "down", "up_bias", "down_bias"},
    ),
    "Mixtral": (SMALL | {"num_local_experts": 3}, ATTENTION, EXPERTS),
    "Qwen3Moe": (MOE | {"num_experts": 3, "moe_intermediate_size": 12}, ATTENTION, EXPERTS),
    "Qwen2Moe": (
        MOE | {"num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
        ATTENTION | {"q_bias", "k_bias", "v_bias"},
        EXPERTS | {f"shared_expert.{name}" for name in MLP} | {"shared_expert_gate"},
    ),
    "GptOss": (
        MOE | {"num_local_experts": 3},
        ATTENTION | {f"{name}_bias" for name in ATTENTION} | {"sinks"},
        EXPERTS | {f"{name}_bias" for name in EXPERTS},
    ),
    "Llama4Text": (
        MOE | {"num_local_experts": 3, "intermediate_size_mlp": 24},
        ATTENTION, EXPERTS | {f"shared_expert.{name}" for name in MLP},
    ),
}  # fmt: skip


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**(ARCHITECTURES[name][0] | TOKENS))
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """The architecture's name, and a checkpoint of it as transformers writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(folder)
    return request.param, Checkpoint(folder)


def test_nothing_is_skipped_or_counted_twice(saved):
    _, checkpoint = saved
    parts = checkpoint.parts()
    assert len({part.place for part in parts}) == len(parts)
    assert not [part for part in parts if part.place.module == "other"]
    for name in checkpoint.shapes:
        count = torch.zeros_like(checkpoint.load(name))
        for part in parts:
            if part.tensor == name:
                view = part.view(count)
                assert tuple(view.shape) == part.shape
                view += 1
        assert (count == 1).all(), name


def test_matrices_of_a_layer(saved):
    name, checkpoint = saved
    for layer in (0, 1):
        for module, expected in (("attention", ARCHITECTURES[name][1]), ("mlp", ARCHITECTURES[name][2])):
            places = [p.place for p in checkpoint.parts() if p.place.layer == layer and p.place.module == module]
            assert {place.matrix for place in places} == expected


def test_matrices_are_oriented_out_by_in(saved):
    _, checkpoint = saved
    for part in checkpoint.parts():
        matrix = part.place.matrix.split(".")[-1]
        if part.is_matrix and matrix in {"q", "k", "v", "gate", "up", "router"}:
            assert part.shape[1] == 16, part
        if part.is_matrix and matrix in {"o", "down"}:
            assert part.shape[0] == 16, part


def test_editing_a_view_edits_the_parameter(saved):
    _, checkpoint = saved
    for part in checkpoint.parts():
        parameter = torch.nn.Parameter(checkpoint.load(part.tensor).clone())
        with torch.no_grad():
            part.view(parameter).fill_(7.0)
        assert int((parameter == 7.0).sum()) == torch.Size(part.shape).numel()


def test_phi3_splits_like_the_model(tmp_path):
    model = make("Phi3")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    pieces = {p.place.matrix: p.view(checkpoint.load(p.tensor)) for p in checkpoint.parts() if p.place.layer == 0}
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    assert torch.equal(torch.cat([pieces["q"], pieces["k"], pieces["v"]]), fused)
    assert [pieces[name].shape[0] for name in "qkv"] == [16, 8, 8]
    assert torch.equal(torch.cat([pieces["gate"], pieces["up"]]), model.model.layers[0].mlp.gate_up_proj.weight)


def test_gpt2_is_transposed(tmp_path):
    model = make("GPT2")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    pieces = {p.place.matrix: p.view(checkpoint.load(p.tensor)) for p in checkpoint.parts() if p.place.layer == 1}
    stored = model.transformer.h[1].attn.c_attn.weight  # [in, q|k|v]
    assert torch.equal(pieces["k"], stored[:, 16:32].T)
    assert torch.equal(pieces["k_bias"], model.transformer.h[1].attn.c_attn.bias[16:32])
    assert pieces["up"].shape == (64, 16) and pieces["down"].shape == (16, 64)


def test_gpt_oss_experts_alternate(tmp_path):
    model = make("GptOss")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    pieces = {p.place.matrix: p.view(checkpoint.load(p.tensor)) for p in checkpoint.parts() if p.place.layer == 0}
    stored = model.model.layers[0].mlp.experts.gate_up_proj  # [experts, in, gate and up in turn]
    assert torch.equal(pieces["experts.2.gate"], stored[2, :, 0::2].T)
    assert torch.equal(pieces["experts.2.up"], stored[2, :, 1::2].T)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", "", "module.model."])
def test_prefixes_do_not_matter(prefix):
    assert place_of(f"{prefix}layers.3.self_attn.q_proj.weight") == Place(3, "attention", "q")
    assert place_of(f"{prefix}layers.3.mlp.down_proj.weight") == Place(3, "mlp", "down")
    assert place_of(f"{prefix}embed_tokens.weight") == Place(None, "embedding", "tokens")
    assert place_of(f"{prefix}norm.weight") == Place(None, "norm", "final")


@pytest.mark.parametrize(
    ("name", "place"),
    [("transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight", Place(1, "attention", "qkv")),
     ("transformer.blocks.1.norm_attn_norm.norm_1.weight", Place(1, "norm", "norm_1")),
     ("model.layers.0.input_layernorm.mlp.fc1.weight", Place(0, "norm", "fc1")),
     ("transformer.norm_f.weight", Place(None, "norm", "final")),
     ("backbone.embeddings.weight", Place(None, "embedding", "tokens")),
     ("output_projection.weight", Place(None, "head", "head")),
     ("proj_out.weight", Place(None, "head", "head")),
     ("decoder.bias", Place(None, "head", "head_bias"))],
)  # fmt: skip
def test_norms_embeddings_and_heads_under_other_names(name, place):
    """DBRX's attention lies in a block that is named after its norms; AXK2's norms have matrices
    inside.
    """
    assert place_of(name) == place


def test_a_model_named_after_its_norms_has_no_matrix_for_a_norm():
    name = "roberta_prelayernorm.encoder.layer.0.attention.self.query.weight"
    assert place_of(name) == Place(None, "other", name)


def test_stacked_experts_as_transformers_holds_them():
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 24, 16),
        "model.layers.0.mlp.experts.down_proj": (3, 16, 12),
    }
    parts = {p.place.matrix: p for p in parts_of({"model_type": "qwen3_moe"}, shapes)}
    assert parts["experts.1.up"].shape == (12, 16) and parts["experts.1.down"].shape == (16, 12)
    tensor = torch.arange(3 * 24 * 16).reshape(3, 24, 16)
    assert torch.equal(parts["experts.1.up"].view(tensor), tensor[1, 12:])


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 4}  # fmt: skip


def test_a_model_that_sees_keeps_its_tower_apart(tmp_path):
    config = transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    parts = Checkpoint(tmp_path).parts()
    sees = ("vision_tower.", "multi_modal_projector.")
    assert all((part.place.module == "other") == part.tensor.startswith(sees) for part in parts)
    language = {str(part.place) for part in parts if part.place.module != "other"}
    assert {f"layers.{i}.{m}" for i in (0, 1) for m in ("attention.q", "mlp.up", "norm.q_norm")} < language
    assert {"embedding.tokens", "norm.final"} < language and "head.head" not in language


@pytest.mark.parametrize(
    "name",
    ["model.visual.blocks.0.attn.qkv.weight", "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
     "model.layers.0.mamba.in_proj.weight", "something.new", "model.layers.0.crossattention.c_attn.weight"],
)  # fmt: skip
def test_the_unknown_is_listed_under_its_own_name(name):
    (part,) = parts_of({}, {name: (3, 5)})
    assert part.place.module == "other" and part.place.matrix == name and part.shape == (3, 5)


def test_a_fused_tensor_the_configuration_does_not_explain():
    (part,) = parts_of(
        {"num_attention_heads": 4, "hidden_size": 16}, {"model.layers.0.self_attn.qkv_proj.weight": (99, 16)}
    )
    assert part.place == Place(0, "other", "model.layers.0.self_attn.qkv_proj.weight")


def test_two_tensors_never_share_a_place():
    names = ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.router.weight"]
    places = [part.place for part in parts_of({}, dict.fromkeys(names, (3, 4)))]
    assert len(set(places)) == 2


@pytest.mark.parametrize(("tied", "count"), [(True, 1), (False, 2)])
def test_a_tied_head_counts_once(tied, count):
    shapes = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)}
    assert len(parts_of({"tie_word_embeddings": tied}, shapes)) == count
    assert len(parts_of({"text_config": {"tie_word_embeddings": tied}}, shapes)) == count


def test_a_configuration_that_does_not_say_has_its_model_types_default(tmp_path):
    assert is_tied({"model_type": "gemma"}) and is_tied({"model_type": "gpt2"})
    assert not is_tied({"model_type": "llama"}) and not is_tied({"model_type": "nobody_knows"})


def test_order_is_embedding_layers_rest(tmp_path):
    save_file({name: torch.zeros(2, 2) for name in ("lm_head.weight", "model.layers.10.mlp.up_proj.weight",
               "model.layers.9.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight")},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    places = [str(part.place) for part in Checkpoint(tmp_path).parts()]
    assert places == ["embedding.tokens", "layers.9.mlp.up", "layers.10.mlp.up", "norm.final", "head.head"]
