"""Fused, transposed and stacked tensors are cut as the model's own code cuts them; one model in two
layouts is one model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from effopd.errors import WeightsError
from effopd.weights import Checkpoint, Difference, open_checkpoint
from effopd.weights.parts import parts_of

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
KINDS = {
    "codegen": {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "rotary_dim": 4},
    "codegen, eight heads": {
        "vocab_size": 40,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 8,
        "n_positions": 16,
        "rotary_dim": 2,
    },
    "gpt_bigcode": {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    "gpt_bigcode, per head": {
        "vocab_size": 40,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 16,
        "multi_query": False,
    },
    "gpt2": {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    "openai-gpt": {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "bloom": {"vocab_size": 40, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "falcon": SIZES | {"alibi": False},
    "falcon, per head": SIZES | {"multi_query": False},
    "falcon, groups": SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"vocab_size": 40, "d_model": 32, "n_layers": 1, "n_heads": 4},
    "dbrx": {
        "vocab_size": 40,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 4,
        "max_seq_len": 16,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e9, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "persimmon": SIZES | {"intermediate_size": 48},
    "phi3": SIZES | {"intermediate_size": 48, "num_key_value_heads": 2},
    "llama": SIZES | {"intermediate_size": 48, "num_key_value_heads": 2},
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition(",")[0], **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def attention_run(model: torch.nn.Module, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of the attention of the first layer."""
    seen = {}

    def hook(module, args, kwargs, output) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple | list) else output
        seen.setdefault("both", (hidden.reshape(tokens, -1), first.reshape(tokens, -1)))

    name = next(
        n for n, _ in model.named_modules() if n.endswith((".attn", ".self_attn", ".attention", ".self_attention"))
    )
    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + tokens)[None], use_cache=False)
    handle.remove()
    return seen["both"]


@pytest.mark.parametrize("kind", KINDS)
def test_q_k_and_v_are_those_of_the_forward_pass(kind):
    """With one token q and k do nothing; a q that is changed along what the last token is
    orthogonal to does nothing for it.

    The parts cover each tensor exactly once, so norms add up.
    """
    model = build(kind)
    parameters = dict(model.named_parameters())
    parts = parts_of(model.config.to_dict(), {n: tuple(p.shape) for n, p in parameters.items()})
    for name in {part.tensor for part in parts}:
        count = torch.zeros_like(parameters[name])
        for part in parts:
            if part.tensor == name:
                part.put(count, part.view(count) + 1)
                assert tuple(part.view(count).shape) == part.shape
        assert (count == 1).all(), name
    alone, (x, last) = attention_run(model, 1)[1], attention_run(model, 3)
    found = {part.place.matrix: part for part in parts if part.place.module == "attention" and part.is_matrix}
    assert {"q", "k", "v"} <= found.keys()
    for matrix, expected in (("q", (False, False)), ("k", (False, True)), ("v", (True, True))):
        part, tensor = found[matrix], parameters[found[matrix].tensor].data
        before = tensor.clone()
        direction = torch.randn(1, part.shape[1], dtype=torch.float64)
        direction -= (direction @ x[-1]) * x[-1] / x[-1].square().sum()
        rows = torch.randn(part.shape[0], 1, dtype=torch.float64)
        signs = []
        for tokens, change in ((1, torch.randn(part.shape, dtype=torch.float64)), (3, rows * direction)):
            part.put(tensor, part.view(before) + change)
            now = attention_run(model, tokens)[1][-1]
            signs.append(bool((now - (alone if tokens == 1 else last)[-1]).abs().max() > 1e-8))
            tensor.copy_(before)
        assert tuple(signs) == expected, (matrix, signs)


def test_an_unknown_fused_layout_stays_whole():
    shapes = {
        "model.layers.0.attention.wqkv.weight": (96, 32),
        "model.layers.0.self_attn.qkv_proj.weight": (96, 32),
        "model.layers.0.mlp.gate_up_proj.weight": (96, 32),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 96, 32),
    }
    config = {"model_type": "internlm99", "hidden_size": 32, "num_attention_heads": 4}
    assert [p.shape for p in parts_of(config, shapes)] == list(shapes.values())


