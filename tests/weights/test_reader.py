"""Reading is lazy, exact and bounded; every damaged checkpoint gets an error that names the file
and the tensor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from effopd.analysis.analyze import analyze
from effopd.errors import CheckpointError, WeightsError
from effopd.weights import Adapter, Checkpoint, Difference, open_checkpoint, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def shard(folder) -> None:
    """The same checkpoint in three files."""
    tensors = load_file(folder / "model.safetensors")
    names, index = list(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        index |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_reads_what_was_written(folder):
    expected = load_file(folder / "model.safetensors")
    for again in (False, True):
        if again:
            shard(folder)
        checkpoint = Checkpoint(folder)
        assert checkpoint.shapes == {name: tuple(t.shape) for name, t in expected.items()}
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.load(name), tensor)
            assert checkpoint.dtypes[name] == tensor.dtype
            assert checkpoint.files[name].is_file()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "scalar": torch.tensor(2.0, dtype=dtype),
        "none": torch.zeros(0, 4).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == dtype and torch.equal(loaded, tensor)


def test_a_tensor_in_use_is_read_once(folder):
    checkpoint = Checkpoint(folder)
    name = next(iter(checkpoint.shapes))
    first = checkpoint.load(name)
    assert checkpoint.load(name) is first
    first_view = first[:2]
    del first
    assert checkpoint.load(name)[:2].data_ptr() == first_view.data_ptr()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's VmHWM")
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """Forty tensors of 8 MiB one after the other: the peak grows by a few of them, not by all;
    keeping them shows it.
    """
    save_file({f"t{i}": torch.ones(2**21) for i in range(40)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    code = """
import re, sys
from pathlib import Path
from effopd.weights import Checkpoint
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
checkpoint = Checkpoint(sys.argv[1])
checkpoint.load("t0")
start = peak()
for name in checkpoint.shapes:
    checkpoint.load(name)
print(peak() - start)
kept = [checkpoint.load(name) for name in checkpoint.shapes]
print(peak() - start)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    streamed, kept = map(float, run.stdout.split())
    assert streamed < 4 * 8 and kept > 30 * 8


