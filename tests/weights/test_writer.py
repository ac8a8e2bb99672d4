"""Written checkpoints are whole, load, and equal what was asked for."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.errors import CheckpointError, WeightsError
from effopd.weights import Checkpoint, write_checkpoint


@pytest.fixture
def base(tmp_path):
    make_model(0).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return Checkpoint(tmp_path / "base")


@pytest.mark.parametrize("limit", [2**31, 3000, 1])
def test_the_identity_is_the_base(tmp_path, base, limit):
    out = write_checkpoint(base, lambda name, tensor: tensor, tmp_path / "out", max_shard_size=limit)
    again = Checkpoint(out)
    assert again.shapes == base.shapes
    assert all(torch.equal(again.load(name), base.load(name)) for name in base.shapes)
    assert len(set(again.files.values())) == {2**31: 1, 1: len(base.shapes)}.get(limit, len(set(again.files.values())))
    if limit == 3000:
        assert 1 < len(set(again.files.values())) < len(base.shapes)
    loaded, original = (AutoModelForCausalLM.from_pretrained(path) for path in (out, base.path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == make_tokenizer().get_vocab()


def test_edits_and_dtype(tmp_path, base):
    out = write_checkpoint(base, lambda name, t: t * 2 if "mlp" in name else t, tmp_path / "out", dtype=torch.bfloat16)
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = base.load(name) * (2 if "mlp" in name else 1)
        assert torch.equal(tensor, expected.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_what_is_computed_in_float64_is_stored_as_the_base_is(tmp_path, base):
    out = write_checkpoint(base, lambda name, t: t.double() * 3, tmp_path / "out")
    again = Checkpoint(out)
    assert again.dtypes == base.dtypes
    assert all(torch.equal(again.load(n), (base.load(n).double() * 3).float()) for n in base.shapes)


def test_a_failure_leaves_nothing_under_the_final_name(tmp_path, base):
    last = list(base.shapes)[-1]

    def edit(name, tensor):
        if name == last:
            raise RuntimeError("killed")
        return tensor

    with pytest.raises(RuntimeError, match="killed"):
        write_checkpoint(base, edit, tmp_path / "out", max_shard_size=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    (tmp_path / ".out.tmp").mkdir()  # as a kill leaves it
    (tmp_path / ".out.tmp" / "shard-00099.safetensors").touch()
    write_checkpoint(base, lambda name, tensor: tensor, tmp_path / "out", max_shard_size=1000)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    assert not list((tmp_path / "out").glob("shard-*"))


def test_refusals(tmp_path, base):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_checkpoint(base, lambda name, tensor: tensor, tmp_path / "used")
    with pytest.raises(WeightsError, match=r"not finite in torch\.float16"):
        write_checkpoint(base, lambda name, tensor: tensor + 1e6, tmp_path / "out", dtype=torch.float16)
    with pytest.raises(WeightsError, match="not finite"):
        write_checkpoint(base, lambda name, tensor: tensor / 0, tmp_path / "out")
    with pytest.raises(WeightsError, match="has shape"):
        write_checkpoint(base, lambda name, tensor: tensor[:1], tmp_path / "out")
    write_checkpoint(base, lambda name, tensor: tensor, (tmp_path / "empty"))