def experts(config: dict, gate_up: tuple[int, int], down: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    stem = "model.language_model.layers.0.mlp.experts."
    shapes = {f"{stem}gate_up_proj": (4, *gate_up), f"{stem}down_proj": (4, *down)}
    return {part.place.matrix: part for part in parts_of(config, shapes)}


@pytest.mark.parametrize("intermediate", [24, 16, 32, 64])
@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_moe", "nobody_knows"])
def test_stacked_experts_are_oriented_by_their_shapes(kind, intermediate):
    """gate_up [E, 2I, H] with down [E, H, I], or both transposed: told apart together, also where H
    = 2I.
    """
    size = {"hidden_size": 32, "moe_intermediate_size": intermediate}
    config = {"model_type": kind, "text_config": {"model_type": f"{kind}_text", **size}}
    tensors = {"gate_up": torch.randn(4, 2 * intermediate, 32), "down": torch.randn(4, 32, intermediate)}
    as_held = experts(config, (2 * intermediate, 32), (32, intermediate))
    as_published = experts(config, (32, 2 * intermediate), (intermediate, 32))
    assert as_held["experts.1.down"].shape == as_published["experts.1.down"].shape == (32, intermediate)
    known = kind != "nobody_knows"  # else it is not known which half of gate_up is which
    for matrix in ("gate", "up", "down") if known else ("down",):
        stored = tensors["down" if matrix == "down" else "gate_up"]
        held, published = (found[f"experts.1.{matrix}"] for found in (as_held, as_published))
        assert torch.equal(held.view(stored), published.view(stored.transpose(1, 2)))
    assert ("experts.1.up" in as_held) == ("experts.1.up" in as_published) == known
    if known:
        assert torch.equal(as_held["experts.1.up"].view(tensors["gate_up"]), tensors["gate_up"][1, intermediate:])


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_as_published_and_as_saved_are_one_model(tmp_path):
    """The files of the Hub hold Qwen3-VL-MoE's experts transposed; an update of one gate is found
    in that gate.
    """
    size = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 4}
    config = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", **size}}
    stem = "model.language_model.layers.0.mlp.experts."
    torch.manual_seed(0)
    base = {f"{stem}gate_up_proj": torch.randn(4, 32, 48), f"{stem}down_proj": torch.randn(4, 24, 32)}
    change = torch.randn(32, 1) @ torch.randn(1, 24)
    trained = {name: t.clone() for name, t in base.items()}
    trained[f"{stem}gate_up_proj"][1, :, :24] += change
    published = save(tmp_path / "published", base, config)
    for name, tensors in (("as-published", trained), ("as-held", {n: t.transpose(1, 2) for n, t in trained.items()})):
        difference = Difference(Checkpoint(published), Checkpoint(save(tmp_path / name, tensors, config)))
        norms = {str(u.part.place): u.norm() for u in difference.updates() if u.norm() > 0}
        assert norms == {"layers.0.mlp.experts.1.gate": pytest.approx(float(change.norm()), rel=1e-5)}
        update = next(u for u in difference.updates() if u.norm() > 0)
        assert update.part.shape == (24, 32) and torch.linalg.matrix_rank(update.delta(), atol=1e-4) == 1


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    """One Mixture-of-Experts model twice: experts one by one, as on the Hub, and stacked, as
    transformers holds them.
    """
    folder = tmp_path_factory.mktemp("layouts")
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_key_value_heads=2, num_experts=3, moe_intermediate_size=12, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "stacked", save_original_format=False)
    return folder


@pytest.mark.parametrize("sides", [("single", "stacked"), ("stacked", "single")])
def test_one_model_in_two_layouts(layouts, tmp_path, sides):
    base, trained = (Checkpoint(layouts / side) for side in sides)
    assert base.shapes.keys() != trained.shapes.keys()
    assert not any(update.norm() for update in Difference(base, trained).updates())
    tensors = load_file(layouts / sides[1] / "model.safetensors")
    change = torch.randn(12, 32)
    if sides[1] == "single":
        tensors["model.layers.0.mlp.experts.1.up_proj.weight"] += change
    else:
        tensors["model.layers.0.mlp.experts.gate_up_proj"][1, 12:] += change
    moved = save(tmp_path / "moved", tensors, trained.config)
    norms = {str(u.part.place): u.norm() for u in Difference(base, Checkpoint(moved)).updates() if u.norm() > 0}
    assert norms == {"layers.0.mlp.experts.1.up": pytest.approx(float(change.norm()), rel=1e-5)}


def test_an_expert_too_many_is_not_overlooked(layouts, tmp_path):
    tensors = load_file(layouts / "stacked" / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    more = tensors | {name: torch.cat([tensors[name], tensors[name][:1]])}
    folder = save(tmp_path / "more", more, Checkpoint(layouts / "stacked").config)
    with pytest.raises(WeightsError, match=rf"1 extra \('{name}'"):
        Difference(Checkpoint(layouts / "single"), open_checkpoint(folder))


def test_a_layout_that_cannot_be_paired_says_how_to_go_on(tmp_path):
    config = {"model_type": "llama"}
    base = save(tmp_path / "base", {"model.layers.0.x.weight": torch.ones(4, 6)}, config)
    other = save(tmp_path / "other", {f"model.layers.0.y{i}.weight": torch.ones(4, 3) for i in (0, 1)}, config)
    with pytest.raises(WeightsError, match=r"one model saved in two layouts: load and save both with transformers"):
        Difference(Checkpoint(base), Checkpoint(other))
