"""The memory estimate against what a training step really holds; and sizes without a download."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny_models import make_model
from trl import ModelConfig

from effopd import EffOPDConfig, OPDConfig
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.lora_weights import LoraWeights
from effopd.launch.dry_run import memory_table
from effopd.launch.memory_estimate import (
    _ALLOCATOR,
    SETUPS,
    _frozen_bytes,
    _peak,
    estimate_memory,
    step_shape,
    teacher_choices,
)
from effopd.launch.model_size import ModelSize, model_size, size_of
from effopd.launch.model_states import REPLICATED, fsdp2, model_state_bytes, optimizer_state_bytes, sampled_whole, zero
from effopd.launch.opd import RunSettings
from effopd.launch.run_models import loading_arguments
from effopd.launch.step_memory import StepMemory, StepShape, saved_bytes, step_memory
from effopd.launch.teacher_memory import TeacherSize
from effopd.tasks import TaskConfig
from effopd.tasks import builtin_models as testbed


@pytest.mark.parametrize("rule", ["attention+mlp", "all"])
def test_the_estimate_is_what_a_step_and_a_search_hold(rule):
    model = make_model(0)
    optimizer = torch.optim.AdamW(model.parameters())
    look_ahead = LiveWeights(model, rule)
    model(torch.arange(4)[None]).logits.sum().backward()
    optimizer.step()
    look_ahead.begin()
    size = size_of(model.config)
    found = model_state_bytes(size, 0, moved=size.selected(rule))
    parameters = list(model.parameters())
    assert found["weights"] == sum(p.nbytes for p in parameters)
    assert found["gradients"] == sum(p.grad.nbytes for p in parameters)
    moments = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert found["optimizer"] == sum(t.nbytes for t in moments)
    assert found["anchor"] + found["candidate"] == look_ahead.nbytes


def test_a_search_over_adapters_holds_their_factors_only():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(0), peft.LoraConfig(r=2, target_modules="all-linear"))
    look_ahead = LoraWeights(model, "all")
    look_ahead.begin()
    student = testbed.student_path()
    lora = ModelConfig(str(student), use_peft=True, lora_r=2, lora_target_modules="all-linear")
    opd = OPDConfig(teacher_model_name_or_path=str(testbed.teacher_path()), use_cpu=True)
    found = estimate_memory(RunSettings(lora, TaskConfig("testbed:chain_sum"), opd, EffOPDConfig("line_search")), 20)
    one, eight, *_ = found.columns
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert look_ahead.nbytes == 8 * trained  # anchor and candidate
    assert one["anchor"] == one["candidate"] == one["gradients"] < one["weights"]
    assert eight["anchor"] == one["anchor"]  # every rank holds all factors


def test_sharding_divides_everything_but_the_teacher():
    size = ModelSize(8_000_000, "name")
    whole = model_state_bytes(size, 1000, moved=size.parameters)
    shared = model_state_bytes(size, 1000, fsdp2(8), moved=size.parameters)
    assert SETUPS[0].sharding(half=True) == REPLICATED  # DDP
    assert shared.pop("teacher") == whole.pop("teacher") == 1000
    assert {name: 8 * value for name, value in shared.items()} == whole
    assert "anchor" not in model_state_bytes(size, 0)  # plain OPD


@pytest.mark.parametrize(
    ("stage", "half", "weights", "gradients"),
    [
        (1, True, 2 * 8, 2 * 8 + 4),
        (2, True, 2 * 8, 2 + 4),
        (3, True, 2, 2 + 4),
        (1, False, 4 * 8, 4 * 8 + 4),
        (2, False, 4 * 8, 4 + 4),
        (3, False, 4, 4 + 4),
    ],
)
def test_zero_divides_moments_then_gradients_then_weights(stage, half, weights, gradients):
    """Bytes per parameter, times 8 ranks: the masters are fp32 and sharded in every stage."""
    size = ModelSize(8_000_000, "name", layers=4)
    found = model_state_bytes(size, 1000, zero(stage, 8, half=half), moved=8_000_000)
    million = {name: value / 1e6 for name, value in found.items()}
    states = {"weights": weights, "gradients": gradients, "masters": 4, "optimizer": 8, "anchor": 4, "candidate": 4}
    gathered = {"gathered": 2 * (2 if half else 4) * 8 / 4} if stage == 3 else {}
    assert million == pytest.approx({**states, **gathered, "teacher": 0.001})


def test_zero_counts_adapters_quantized_weights_and_other_optimizers():
    size = ModelSize(1000, "name")
    sharding = zero(2, 4, half=True)
    found = model_state_bytes(size, 0, sharding, trained=80, weight_bytes=0.5, optim="sgd")
    assert found == {"weights": 660, "gradients": 120, "masters": 80, "optimizer": 0, "teacher": 0}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("trained", [None, 77])
@pytest.mark.parametrize("moved", [None, 555])
def test_properties_of_the_stages_of_zero(half, trained, moved):
    """Every stage shards what the one before shards; one rank shares nothing; nothing is lost."""
    size = ModelSize(1001, "name", layers=3)
    given = {"trained": trained, "moved": moved, "weight_bytes": 4, "optim": "adamw"}

    def states(stage, ranks, **more):
        found = model_state_bytes(size, 10, zero(stage, ranks, half=half), **{**given, **more})
        gathered = found.pop("gathered", 0)
        assert (gathered > 0) == (stage == 3)
        return found

    alone, one, two, three = states(1, 1), *(states(stage, 8) for stage in (1, 2, 3))
    assert states(2, 1) == states(3, 1) == alone
    assert all(one[name] >= two[name] >= three[name] for name in alone)
    assert {name for name in alone if one[name] != two[name]} == {"gradients"}
    assert {name for name in alone if two[name] != three[name]} == {"weights"}
    for name in alone.keys() - {"teacher"}:  # in stage 3 all ranks together hold each state once
        assert alone[name] <= 8 * three[name] < alone[name] + 2 * 8
    # what does not depend on the precision is that of DDP, and in fp32 the weights too
    replicated = model_state_bytes(size, 10, **given)
    same = {"optimizer", "teacher", "anchor", "candidate"} | ({"weights"} if not half else set())
    assert {name: alone[name] for name in same & alone.keys()} == {
        name: replicated[name] for name in same & replicated.keys()
    }
    assert alone["gradients"] == replicated["gradients"] // (2 if half else 1) + alone["masters"]
    assert states(3, 8, anchor_here=False).get("anchor", 0) == 0


@pytest.mark.parametrize("trained", [None, 80])
def test_one_rank_of_fsdp_holds_what_a_process_holds(trained):
    size = ModelSize(1000, "name", layers=4)
    given = {"moved": 500, "trained": trained, "weight_bytes": 0.5}
    found, alone = model_state_bytes(size, 7, fsdp2(1), **given), model_state_bytes(size, 7, **given)
    assert found.pop("gathered") == 1000 and found == alone
    eight = model_state_bytes(size, 7, fsdp2(8), **given)
    assert eight["anchor"] == (250 if trained is None else 2000)  # of adapters, every rank holds it all


def test_a_dry_run_shows_the_stages_of_zero(tmp_path):
    """With bf16, DeepSpeed casts the teacher; stage 3 gathers the student while it samples."""
    settings = teacher_settings(tmp_path, bf16=True)
    size = size_of(make_model(0, hidden=32).config)
    found = estimate_memory(settings, 8)
    columns = dict(zip((setup.heading for setup in SETUPS), found.columns, strict=True))
    one, *stages = [columns[name] for name in ("1 GPU, or DDP", "8 × ZeRO 1", "8 × ZeRO 2", "8 × ZeRO 3")]
    assert [each["teacher"] for each in stages] == [one["teacher"] // 2] * 3
    assert [each["weights"] for each in stages] == [2 * size.parameters] * 2 + [math.ceil(2 * size.parameters / 8)]
    assert stages[2]["sampling"] == stages[1]["sampling"] + 2 * size.parameters
    assert sampled_whole(size, teacher_settings(tmp_path, ds3_gather_for_generation=False).opd) == 0
    table = memory_table(found)
    assert [column.header for column in table.columns][-3:] == list(columns)[-3:]
    assert "masters" in list(table.columns[0].cells) and "not counted" in str(table.caption)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen3-1.7B-Base", 1.7), ("Qwen/Qwen3-30B-A3B", 30), ("x/gpt2-124M", 0.124), ("x/DAPO-Qwen-32B/", 32)],
)
def test_a_name_tells_the_size_of_a_model_that_is_not_here(name, billions):
    assert model_size(name) == ModelSize(round(billions * 1e9), "name")


def test_a_name_without_a_size_is_unknown():
    assert model_size("someone/model-v2") is None


def test_a_folder_is_measured_by_its_configuration(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    assert size.source == "configuration" and size.parameters == make_model(0).num_parameters()
    assert size.layers == make_model(0).config.num_hidden_layers


def saved_by_autograd(model, rows, length, autocast=False):
    """Bytes that one real forward saves, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_a_forward_saves(bf16):
    model = make_model(0).train()
    model.config.architectures = ["Qwen3ForCausalLM"]
    found = saved_bytes(model.config, StepShape(rows=3, prompt=5, answer=6, bf16=bf16))
    assert found == pytest.approx(saved_by_autograd(model, 3, 11, bf16), rel=0.05)


