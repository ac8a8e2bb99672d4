"""Whatever is wrong with a model's files is one typed error that names the flag and the folder, in
every command.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig, get_peft_model

from effopd.commands.main import main
from effopd.errors import CompatibilityError, ConfigError
from effopd.launch.meta_model import read_config
from effopd.launch.preflight import check_model_name
from effopd.models import hub
from effopd.models.files import absolute_base, load_model, load_tokenizer, reading
from effopd.models.fingerprint import model_folder
from effopd.models.folders import check_whole_model

TASK = ["--task", "testbed:chain_sum", "--eval_size", "2", "--max_new_tokens", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """whole/, shards/, and adapter/ of whole/, named by an absolute path."""
    root = tmp_path_factory.mktemp("models")
    for name, size in (("whole", "1GB"), ("shards", "4KB")):
        make_model(0).save_pretrained(root / name, max_shard_size=size)
        make_tokenizer().save_pretrained(root / name)
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(root / "whole")
    model.save_pretrained(root / "adapter")
    make_tokenizer().save_pretrained(root / "adapter")
    return root


def cut(path: Path, size: int):
    path.write_bytes(path.read_bytes()[:size])


def edit(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


#: Damage → (which folder, what is done to it, what the message says).
DAMAGE = {
    "weights cut": ("whole", lambda d: cut(d / "model.safetensors", 5000), "SafetensorError"),
    "header cut": ("whole", lambda d: cut(d / "model.safetensors", 20), "SafetensorError"),
    "weights empty": ("whole", lambda d: cut(d / "model.safetensors", 0), "SafetensorError"),
    "weights missing": ("whole", lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "config empty": ("whole", lambda d: (d / "config.json").write_text("{}"), "has no model_type"),
    "config blank": ("whole", lambda d: cut(d / "config.json", 0), "JSONDecodeError"),
    "config cut": ("whole", lambda d: cut(d / "config.json", 40), "JSONDecodeError"),
    "config binary": ("whole", lambda d: (d / "config.json").write_bytes(b"\xff\xfe\0"), "UnicodeDecodeError"),
    "config a list": ("whole", lambda d: (d / "config.json").write_text("[]"), "expected a JSON object, got list"),
    "config missing": ("whole", lambda d: (d / "config.json").unlink(), "has no config.json"),
    "unknown type": ("whole", lambda d: edit(d / "config.json", model_type="nope"), "`nope`"),
    "wrong types": ("whole", lambda d: edit(d / "config.json", hidden_size="x"), "hidden_size"),
    "other sizes": ("whole", lambda d: edit(d / "config.json", hidden_size=32), "of different sizes"),
    "more layers": (
        "whole",
        lambda d: edit(d / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "the weights lack 11 tensors of Qwen3ForCausalLM, e.g. model.layers.2.",
    ),
    "no language model": ("whole", lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "ViTConfig"),
    "encoder and decoder": ("whole", lambda d: (d / "config.json").write_text('{"model_type": "t5"}'), "T5Config"),
    "shard missing": ("shards", lambda d: sorted(d.glob("model-*"))[1].unlink(), "model-00002-of"),
    "index cut": ("shards", lambda d: cut(d / "model.safetensors.index.json", 30), "JSONDecodeError"),
    "index empty": ("shards", lambda d: (d / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "pickle that is none": (
        "whole",
        lambda d: ((d / "model.safetensors").unlink(), (d / "pytorch_model.bin").write_bytes(b"junk")),
        "cannot be read",
    ),
    "no tokenizer": ("whole", lambda d: [path.unlink() for path in d.glob("token*")], "has no tokenizer"),
    "tokenizer cut": ("whole", lambda d: cut(d / "tokenizer.json", 40), "JSONDecodeError"),
    "tokenizer empty": ("whole", lambda d: (d / "tokenizer.json").write_text("{}"), "KeyError"),
    "tokenizer's settings": ("whole", lambda d: (d / "tokenizer_config.json").write_text("[]"), "AttributeError"),
    "gguf": ("whole", lambda d: ((d / "config.json").unlink(), (d / "m.gguf").write_bytes(b"GGUF")), "GGUF files"),
    "adapter's weights": ("adapter", lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model"),
    "adapter cut": ("adapter", lambda d: cut(d / "adapter_model.safetensors", 100), "SafetensorError"),
    "adapter's settings": ("adapter", lambda d: cut(d / "adapter_config.json", 30), "JSONDecodeError"),
    "base gone": (
        "adapter",
        lambda d: edit(d / "adapter_config.json", base_model_name_or_path="/gone/base"),
        "names '/gone/base' as its base",
    ),
    "base relative": (
        "adapter",
        lambda d: edit(d / "adapter_config.json", base_model_name_or_path="base"),
        "names 'base' as its base (base_model_name_or_path), which is neither a folder",
    ),
    "no base": ("adapter", lambda d: edit(d / "adapter_config.json", base_model_name_or_path=None), "names no base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_typed_error(models, tmp_path, damage):
    source, spoil, message = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(models / source, folder)
    spoil(folder)
    with pytest.raises(CompatibilityError) as caught:
        load_tokenizer("--flag", str(folder))
        load_model("--flag", str(folder))
    said = str(caught.value)
    assert message in said and "--flag" in said and str(folder) in said and "\n" not in said and len(said) < 1200


@pytest.mark.parametrize("damage", ["weights cut", "shard missing", "index cut", "config empty", "adapter's settings"])
def test_training_refuses_it_before_it_loads_anything(models, tmp_path, damage, capsys):
    source, spoil, _ = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(models / source, folder)
    spoil(folder)
    with pytest.raises(CompatibilityError, match="--flag"):
        check_whole_model("--flag", str(folder))
    task = ["--task", "testbed:chain_sum", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    good = str(models / "whole")
    for names in ((str(folder), good), (good, str(folder))):
        flags = ["--model_name_or_path", names[0], "--teacher_model_name_or_path", names[1], *task]
        for dry_run in ([], ["--dry_run"]):
            assert main(["train", *flags, *dry_run]) == 2
            assert str(folder) in capsys.readouterr().err
    assert main(["rl", "--model_name_or_path", str(folder), *task]) == 2
    assert str(folder) in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_commands_say_it_without_a_traceback(models, tmp_path, capsys):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert main(["eval", "--model", str(file), *TASK]) == 2
    assert "is a file: expected a model folder or a Hub id. GGUF" in capsys.readouterr().err
    bare = tmp_path / "bare"
    make_model(0).save_pretrained(bare)
    assert main(["eval", "--model", str(bare), *TASK]) == 2
    assert f"--model '{bare}' has no tokenizer" in capsys.readouterr().err
    intervene = ["intervene", "alpha", "--trained", f"a={models / 'whole'}", *TASK, "--out", str(tmp_path / "out")]
    assert main([*intervene, "--base", str(bare)]) == 2
    assert f"--base '{bare}' has no tokenizer" in capsys.readouterr().err
    assert main(["eval", "--model", str(models / "whole"), *TASK, "--dtype", "float33"]) == 2
    assert "--dtype: expected auto, float32" in capsys.readouterr().err


def test_a_run_without_a_model_names_one_inside(models, tmp_path):
    shutil.copytree(models / "whole", tmp_path / "run" / "checkpoints" / "step-000004")
    with pytest.raises(CompatibilityError, match=r"There is one in .*step-000004"):
        load_model("--model", str(tmp_path / "run"))


def test_other_errors_and_whole_models_pass(models):
    for error in (ConfigError("ours"), torch.OutOfMemoryError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), reading("--model", "x"):
            raise error
    for name in ("whole", "shards"):
        check_whole_model("--model", str(models / name))
        assert load_tokenizer("--model", str(models / name)).padding_side == "left"
        model = load_model("--model", str(models / name))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model(0).parameters(), strict=True))


# -- adapters --------------------------------------------------------------------------------------


def test_an_adapter_is_evaluated_with_its_base_and_the_bases_tokenizer(models, tmp_path, capsys):
    assert main(["eval", "--model", str(models / "adapter"), *TASK]) == 0
    bare = tmp_path / "bare"
    shutil.copytree(models / "adapter", bare)
    for path in bare.glob("token*"):
        path.unlink()
    assert main(["eval", "--model", str(bare), *TASK]) == 0


def test_an_adapter_with_resized_embeddings(models, tmp_path):
    model = make_model(0)
    model.resize_token_embeddings(80)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(models / "whole")
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(CompatibilityError, match=r"resize_token_embeddings\(ROWS\)"):
        load_model("--model", str(tmp_path / "adapter"))


@pytest.mark.parametrize("role", ["student", "teacher", "rl"])
def test_training_does_not_start_from_an_adapter(models, tmp_path, role, capsys):
    adapter, whole = str(models / "adapter"), str(models / "whole")
    names = {"student": (adapter, whole), "teacher": (whole, adapter), "rl": (adapter, None)}[role]
    flags = ["--model_name_or_path", names[0], "--task", "testbed:chain_sum", "--output_dir", str(tmp_path / "run")]
    flags += ["--teacher_model_name_or_path", names[1]] if names[1] else []
    for dry_run in ([], ["--dry_run"]):
        assert main(["rl" if role == "rl" else "train", *flags, "--use_cpu", *dry_run]) == 2
        error = capsys.readouterr().err
        assert f"'{adapter}' is an adapter of '{whole}'" in error and "merge_and_unload()" in error
        assert ("--teacher_model_name_or_path" in error) == (role == "teacher")


def test_the_base_of_a_trained_adapter_is_found_from_anywhere(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"]))
    config = model.peft_config["default"]
    for name, kept in (("whole", str(models / "whole")), ("org/model", "org/model"), (None, None)):
        config.base_model_name_or_path = name
        absolute_base(model)
        assert config.base_model_name_or_path == kept
    absolute_base(make_model(0))  # no adapter, nothing to do


# -- names that are no folder ----------------------------------------------------------------------


@pytest.fixture
def requests_to_the_hub(monkeypatch):
    """The URLs that are asked for; there is no network."""
    asked = []

    def refuse(url, **_):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("effopd.models.hub.get_hf_file_metadata", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "no-cache")
    hub._asked.cache_clear()
    yield asked
    hub._asked.cache_clear()


@pytest.mark.parametrize("load", [load_tokenizer, load_model, model_folder, read_config])
def test_a_mistyped_hub_id_is_asked_for_once(tmp_path, monkeypatch, requests_to_the_hub, load):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(
            CompatibilityError, match=r"the Hub cannot be reached \(ConnectionError: Name or service not"
        ):
            load("--model", "nosuch/model")
    assert requests_to_the_hub == ["https://huggingface.co/nosuch/model/resolve/main/config.json"]


def test_an_adapters_mistyped_base_is_asked_for_once(models, tmp_path, requests_to_the_hub):
    shutil.copytree(models / "adapter", tmp_path / "model")
    edit(tmp_path / "model" / "adapter_config.json", base_model_name_or_path="nosuch/model")
    for load in (load_tokenizer, load_model):
        with pytest.raises(CompatibilityError, match="names 'nosuch/model' as its base"):
            load("--model", str(tmp_path / "model"))
    assert len(requests_to_the_hub) == 1


def test_a_repository_that_the_hub_lacks_is_asked_for_once(monkeypatch, requests_to_the_hub):
    def lacks(url, **_):
        requests_to_the_hub.append(url)
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr("effopd.models.hub.get_hf_file_metadata", lacks)
    with pytest.raises(CompatibilityError, match="the Hub has no such model"):
        load_tokenizer("--model", "nosuch/model")
    assert len(requests_to_the_hub) == 1


def test_a_model_in_the_cache_needs_no_hub(tmp_path, monkeypatch, requests_to_the_hub):
    (tmp_path / "models--runs--first" / "snapshots" / "1f").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    check_model_name("--model", "runs/first")
    hub.check_reachable("--model", "runs/first")
    assert requests_to_the_hub == []


@pytest.mark.parametrize("name", ["./runs/first", "../runs", "~/first", "/first", "a/b/c", "a b"])
@pytest.mark.parametrize("check", [check_model_name, load_tokenizer, load_model])
def test_a_name_that_cannot_be_a_hub_id_is_not_asked_for(tmp_path, monkeypatch, requests_to_the_hub, name, check):
    (tmp_path / "runs" / "fist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompatibilityError, match=r"(?i)expected (the path of )?a model folder"):
        check("--model", name)
    assert requests_to_the_hub == []


def test_a_mistyped_path_that_could_be_a_hub_id_gets_a_hint(tmp_path, monkeypatch, requests_to_the_hub):
    """A folder `Qwen` does not hide the Hub's models of that name: the Hub is asked first."""
    (tmp_path / "runs" / "fist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_model_name("--model", "runs/frist")
    with pytest.raises(CompatibilityError, match=r"cannot be reached .* Did you mean runs/fist\?"):
        load_tokenizer("--model", "runs/frist")
    with pytest.raises(CompatibilityError, match=r"cannot be reached .* The folder runs has no 'other'\."):
        load_tokenizer("--model", "runs/other")
    assert len(requests_to_the_hub) == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for check in (check_model_name, load_tokenizer):
        with pytest.raises(CompatibilityError, match=r"nor in the local cache\. Did you mean runs/fist\?"):
            check("--model", "runs/frist")
    assert len(requests_to_the_hub) == 2


def test_a_request_that_times_out_decides_nothing(monkeypatch, requests_to_the_hub):
    class ConnectTimeout(Exception): ...

    def late(url, **_):
        raise ConnectTimeout

    monkeypatch.setattr("effopd.models.hub.get_hf_file_metadata", late)
    hub.check_reachable("--model", "some/model")