def damage(folder, what: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "no header":
        file.write_bytes(b"\x00" * 4)
    elif what == "garbage":
        file.write_bytes(b"PK\x03\x04" * 100)
    elif what == "header":
        file.write_bytes(file.read_bytes().replace(b"data_offsets", b"data_off?ets", 1))
    elif what == "offsets":
        file.write_bytes(file.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1))
    elif what == "html":
        file.write_bytes(b"<html>" + b"x" * 500)
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "bad config":
        (folder / "config.json").write_text("[1, 2]")
    elif what == "empty":
        save_file({}, file)
    elif what == "pickle":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif what == "nothing":
        file.unlink()
    elif what == "loose shards":
        file.rename(folder / "model-00001-of-00002.safetensors")
    elif what == "two layouts":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    elif what == "quantized":
        save_file(tensors | {first: torch.zeros(3, dtype=torch.int8)}, file)
    else:
        shard(folder)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        if what == "lost shard":
            (folder / "model-00002-of-00003.safetensors").unlink()
        elif what == "wrong index":
            content["weight_map"]["model.invented.weight"] = "model-00001-of-00003.safetensors"
        elif what == "short index":
            content["weight_map"].pop(first)
        elif what == "empty index":
            content = {}
        index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"model\.safetensors is cut short: tensor '.+' ends at byte"),
        ("no header", "is not a safetensors file, or is cut short"),
        ("garbage", "is not a safetensors file, or is cut short"),
        ("header", r"model\.safetensors is damaged: its header does not describe tensor '.+'"),
        ("offsets", r"model\.safetensors is damaged"),
        ("html", "is not a safetensors file, or is cut short"),
        ("no config", "config.json is missing"),
        ("bad config", "expected a JSON object, got list"),
        ("empty", "holds no tensors"),
        ("pickle", r"pytorch_model\.bin.*convert the folder once"),
        ("nothing", r"has no model\.safetensors"),
        ("loose shards", "but no index; copy the index too"),
        ("two layouts", "has both model.safetensors and"),
        (
            "lost shard",
            r"model-00002-of-00003\.safetensors is missing, which model\.safetensors\.index\.json names for",
        ),
        ("wrong index", r"says that tensor 'model\.invented\.weight' is in model-00001-of-00003\.safetensors"),
        ("short index", "does not list"),
        ("empty index", "expected a `weight_map`"),
    ],
)
def test_damaged_checkpoints(folder, what, message):
    damage(folder, what)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_quantized_weights_are_refused(folder):
    damage(folder, "quantized")
    with pytest.raises(WeightsError, match=r"tensor '.+' of .+ has dtype I8.*dequantize"):
        Checkpoint(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(folder, bad):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = bad
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    with pytest.raises(
        WeightsError,
        match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of .*model\.safetensors is not finite \(1 of",
    ):
        checkpoint.load(name)


def test_a_file_that_shrinks_after_opening(folder):
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="has changed or is cut short at tensor"):
        for name in checkpoint.shapes:
            checkpoint.load(name)


def test_a_name_of_the_hub(tmp_path):
    with pytest.raises(CheckpointError, match="hf download"):
        Checkpoint("Qwen/Qwen3-0.6B")
    with pytest.raises(WeightsError, match="has no tensor 'x'"):
        make_model(0).save_pretrained(tmp_path)
        Checkpoint(tmp_path).load("x")


def test_buffers_of_old_checkpoints_are_no_weights(tmp_path):
    tensors = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "h.0.attn.c_attn.bias": torch.zeros(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(Checkpoint(tmp_path).shapes) == ["h.0.attn.c_attn.bias"]


def test_open_checkpoint_knows_adapters(folder):
    assert isinstance(open_checkpoint(folder), Checkpoint)
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    assert isinstance(open_checkpoint(folder), Adapter)


W = "model.layers.0.mlp.up_proj.weight"


def save(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return Checkpoint(folder)


def norms(base, trained):
    return {str(update.part.place): update.norm() for update in Difference(base, trained).updates()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_may_differ(tmp_path, dtype):
    base, trained = (
        save(tmp_path / "base", {W: torch.ones(4, 4)}),
        save(tmp_path / "t", {W: 1.5 * torch.ones(4, 4).to(dtype)}),
    )
    assert norms(base, trained) == norms(trained, base) == {"layers.0.mlp.up": 2.0}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (W, torch.int8), (W, torch.int64), (W, torch.bool), (W, torch.float8_e4m3fn), (W, torch.float8_e5m2),
        (W, torch.complex64), (W.replace("weight", "qweight"), torch.int32), (f"{W}_packed", torch.uint8),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.uint8), (f"{W}.absmax", torch.uint8),
    ],
)  # fmt: skip
def test_weights_of_other_dtypes_are_refused(tmp_path, name, dtype):
    with pytest.raises(WeightsError, match=rf"tensor '{name}' .* has dtype .*dequantize the checkpoint"):
        save(tmp_path / "base", {name: torch.ones(4, 4).to(dtype), "model.norm.weight": torch.ones(4)})


@pytest.mark.parametrize("table", [torch.arange(5), torch.tensor([True, False]), torch.zeros(0, dtype=torch.int32)])
def test_integer_tables_are_kept_and_have_to_be_equal(tmp_path, table):
    base = save(tmp_path / "base", {W: torch.ones(4, 4), "model.tid2eid": table})
    assert list(base.shapes) == [W] and base.tables == ("model.tid2eid",)
    trained = save(tmp_path / "t", {W: 2 * torch.ones(4, 4), "module.model.tid2eid": table})
    assert norms(base, trained) == {"layers.0.mlp.up": 4.0}
    written = Checkpoint(write_checkpoint(base, lambda name, t: t, tmp_path / "out", dtype=torch.bfloat16))
    assert torch.equal(written.load_table("model.tid2eid"), table) and written.dtypes[W] == torch.bfloat16
    for i, other in enumerate(
        [{}, {"model.tid2eid": torch.cat([table, table, table[:1] if len(table) else torch.ones(1).int()])}]
    ):
        with pytest.raises(WeightsError, match=r"integer or boolean tensor 'model\.tid2eid' is not the same"):
            Difference(base, save(tmp_path / f"other-{i}", {W: torch.ones(4, 4), **other}))


def test_scalars_and_empty_tensors(tmp_path):
    rest = {"model.e": torch.zeros(0), "model.m": torch.zeros(0, 4)}
    base = save(tmp_path / "base", {W: torch.ones(4, 4), "model.beta": torch.tensor(1.0), **rest})
    trained = save(tmp_path / "t", {W: torch.ones(4, 4), "model.beta": torch.tensor(3.0), **rest})
    assert norms(base, trained) == {
        "layers.0.mlp.up": 0.0, "other.model.beta": 2.0, "other.model.e": 0.0, "other.model.m": 0.0,
    }  # fmt: skip
    done = analyze(base.path, {"opd": trained.path}, tmp_path / "out", k=2, base_spectrum=True)
    assert done.summary["groups"]["opd"]["update_norm"]["mean"] == 2.0


@pytest.mark.parametrize("files", [[], {}, [1], {W: 3}, {W: None}, {W: "lost.safetensors"}, {W: "empty.safetensors"}])
def test_an_index_that_names_no_shard(tmp_path, files):
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=r"weight_map|is missing, which|is in empty\.safetensors, but it is not"):
        Checkpoint(tmp_path)


def test_an_empty_shard_beside_others(tmp_path):
    save_file({W: torch.ones(4, 4)}, tmp_path / "full.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {W: "full.safetensors"}}))
    assert list(Checkpoint(tmp_path).shapes) == [W]
