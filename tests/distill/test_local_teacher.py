"""Local teachers: dtype, quantization, offload between uses, and their bytes in a dry run."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model
from helpers.tiny_run import make_trainer
from trl import ModelConfig

from effopd import EffOPDConfig, OPDConfig
from effopd.distill.teachers import loading
from effopd.distill.teachers import offload as offloading
from effopd.distill.teachers.offload import Offloaded, in_use
from effopd.errors import CompatibilityError, ConfigError
from effopd.launch.run_models import loading_arguments
from effopd.models.logit_path import hidden_states

FAST = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}


def config(**settings):
    return OPDConfig(**({"report_to": "none", "use_cpu": True} | settings))


# -- dtype and quantization ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "student", "accelerator", "expected"),
    [
        ({}, "float32", False, "float32"),
        ({}, "float32", True, "bfloat16"),
        ({}, "bfloat16", False, "bfloat16"),
        ({}, "auto", True, "auto"),
        ({"teacher_dtype": "float32"}, "bfloat16", True, "float32"),
        ({"teacher_dtype": "float16"}, "float32", False, "float16"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "float32", False, "bfloat16"),
    ],
)
def test_the_teachers_dtype(settings, student, accelerator, expected, monkeypatch):
    monkeypatch.setattr(loading, "on_accelerator", lambda args: accelerator)
    monkeypatch.setattr(loading, "is_torch_bf16_gpu_available", lambda: True)
    own, other = loading_arguments(ModelConfig(dtype=student), config(**settings))
    assert other["dtype"] == expected
    assert own.get("dtype", "auto") == student


def test_an_accelerator_without_bfloat16_keeps_float32(monkeypatch):
    monkeypatch.setattr(loading, "on_accelerator", lambda args: True)
    monkeypatch.setattr(loading, "is_torch_bf16_gpu_available", lambda: False)
    assert loading.resolved_dtype(config()) == "float32"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"teacher_load_in_8bit": True, "teacher_load_in_4bit": True}, "teacher_load_in_4bit"),
        ({"teacher_dtype": "float32", "teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "teacher_dtype"),
        ({"teacher_load_in_8bit": True, "teacher_model_init_kwargs": {"quantization_config": {}}}, "quantization"),
        ({"teacher_load_in_4bit": True, "teacher_offload": True}, "teacher_offload"),
        ({"teacher_dtype": "int8"}, "teacher_dtype"),
        ({"teacher_shard": True, "teacher_offload": True}, "teacher_offload"),
        ({"teacher_shard": True, "teacher_load_in_4bit": True}, "teacher_load_in_4bit"),
        ({"teacher_shard": True, "teachers": ["a=x"]}, "teachers"),
        ({"rollouts": "x", "teacher_shard": True}, "teacher_shard"),
        ({"rollouts": "x", "teacher_dtype": "bfloat16"}, "teacher_dtype"),
        ({"rollouts": "x", "teacher_offload": True}, "teacher_offload"),
    ],
)  # fmt: skip
def test_contradicting_settings_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        config(**settings)


def test_settings_of_loading_need_a_path(tmp_path):
    with pytest.raises(ConfigError, match="teacher_dtype"):
        make_trainer(tmp_path, teacher_dtype="bfloat16")


@pytest.mark.parametrize(("kind", "bits"), [("8bit", "load_in_8bit"), ("4bit", "load_in_4bit")])
def test_quantization_reaches_the_loading_arguments(kind, bits):
    args = config(**{f"teacher_{bits}": True})
    made = loading.teacher_loading(args, {"dtype": "bfloat16"})["quantization_config"]
    assert args.quantization == kind and getattr(made, bits)
    if kind == "4bit":
        assert made.bnb_4bit_compute_dtype == torch.bfloat16 and made.bnb_4bit_quant_type == "nf4"
    assert "quantization_config" not in loading.teacher_loading(config(), {})


def test_a_path_is_loaded_in_the_dtype_of_the_flag(tmp_path):
    make_model(1).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", teacher=str(tmp_path / "teacher"), teacher_dtype="bfloat16", **FAST)
    assert trainer.teacher_model.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    trainer.train()
    assert trainer.state.global_step == 3


def test_an_8bit_teacher_trains(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    make_model(1).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", teacher=str(tmp_path / "teacher"), teacher_load_in_8bit=True, **FAST)
    linear = trainer.teacher_model.model.layers[0].mlp.up_proj.weight
    assert linear.dtype == torch.int8 and trainer.teacher_model.lm_head.weight.is_floating_point()
    trainer.train()
    assert trainer.state.global_step == 3


# -- offload ---------------------------------------------------------------------------------------


def fake_device(model):
    """An `Offloaded` whose device is a second copy in host memory: moves can be counted."""
    moved, back = [], []

    def to_device(tensor):
        moved.append(tensor.data_ptr())
        return tensor.clone()

    def to_host(tensor):
        back.append(tensor.data_ptr())
        return tensor.clone()

    return Offloaded(model, to_device, to_host), moved, back


def test_offloaded_weights_are_on_the_device_only_in_use():
    model, ids = make_model(1).requires_grad_(False), torch.arange(12)[None]
    with torch.no_grad():
        before = hidden_states(model, ids, torch.ones_like(ids))
        offloaded, moved, back = fake_device(model)
        head = model.lm_head.weight.data_ptr()
        layer = model.model.layers[0].mlp.up_proj.weight
        rest = layer.data_ptr()
        seen = []
        model.model.layers[0].register_forward_hook(lambda *_: seen.append(layer.data_ptr()))
        after = hidden_states(model, ids, torch.ones_like(ids))
    assert torch.equal(before, after)
    assert seen and seen[0] != rest and layer.data_ptr() == rest and not offloaded.on_device
    backbone = sum(p.nbytes for p in model.model.parameters())
    assert offloaded.nbytes == backbone - model.lm_head.weight.nbytes  # tied: it stays
    assert model.lm_head.weight.data_ptr() == head
    assert len(moved) == len(back) and offloaded.moved_bytes == offloaded.nbytes


def test_hold_moves_once_and_an_exception_moves_back():
    model, ids = make_model(1).requires_grad_(False), torch.arange(12)[None]
    offloaded, moved, _ = fake_device(model)
    with offloaded.hold():
        for _ in range(3):
            model(ids)
        assert offloaded.on_device
    count = len(moved)
    assert offloaded.moved_bytes == offloaded.nbytes and not offloaded.on_device
    with pytest.raises(IndexError):
        model(torch.full((1, 2), 10_000))  # outside of the embedding
    assert not offloaded.on_device and len(moved) == 2 * count


def test_a_run_with_an_offloaded_teacher_equals_one_without(tmp_path, monkeypatch):
    """Training, search, evaluation: the same rows, and the weights rest in host memory after."""

    def run(folder):
        trainer = make_trainer(folder, effopd=EffOPDConfig("line_search", score_rollouts=8), **FAST)
        trainer.train()
        return trainer

    plain = run(tmp_path / "a")
    made = []

    def faked(model, accelerator):
        offloaded, *_ = fake_device(model)
        offloading._OFFLOADED[model] = offloaded
        made.append(offloaded)
        return model

    monkeypatch.setattr("effopd.distill.teachers.mixin.offload", faked)
    settings = FAST | {"teacher_offload": True}
    trainer = make_trainer(tmp_path / "b", effopd=EffOPDConfig("line_search", score_rollouts=8), **settings)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))
    assert made[0].moved_bytes > 4 * made[0].nbytes and not made[0].on_device


def test_on_the_cpu_nothing_moves_and_the_log_says_so(tmp_path, caplog):
    trainer = make_trainer(tmp_path, teacher_offload=True, **FAST)
    assert "teacher_offload=True has no effect" in caplog.text
    with in_use(trainer.teacher_model):
        pass


def test_sharding_needs_fsdp2(tmp_path):
    with pytest.raises(ConfigError, match="teacher_shard"):
        make_trainer(tmp_path, teacher_shard=True, **FAST)


def test_a_model_without_a_backbone_cannot_be_offloaded():
    model = make_model(1)
    model.base_model_prefix = "none_of_its_modules"
    with pytest.raises(CompatibilityError, match="teacher_offload"):
        Offloaded(model, torch.clone, torch.clone)