def test_checkpointing_keeps_less_and_more_tokens_take_more():
    config = make_model(0).config
    config.architectures = ["Qwen3ForCausalLM"]
    whole, part = (
        step_memory(config, None, StepShape(rows=8, prompt=20, answer=20, checkpointing=on)) for on in (False, True)
    )
    assert part.activations < whole.activations and part.loss == whole.loss > 0
    longer = step_memory(config, None, StepShape(rows=8, prompt=20, answer=40, checkpointing=False))
    assert longer.activations > whole.activations and longer.sampling > whole.sampling


def test_a_teacher_that_samples_along_takes_as_much_as_a_student_of_its_size():
    config = make_model(0).config
    config.architectures = ["Qwen3ForCausalLM"]
    alone, along = (
        step_memory(config, config, StepShape(rows=8, prompt=20, answer=20, mixed=mixed)) for mixed in (False, True)
    )
    assert along.sampling == 2 * alone.sampling > 0 and along.loss == alone.loss


def test_a_step_samples_all_of_its_rollouts_at_once_and_trains_on_one_micro_batch_of_a_part(tmp_path):
    def shape(**settings):
        base = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 8}
        opd = OPDConfig(**base | settings)
        return step_shape(
            RunSettings(ModelConfig(), TaskConfig("testbed:chain_sum"), opd, EffOPDConfig("none")), prompt=5
        )

    assert (shape().rows, shape().sampled) == (8, 8)
    accumulated = shape(gradient_accumulation_steps=3)
    assert (accumulated.rows, accumulated.sampled) == (8, 24)
    parts = shape(updates_per_rollouts=4, num_mini_batches=4, gradient_accumulation_steps=3)
    assert (parts.rows, parts.sampled) == (2, 24)


@pytest.mark.parametrize(
    ("optim", "states"),
    [
        ("adamw_torch_fused", 8),
        ("sgd", 0),
        ("paged_adamw_8bit", 2),
        ("adamw_torch_4bit", 1),
        ("adafactor", 0.1),
        ("new", 8),
    ],
)
def test_states_of_optimizers(optim, states):
    assert optimizer_state_bytes(optim) == states
    found = model_state_bytes(ModelSize(1000, "name"), 0, optim=optim, trained=100, weight_bytes=2)
    assert found["optimizer"] == 100 * states and found["gradients"] == 400 and found["weights"] == 2400


# -- the teacher's weights -------------------------------------------------------------------------


def teacher_settings(tmp_path, **settings):
    for name, seed in (("student", 0), ("teacher", 1)):
        if not (tmp_path / name).exists():
            make_model(seed, hidden=32).save_pretrained(tmp_path / name)
    opd = OPDConfig(
        output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, max_completion_length=8,
        **{"teacher_model_name_or_path": str(tmp_path / "teacher")} | settings,
    )  # fmt: skip
    model = ModelConfig(model_name_or_path=str(tmp_path / "student"))
    return RunSettings(model, TaskConfig(task="testbed:chain_sum"), opd, EffOPDConfig("none"))


def test_bytes_of_a_teacher_by_choice():
    model = make_model(0, hidden=32)
    size = TeacherSize.of(size_of(model.config))
    whole = model.num_parameters()
    linear = sum(
        m.weight.numel() for layer in model.model.layers for m in layer.modules() if hasattr(m, "in_features")
    )
    head = 64 * 32  # tied
    assert (size.parameters, size.linear, size.head) == (whole, linear, head)
    assert size.weights("float32") == 4 * whole == sum(p.nbytes for p in model.parameters())
    assert size.weights("bfloat16") == size.weights("float16") == 2 * whole
    assert size.weights("bfloat16", "8bit") == math.ceil(1.06 * linear + 2 * (whole - linear))
    assert size.weights("float32", "4bit") == math.ceil(0.56 * linear + 4 * (whole - linear))
    assert size.at_rest("bfloat16") == 2 * head
    assert size.layers == sum(p.numel() for p in model.model.layers.parameters())
    assert size.sharded("bfloat16", 2) == 2 * (whole - size.layers + math.ceil(size.layers / 2))
    unknown = TeacherSize.of(ModelSize(1_000, "name"))
    assert unknown.weights("bfloat16", "4bit") == 560
    assert unknown.at_rest("bfloat16") is None and unknown.sharded("bfloat16", 8) is None


def test_a_dry_run_counts_the_teacher_that_is_chosen(tmp_path):
    size = TeacherSize.of(size_of(make_model(1, hidden=32).config))

    def teacher(count=1, **settings):
        opd = teacher_settings(tmp_path, **settings).opd
        return _frozen_bytes(opd, [size] * count, loading_arguments(ModelConfig(), opd)[1])

    assert teacher() == (size.weights("float32"), 0)
    assert teacher(teacher_dtype="bfloat16") == (size.weights("bfloat16"), 0)
    assert teacher(teacher_load_in_8bit=True) == (size.weights("float32", "8bit"), 0)
    assert teacher(teacher_load_in_4bit=True, teacher_dtype="float16") == (size.weights("float16", "4bit"), 0)
    rest, visiting = teacher(teacher_offload=True)
    assert rest == size.at_rest("float32") and rest + visiting == size.weights("float32")
    opd = teacher_settings(tmp_path, teacher_shard=True).opd
    assert _frozen_bytes(opd, [size], {"dtype": "float32"}, 8) == (size.sharded("float32", 8), 0)
    several = {"teacher_model_name_or_path": None, "teachers": ["a=x", "b=y"]}
    assert teacher(2, **several) == (2 * size.weights("float32"), 0)
    assert teacher(2, **several, teachers_in_memory="one") == (size.weights("float32"), 0)
    columns = estimate_memory(teacher_settings(tmp_path, teacher_offload=True), 8).columns
    assert all((column["teacher"], column["teacher in use"]) == (rest, visiting) for column in columns)


def test_offload_lowers_the_peak_only_while_the_teacher_is_not_in_use():
    step = StepMemory(sampling=0, activations=100, loss=100, evaluation=0, health=0)
    column = {"weights": 10, "gradients": 5, "teacher": 0}
    assert _peak(column, step, accumulates=False, visiting=3) == _peak(column, step, accumulates=False)
    large = _peak(column, step, accumulates=True, visiting=10_000)
    assert large == round(_ALLOCATOR * (10 + 10_000 + 5))
    sampling = StepMemory(sampling=300, activations=100, loss=100, evaluation=0, health=0)
    peaks = [_peak(column, sampling, accumulates=True, visiting=10_000, mixed=mixed) for mixed in (False, True)]
    assert peaks == [large, round(_ALLOCATOR * (10 + 10_000 + 300))]


@pytest.mark.parametrize("choice", [{}, {"teacher_dtype": "bfloat16"}, {"teacher_load_in_8bit": True}])
def test_the_plan_names_the_bytes_of_each_choice(tmp_path, choice):
    text = teacher_choices(teacher_settings(tmp_path, **choice))
    kind = {"teacher_dtype": "bfloat16", "teacher_load_in_8bit": "8 bits"}.get(next(iter(choice), ""), "float32")
    assert f"GB in {kind}" in text
    assert all(name in text for name in ("float32", "bfloat16", "8 bits", "4 bits", "offloaded"))
